"""Two needle tests with the same cells compared by pairs: the mean of their differences, clustered by needle.

The cells of a trial share a needle at all lengths and depths, so they are no independent trials: a run's needles are
what `statistics.py` calls clusters, and its interval needs some tens of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lvctx.eval.niah.results import cluster_of, line_of
from lvctx.eval.statistics import DETECT, Difference, paired_difference

FEW_NEEDLES = 20
"""Below this number of needles the interval is too narrow."""
Row = Mapping[str, Any]


def compare_needles(first: Iterable[Row], second: Iterable[Row], *, detect: float = DETECT) -> dict[str, Difference]:
    """First minus second, right answers in [-1, 1], over `all` cells that ran in both, and at each length.

    Cells are the same if modality, length, depth, trial, needle, question and answer are. Where replies have parts of
    an answer, `share found` is the difference of the shares, over all cells. Empty without such cells.
    """
    others = {_cell(row): row for row in second if _ran(row)}
    pairs = [(row, others[cell]) for row in first if _ran(row) and (cell := _cell(row)) in others]
    right = [(float(bool(a.get("correct"))), float(bool(b.get("correct")))) for a, b in pairs]
    shares = [(float(a["share"]), float(b["share"])) for a, b in pairs if _has_share(a) and _has_share(b)]
    groups = {"all": right}
    if len(shares) == len(pairs) and not {share for pair in shares for share in pair} <= {0.0, 1.0}:
        groups["share found"] = shares
    found = {name: _difference(values, pairs, detect) for name, values in groups.items() if values}
    for length in sorted({a["length"] for a, _ in pairs}):
        at = [i for i, (a, _) in enumerate(pairs) if a["length"] == length]
        found[f"{length:,}"] = _difference([right[i] for i in at], [pairs[i] for i in at], detect)
    return found


def _difference(values: Sequence[tuple[float, float]], pairs: Sequence[tuple[Row, Row]], detect: float) -> Difference:
    return paired_difference([a - b for a, b in values], [cluster_of(a) for a, _ in pairs], detect=detect)


def _has_share(row: Row) -> bool:
    return isinstance(row.get("share"), int | float)


def comparison_warnings(
    first: Sequence[Row], second: Sequence[Row], differences: Mapping[str, Difference]
) -> list[str]:
    """What to know of a comparison: another scoring or text than in the other run, or few needles."""
    runs = [row.get("made_of") for row in (first[0], second[0])]
    # The features of a video's frames differ from model to model.
    names = ("scoring", "haystack") if first[0].get("modality") == "text" else ("scoring",)
    differing = [name for name in names if len({str(run.get(name)) for run in runs if isinstance(run, dict)}) > 1]
    warnings = [f"the runs differ in their {' and '.join(differing)}"] if differing else []
    needles = differences["all"].clusters
    if needles < FEW_NEEDLES:
        more = f"run niah with --trials {FEW_NEEDLES} or more"
        warnings.append(f"few needles ({needles}), so the interval is too narrow; {more}")
    return warnings


def _ran(row: Row) -> bool:
    return "error" not in row and "needle" in row and "trial" in row


def _cell(row: Row) -> tuple[object, ...]:
    return (line_of(row), *(str(row.get(k)) for k in ("modality", "length", "trial", "needle", "question", "answer")))
