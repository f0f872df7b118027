"""Results of a needle test: accuracy by length and depth, computed from rows. No model, no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvctx.artifacts import schemas
from lvctx.artifacts.result_log import read_results
from lvctx.errors import InputError
from lvctx.eval.statistics import clustered_mean, wilson_interval

THRESHOLD = 0.9
"""Minimum accuracy of a length for the effective length. LongVA-7B falls below it where its figure 4 begins to fade;
RULER uses 0.856 and Visual Haystacks 0.6, so it is a choice and always stated."""


Interval = tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class NeedleResults:
    """One run of a needle test."""

    name: str
    """Display name of the run."""
    modality: str
    """`text` or `video`."""
    lengths: list[int]
    """Haystack lengths, ascending; tokens for text, frames for video."""
    tokens: list[int]
    """Mean number of tokens of a sequence at each length."""
    depths: list[float]
    """Ascending, 0 to 1. For nested insertion points: each point's share of the longest haystack; the last, 1, is
    every haystack's own end."""
    labels: list[str]
    """The label of each depth: `20%`, or `after 600` if nested."""
    correct: list[list[int]]
    """Number of right answers, depths x lengths."""
    trials: list[list[int]]
    """Number of cells that ran, depths x lengths."""
    errors: int
    """Number of failed cells, which are in neither count."""
    chance: float | None
    """Accuracy of guessing; None if it is not known."""
    trained_length: int | None
    """Tokens of the longest sequence the language model was trained on; None if it is not known."""
    longest_sample: int
    """Tokens of the longest sample of the alignment; 0 for a language model."""
    interval: Interval = None
    """The 95 % interval of the accuracy, clustered by needle: the needles are the sample, as all cells of a trial share
    one. No narrower than Wilson's for independent cells. None with fewer than two needles, and for LongVA's files,
    which have no trials.
    """
    interval_by_length: list[Interval] = field(default_factory=list)
    """The same of each length."""
    shares: list[float | None] = field(default_factory=list)
    """Mean share of the answers that are in a reply, by length: RULER's score, and more than the accuracy where an
    answer has several parts. None where replies were not scored.
    """
    pairs: list[dict[str, float]] = field(default_factory=list)
    """By length, where each chain of needles has two questions (VideoChat-Flash): the accuracies `caption` and `qa`,
    the share `both` of the chains with two right answers, and how many `chains` there are. Empty for other tests.
    """

    @property
    def unit(self) -> str:
        """Unit of a length."""
        return "tokens" if self.modality == "text" else "frames"

    def accuracy(self, depth: int, length: int) -> float | None:
        """Accuracy of one cell, by indices; None if nothing ran."""
        n = self.trials[depth][length]
        return self.correct[depth][length] / n if n else None

    def count(self, length: int) -> tuple[int, int]:
        """Right answers and cells of all depths of one length, by index."""
        return sum(row[length] for row in self.correct), sum(row[length] for row in self.trials)

    def by_length(self, length: int) -> float | None:
        """Accuracy over all depths of one length, by index."""
        right, n = self.count(length)
        return right / n if n else None

    @property
    def guessing(self) -> str:
        """The chance level for a title; empty if it is not known."""
        return "" if self.chance is None else f"chance {self.chance:.2f}"

    @property
    def total(self) -> tuple[int, int]:
        """Total right answers and cells."""
        return sum(map(sum, self.correct)), sum(map(sum, self.trials))

    @property
    def mean(self) -> float | None:
        """Accuracy over all cells."""
        right, n = self.total
        return right / n if n else None

    @property
    def mean_share(self) -> float | None:
        """Mean of `shares` over the lengths."""
        shares = [share for share in self.shares if share is not None]
        return sum(shares) / len(shares) if shares else None

    def pair_mean(self, part: str) -> float | None:
        """Mean of a share of `pairs` over the lengths."""
        shares = [shares[part] for shares in self.pairs if part in shares]
        return sum(shares) / len(shares) if shares else None

    def effective(self, threshold: float) -> int | None:
        """Index of the effective length: the longest one up to which every length reaches `threshold`.

        None if the shortest is below it. A length without results counts as below.
        """
        last = None
        for i in range(len(self.lengths)):
            right, n = self.count(i)
            if not n or right < threshold * n - 1e-9:  # so that 27 of 30 reach 0.9
                break
            last = i
        return last

    def verdict(self, threshold: float) -> str:
        """The effective length in words; `at least` if every length reaches the threshold."""
        i = self.effective(threshold)
        if i is None:
            return f"under {threshold:g} at every length" if len(self.lengths) == 1 else f"under {threshold:g} at once"
        tokens = f" ({self.tokens[i]:,} tokens)" if self.modality == "video" and self.tokens[i] else ""
        least = "at least " if i == len(self.lengths) - 1 else ""
        return f"effective length {least}{self.lengths[i]:,} {self.unit}{tokens} at {threshold:g}"

    def to_dict(self, threshold: float = THRESHOLD) -> dict[str, Any]:
        """JSON form: the fields, means with 95 % intervals, and the effective length."""
        i = self.effective(threshold)
        return {
            "schema": schemas.NIAH,
            **vars(self),
            "unit": self.unit,
            "intervals": [
                [wilson(c, n) for c, n in zip(*pair, strict=True)]
                for pair in zip(self.correct, self.trials, strict=True)
            ],
            "accuracy_by_length": [self.by_length(n) for n in range(len(self.lengths))],
            "accuracy": self.mean,
            "threshold": threshold,
            "effective_length": None if i is None else self.lengths[i],
            "effective_tokens": None if i is None else self.tokens[i],
            "falls": i != len(self.lengths) - 1,
        }


