"""Two needle tests with the same cells compared by pairs: the mean of their differences, clustered by needle.

The cells of a trial share a needle at all lengths and depths, so they are no independent trials: a run's needles are
what `statistics.py` calls clusters, and its interval needs some tens of them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from lvctx.eval.niah.results import line_of
from lvctx.eval.statistics import DETECT, Difference, paired_difference

FEW_NEEDLES = 20
"""Below this number of needles the interval is too narrow."""
Row = Mapping[str, Any]


def compare_needles(first: Iterable[Row], second: Iterable[Row], *, detect: float = DETECT) -> dict[str, Difference]:
    """First minus second, right answers in [-1, 1], over `all` cells that ran in both, and at each length.

    Cells are the same if modality, length, depth, trial, needle, question and answer are. Empty without such cells.
    """
    others = {_cell(row): row for row in second if _ran(row)}
    pairs = [(row, others[cell]) for row in first if _ran(row) and (cell := _cell(row)) in others]
    lengths = sorted({row["length"] for row, _ in pairs})
    groups = {"all": pairs, **{f"{n:,}": [pair for pair in pairs if pair[0]["length"] == n] for n in lengths}}
    return {
        name: paired_difference(
            [float(bool(a.get("correct"))) - float(bool(b.get("correct"))) for a, b in group],
            [str(a["trial"]) for a, _ in group],
            detect=detect,
        )
        for name, group in groups.items()
        if group
    }


def few_needles(differences: Mapping[str, Difference]) -> str:
    """A warning if there are few needles, else nothing."""
    needles = differences["all"].clusters
    if needles >= FEW_NEEDLES:
        return ""
    return f"few needles ({needles}), so the interval is too narrow; run niah with --trials {FEW_NEEDLES} or more"


def _ran(row: Row) -> bool:
    return "error" not in row and "needle" in row and "trial" in row


def _cell(row: Row) -> tuple[object, ...]:
    return (line_of(row), *(str(row.get(k)) for k in ("modality", "length", "trial", "needle", "question", "answer")))
