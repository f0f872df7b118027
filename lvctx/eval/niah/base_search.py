"""Search the RoPE base with the best untrained long-context retrieval: needle tests at a given length for each base.

LongVA's untrained baseline is found in this way over 3M to 1B (section 4). Every base is a row of `search.jsonl`; a
stopped search continues with the missing bases.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvctx.artifacts import schemas
from lvctx.artifacts.result_log import ResultLog, read_results, short_hash
from lvctx.config import OnProgress
from lvctx.device import resolve_device, weights_dtype
from lvctx.errors import UsageError
from lvctx.eval.niah.job import NiahJob, plan_text
from lvctx.eval.niah.niah_config import Depths, TextNiahConfig
from lvctx.inference.prefix_scorer import PrefixScorer
from lvctx.models.loading import load_config, load_model, try_forward
from lvctx.rope.scaling import resolve_scaling
from lvctx.training.extend_config import BaseSearchConfig, ExtendConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BaseSearch:
    """A checked search."""

    bases: tuple[float, ...]
    """Candidates, ascending."""
    niah: NiahJob
    """Model, needles and cells for every base."""

    @property
    def made_of(self) -> dict[str, Any]:
        """The values that decide a base's row: model, haystack and cells."""
        return {**self.niah.run_facts["made_of"], "cells": short_hash([self.niah.key(c) for c in self.niah.cells])}


def bases(span: str, points: int) -> tuple[float, ...]:
    """`points` bases from LOW to HIGH (`LOW:HIGH`), geometrically spaced, to three digits. Raises UsageError."""
    try:
        low, high = (float(end) for end in span.split(":"))
    except ValueError:
        raise UsageError(f"--search-base {span!r} is not LOW:HIGH", fix="for example --search-base 3e6:1e9") from None
    if not 1 < low < high < float("inf"):
        raise UsageError(f"--search-base {span}: not 1 < LOW < HIGH")
    return tuple(float(f"{low * (high / low) ** (i / (points - 1)):.3g}") for i in range(points))


def resolve_search(config: ExtendConfig, search: BaseSearchConfig, *, device: str) -> BaseSearch:
    """Check everything except the weights; `device` is where the search will run. Raises UsageError and InputError."""
    if config.rope != "theta" or config.rope_theta or config.stages:
        raise UsageError("--search-base is for --rope theta only", fix="drop --rope, --rope-theta and --stage")
    if not search.haystack:
        raise UsageError("--search-base needs a haystack", fix="give --haystack FOLDER")
    lengths = search.search_lengths or ((config.context,) if config.context else ())
    if not lengths:
        raise UsageError("--search-base needs context lengths", fix="give --search-lengths or --context")
    assert search.search_base is not None
    needles = TextNiahConfig(
        model=config.model,
        haystack=search.haystack,
        lengths=lengths,
        depths=Depths(values=search.search_depths),
        trials=search.search_trials,
        scoring="forced",
        seed=config.seed,
    )
    dtype = weights_dtype("auto", resolve_device(device))
    return BaseSearch(bases=bases(search.search_base, search.search_points), niah=plan_text(needles, dtype=dtype))


def run_search(
    search: BaseSearch, out: Path, *, device: str, force: bool, on_progress: OnProgress
) -> list[dict[str, Any]]:
    """A row for every base, ascending; those in `out/search.jsonl` are not tested again."""
    with ResultLog.open(out / "search.jsonl", search.made_of, force=force) as results:
        pending = [base for base in search.bases if f"{base:g}" not in results]
        model = load_model(search.niah.path, dtype=search.niah.dtype, device=device) if pending else None
        if model is not None:
            try_forward(model, search.niah.path)
        for done, base in enumerate(pending, start=len(search.bases) - len(pending) + 1):
            row = {"schema": schemas.BASE, "base": base, **_try_base(search, model, base)}
            results.append(f"{base:g}", row)
            log.info("base %g: %.3f of %d needles found", base, row["accuracy"], len(row["cells"]))
            on_progress(done, len(search.bases), f"base {base:g}: {row['accuracy']:.2f}")
    stored = {row["key"]: row for row in read_results(out / "search.jsonl").values()}
    return [stored[f"{base:g}"] for base in search.bases]


def _try_base(search: BaseSearch, model: Any, base: float) -> dict[str, Any]:
    """Share of needles found, mean log-probability of their answers, and every cell."""
    hf = load_config(search.niah.path)
    hf.rope_parameters = resolve_scaling(
        hf, scheme="theta", theta=base, factor=None, context=None, seq_len=0
    ).rope_parameters
    # A base changes only the frequencies: the model's own class recomputes them, the weights stay loaded.
    decoder = model.model
    decoder.rotary_emb = type(decoder.rotary_emb)(hf).to(model.device)
    scorer = PrefixScorer(model)
    cells: list[dict[str, Any]] = []
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
    """The base with the best accuracy; ties are resolved by the answers' log-probability, then the smaller base."""
    return float(max(rows, key=lambda row: (row["accuracy"], row["log_prob"], -row["base"]))["base"])


def search_facts(search: BaseSearch, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Facts of a search for the manifest: lengths, and the result of each base."""
    lengths = sorted({cell.length for cell in search.niah.cells})
    table = [{key: row[key] for key in ("base", "accuracy", "log_prob")} for row in rows]
    return {"lengths": lengths, "table": table}
