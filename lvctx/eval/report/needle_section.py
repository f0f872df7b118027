"""A needle test in the report: the grid of its results, and every trial of every cell."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from lvctx.errors import InputError
from lvctx.eval.niah.compare import compare_needles
from lvctx.eval.niah.heatmap import trained_at
from lvctx.eval.niah.results import build_results, line_of
from lvctx.eval.report.question_section import COMPARED
from lvctx.eval.report.run_facts import describe_run
from lvctx.eval.report.run_files import RunFile, check_fields
from lvctx.eval.report.thumbnails import Thumbnails

NUMBER = (int, float)
FIELDS: dict[str, type | tuple[type, ...]] = {
    "modality": str,
    "length": int,
    "depth": (*NUMBER, type(None)),
    "trial": int,
    "position": int,
    "tokens": (int, type(None)),
    "chance": (*NUMBER, type(None)),
    "trained_length": (int, type(None)),
    "longest_sample": (int, type(None)),
}
TRIAL_FIELDS = ("needle", "part", "question", "answer", "generated", "predicted", "log_prob", "rank", "error")
"""Fields of a row that its trial shows."""


def needle_section(run: RunFile, thumbnails: Thumbnails, *, threshold: float) -> dict[str, Any]:
    """The run with its grid (`NeedleResults.to_dict`) and its trials. Raises InputError for rows of another form."""
    check_fields(run.rows, FIELDS)
    rows = list(run.rows.values())
    if len({row.get("point") is None for row in rows}) > 1:
        raise InputError("nested and other depths in one run", where=run.path)
    results = build_results(rows, run.name)
    boundary = trained_at(results)
    needles, frames = thumbnails.of_needles(rows), thumbnails.of_haystack(rows)
    trials = []
    for row in rows:
        trials.append(
            {
                "cell": [results.depths.index(line_of(row)), results.lengths.index(row["length"])],
                "trial": row["trial"],
                "position": None if row["depth"] is None else row["position"],
                "tokens": row["tokens"],
                "verdict": "failed" if "error" in row else "right" if row.get("correct") else "wrong",
                **{key: row[key] for key in TRIAL_FIELDS if row.get(key) is not None},
                "images": _images(row, needles, frames),
            }
        )
    grid = results.to_dict(threshold)
    scoring = rows[0]["made_of"].get("scoring") if isinstance(rows[0].get("made_of"), dict) else None
    return describe_run(run) | {
        "grid": grid,
        "beyond": None if boundary is None else int(boundary + 0.5),
        "trials": trials,
        "scoring": scoring,
        "effective": None if results.mean is None else results.verdict(threshold),
    }


def compare_needle_runs(runs: Sequence[RunFile]) -> list[dict[str, Any]]:
    """Paired differences of every two of the first runs on the cells that they have in common."""
    pairs = []
    for a, b in combinations(runs[:COMPARED], 2):
        if differences := compare_needles(a.rows.values(), b.rows.values()):
            rules = {name: vars(difference) for name, difference in differences.items()}
            pairs.append({"first": a.name, "second": b.name, "bench": "niah", "rules": rules})
    return pairs


def _images(row: Mapping[str, Any], needles: Mapping[str, int], frames: Mapping[int, int]) -> list[tuple[str, int]]:
    """Caption and number of the images of a trial: the needle between the frames around it, or nothing without one."""
    if row["depth"] is None:
        return []
    position = row["position"]
    found = (
        ("frame before", frames.get(position - 1)),
        ("needle", needles.get(str(row.get("needle")))),
        ("frame after", frames.get(position) if position < row["length"] else None),
    )
    return [(caption, number) for caption, number in found if number is not None]
