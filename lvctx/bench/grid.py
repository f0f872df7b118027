"""From rows to a grid: accuracy by length and depth, with what a reader needs to judge it. No model, no torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvctx.artifacts.rows import read_rows
from lvctx.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One run of a needle test."""

    name: str
    """What to call the run."""
    modality: str
    """`text` or `video`."""
    lengths: list[int]
    """Ascending; tokens for text, haystack frames for video."""
    tokens: list[int]
    """Mean tokens of a sequence of each length."""
    depths: list[float]
    """Ascending."""
    correct: list[list[int]]
    """Right answers, depths x lengths."""
    trials: list[list[int]]
    """Cells that ran, depths x lengths."""
    errors: int
    """Cells that failed to run; they are in neither count."""
    chance: float | None
    """Accuracy of guessing; None where it is not known."""
    trained_length: int
    """Tokens of the longest sequence the language model was trained on."""
    longest_sample: int
    """Tokens of the longest sample of the alignment; 0 for a language model."""

    @property
    def unit(self) -> str:
        """What a length counts."""
        return "tokens" if self.modality == "text" else "frames"

    def accuracy(self, depth: int, length: int) -> float | None:
        """Of one cell, by indices; None where nothing ran."""
        n = self.trials[depth][length]
        return self.correct[depth][length] / n if n else None

    def by_length(self, length: int) -> float | None:
        """Over all depths of one length, by index."""
        n = sum(row[length] for row in self.trials)
        return sum(row[length] for row in self.correct) / n if n else None

    @property
    def guessing(self) -> str:
        """The chance level for a title; empty where it is not known."""
        return "" if self.chance is None else f"chance {self.chance:.2f}"

    @property
    def mean(self) -> float | None:
        """Over all cells."""
        n = sum(map(sum, self.trials))
        return sum(map(sum, self.correct)) / n if n else None

    def to_dict(self) -> dict[str, Any]:
        """JSON form: this object's fields and the means."""
        return {
            "schema": "lvctx.niah/1",
            **vars(self),
            "unit": self.unit,
            "accuracy_by_length": [self.by_length(i) for i in range(len(self.lengths))],
            "accuracy": self.mean,
        }


def build_grid(rows: Iterable[dict[str, Any]], name: str) -> Grid:
    """The grid of a results file's rows. Raises InputError where there is no row."""
    rows = list(rows)
    if not rows:
        raise InputError("no result", where=name, fix="run lvctx niah first")
    lengths = sorted({r["length"] for r in rows})
    depths = sorted({r["depth"] for r in rows})
    shape = [[0] * len(lengths) for _ in depths]
    correct, trials = [list(r) for r in shape], [list(r) for r in shape]
    for r in rows:
        if "error" not in r:
            d, n = depths.index(r["depth"]), lengths.index(r["length"])
            trials[d][n] += 1
            correct[d][n] += bool(r["correct"])
    sizes = {n: [r["tokens"] for r in rows if r["length"] == n] for n in lengths}
    return Grid(
        name=name,
        modality=rows[0]["modality"],
        lengths=lengths,
        tokens=[round(sum(sizes[n]) / len(sizes[n])) for n in lengths],
        depths=depths,
        correct=correct,
        trials=trials,
        errors=sum("error" in r for r in rows),
        chance=rows[0]["chance"],
        trained_length=rows[0]["trained_length"],
        longest_sample=rows[0]["longest_sample"],
    )


def read_grid(directory: Path) -> Grid:
    """The grid of a results directory, from results.jsonl alone. Raises InputError where there is none."""
    results = directory / "results.jsonl"
    if not results.is_file():
        raise InputError("no results.jsonl", where=directory, fix="give a directory that lvctx niah wrote")
    last = {row["key"]: row for row in read_rows(results)}  # a cell that failed and was run again counts once
    return build_grid(last.values(), directory.name)