def wilson(right: int, n: int) -> Interval:
    """The 95 % interval of a proportion for `right` of `n` needles (Wilson 1927); None for n = 0."""
    if not n:
        return None
    low, high = wilson_interval(right / n, n)
    return round(low, 4), round(high, 4)


def build_results(rows: Iterable[dict[str, Any]], name: str) -> NeedleResults:
    """The grid of a results file's rows. Raises InputError if there is no row."""
    rows = list(rows)
    if not rows:
        raise InputError("there are no results", where=name, fix="run lvctx niah first")
    lengths = sorted({r["length"] for r in rows})
    depths = sorted({line_of(r) for r in rows})
    positions = {line_of(r): r["position"] for r in rows} if rows[0].get("point") is not None else {}
    shape = [[0] * len(lengths) for _ in depths]
    correct, trials = [list(r) for r in shape], [list(r) for r in shape]
    for r in rows:
        if "error" not in r:
            d, n = depths.index(line_of(r)), lengths.index(r["length"])
            trials[d][n] += 1
            correct[d][n] += bool(r["correct"])
    # A server that refuses a request does not report its tokens.
    sizes = {n: [r["tokens"] for r in rows if r["length"] == n and r["tokens"]] or [0] for n in lengths}
    return NeedleResults(
        name=name,
        modality=rows[0]["modality"],
        lengths=lengths,
        tokens=[round(sum(sizes[n]) / len(sizes[n])) for n in lengths],
        depths=depths,
        labels=["all"] if rows[0]["depth"] is None else [_label(d, positions) for d in depths],
        correct=correct,
        trials=trials,
        errors=sum("error" in r for r in rows),
        chance=rows[0]["chance"],
        trained_length=rows[0]["trained_length"],
        longest_sample=rows[0]["longest_sample"],
        interval=_interval(rows),
        interval_by_length=[_interval(r for r in rows if r["length"] == n) for n in lengths],
        shares=[_mean_share(r for r in rows if r["length"] == n) for n in lengths],
        pairs=[_pair_shares([r for r in rows if r["length"] == n]) for n in lengths] if "part" in rows[0] else [],
    )


def cluster_of(row: Mapping[str, Any]) -> str:
    """What the cells of a trial share: its needle, or its number where there is none."""
    return str(row.get("needle") or row.get("trial"))


def _interval(rows: Iterable[Mapping[str, Any]]) -> Interval:
    ran = [(bool(row["correct"]), cluster_of(row)) for row in rows if "error" not in row]
    estimate = clustered_mean([float(right) for right, _ in ran], [needle for _, needle in ran])
    if estimate.low is None or estimate.high is None:
        return None
    # Few needles may differ less by luck than independent cells would.
    clustered = round(estimate.low, 4), round(estimate.high, 4)
    independent = wilson(sum(right for right, _ in ran), len(ran)) or clustered
    return max(clustered, independent, key=lambda ends: ends[1] - ends[0])


def _pair_shares(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """See `NeedleResults.pairs`. A chain of which a cell failed is left out."""
    chains: dict[int, dict[str, bool]] = {}
    for row in rows:
        if "error" not in row:
            chains.setdefault(row["trial"] // 2, {})[row["part"]] = bool(row["correct"])
    whole = [chain for chain in chains.values() if len(chain) == 2]
    shares = {
        "caption": [c["caption"] for c in whole],
        "qa": [c["qa"] for c in whole],
        "both": [all(c.values()) for c in whole],
    }
    return {"chains": len(whole), **{name: round(sum(v) / len(v), 4) for name, v in shares.items() if v}}


def _mean_share(rows: Iterable[Mapping[str, Any]]) -> float | None:
    shares = [row["share"] for row in rows if isinstance(row.get("share"), int | float)]
    return round(sum(shares) / len(shares), 4) if shares else None


def line_of(row: Mapping[str, Any]) -> float:
    """The line of the grid that a row is on: its depth, or 0 without a needle.

    Nested points have a different depth for every length, so there a line is a point.
    """
    return float(row["depth"] or 0.0) if row.get("point") is None else float(row["point"])


def _label(depth: float, positions: dict[float, int]) -> str:
    if not positions:
        return f"{100 * depth:g}%"
    return "at the end" if depth == 1 else f"after {positions[depth]:,}"


def read_needle_results(path: Path) -> NeedleResults:
    """The grid of a results directory, from results.jsonl. Raises InputError if there is none."""
    return build_results(read_results(path).values(), path.name)
