"""Find the RoPE base that reads farthest without training: text needles at a given length, for each of a grid of bases.

LongVA's untrained baseline is searched so over 3M to 1B (section 4). Every base is a row of `search.jsonl`; a search
that was stopped goes on with the bases that are missing.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvctx.artifacts import schemas
from lvctx.artifacts.result_log import ResultLog, short_hash
from lvctx.errors import UsageError
from lvctx.eval.niah.config import Depths, TextNiahConfig
from lvctx.eval.niah.run import NiahJob, plan_text
from lvctx.inference.prefix_scorer import PrefixScorer
from lvctx.model.load import load_config, load_model, try_forward
from lvctx.positions.choose import choose

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Search:
    """A checked search."""

    bases: tuple[float, ...]
    """Candidates, ascending."""
    niah: NiahJob
    """Model, needles and cells that each base is tried on."""

    @property
    def made_of(self) -> dict[str, Any]:
        """What decides a base's row: model, haystack and cells."""
        return {**self.niah.run_facts["made_of"], "cells": short_hash([self.niah.key(c) for c in self.niah.cells])}


def bases(span: str, points: int) -> tuple[float, ...]:
    """`points` bases from LOW to HIGH (`LOW:HIGH`), evenly spaced by factor, to three digits. Raises UsageError."""
    try:
        low, high = (float(end) for end in span.split(":"))
    except ValueError:
        raise UsageError(f"--search-base {span!r} is not LOW:HIGH", fix="for example --search-base 3e6:1e9") from None
    if not 1 < low < high < float("inf"):
        raise UsageError(f"--search-base {span}: not 1 < LOW < HIGH")
    return tuple(float(f"{low * (high / low) ** (i / (points - 1)):.3g}") for i in range(points))


def plan_search(
    *,
    model: str,
    span: str,
    points: int,
    haystack: Sequence[Path],
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int,
) -> Search:
    """Check everything but the weights. Raises UsageError and InputError."""
    if not haystack:
        raise UsageError("--search-base needs text to hide needles in", fix="give --haystack FOLDER")
    config = TextNiahConfig(
        model=model,
        haystack=tuple(haystack),
        lengths=tuple(lengths),
        depths=Depths(values=tuple(depths)),
        trials=trials,
        scoring="forced",
        seed=seed,
    )
    return Search(bases=bases(span, points), niah=plan_text(config))


def run_search(
    search: Search, out: Path, *, device: str, force: bool, report: Callable[[int, int, str], None]
) -> list[dict[str, Any]]:
    """A row for every base, ascending; those that stand in `out/search.jsonl` are not tried again."""
    with ResultLog.open(out / "search.jsonl", search.made_of, force=force) as results:
        waiting = [base for base in search.bases if f"{base:g}" not in results]
        model = load_model(search.niah.path, device=device) if waiting else None
        if model is not None:
            try_forward(model, search.niah.path)
        for done, base in enumerate(waiting, start=len(search.bases) - len(waiting) + 1):
            row = {"schema": schemas.BASE, "base": base, **_try_base(search, model, base)}
            results.append(f"{base:g}", row)
            log.info("base %g: %.3f of %d needles found", base, row["accuracy"], len(row["cells"]))
            report(done, len(search.bases), f"base {base:g}: {row['accuracy']:.2f}")
        return [results.rows[f"{base:g}"] for base in search.bases]


def _try_base(search: Search, model: Any, base: float) -> dict[str, Any]:
    """Share of needles found, mean log-probability of their answers, and every cell."""
    hf = load_config(search.niah.path)
    hf.rope_parameters = choose(hf, scheme="theta", theta=base, factor=None, context=None, seq_len=0).rope_parameters
    # Frequencies are all that a base decides: the model's own class computes them anew, the weights stay loaded.
    decoder = model.model
    decoder.rotary_emb = type(decoder.rotary_emb)(hf).to(model.device)
    scorer = PrefixScorer(model)
    cells = []
    for cell in search.niah.cells:
        score = scorer.score(*search.niah.task.sequence(cell))
        verdict = {"correct": score.forced, "log_prob": round(score.log_prob, 4)}
        cells.append({"length": cell.length, "depth": cell.depth, "trial": cell.trial, **verdict})
    return {
        "accuracy": sum(c["correct"] for c in cells) / len(cells),
        "log_prob": round(sum(c["log_prob"] for c in cells) / len(cells), 4),
        "cells": cells,
    }


def best(rows: Sequence[dict[str, Any]]) -> float:
    """The base that finds most; of equals the one whose answers are likelier, then the smaller, which changes less."""
    return float(max(rows, key=lambda row: (row["accuracy"], row["log_prob"], -row["base"]))["base"])
