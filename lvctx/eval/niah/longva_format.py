"""LongVA's results file, `all_accuracies.json`: read for comparison with ours, and written for programs that use it.

It is a list of `{"Num. Frame": 200, "Frame Depth": 20.0, "Score": 1.0}`, one per cell; text has `Context Length` and
`Document Depth`. It lacks the number of needles per score, and its depths are rounded to tens of percent (25 % is
stored as 20): they are read as stored, and written without rounding.
"""

from pathlib import Path
from typing import Any

from lvctx.artifacts.store import write_json
from lvctx.data.records import read_records
from lvctx.errors import InputError
from lvctx.eval.niah.results import NeedleResults

LONGVA_FILE = "all_accuracies.json"
KEYS = {"video": ("Num. Frame", "Frame Depth"), "text": ("Context Length", "Document Depth")}
NEEDLES = 5
"""Trials per cell in LongVA's scripts."""
TOKENS_PER_FRAME = 144
"""Visual tokens per frame of every model in LongVA's script."""


def read_longva(path: Path, *, trained_length: int | None) -> NeedleResults:
    """The results in such a file. Raises InputError for other files, and for scores that no 1 to 100 trials give."""
    broken = InputError(
        f"not LongVA's {LONGVA_FILE}", where=path, fix='a list of {"Num. Frame", "Frame Depth", "Score"}'
    )
    try:
        cells = [record.value for record in read_records(path)]
        modality = "video" if KEYS["video"][0] in cells[0] else "text"
        scores = {tuple(float(cell[k]) for k in KEYS[modality]): float(cell["Score"]) for cell in cells}
    except (ValueError, KeyError, TypeError, IndexError) as e:
        raise (e if isinstance(e, InputError) else broken) from None
    needles = next((n for n in (NEEDLES, *range(1, 101)) if all(_is_integer(s * n) for s in scores.values())), None)
    if needles is None or not all(0 <= s <= 1 for s in scores.values()):
        raise broken
    lengths, depths = (sorted({key[i] for key in scores}) for i in (0, 1))
    counts = [
        [(round(scores[n, d] * needles), needles) if (n, d) in scores else (0, 0) for n in lengths] for d in depths
    ]
    per = TOKENS_PER_FRAME if modality == "video" else 1
    return NeedleResults(
        name=path.parent.name or path.stem,
        modality=modality,
        lengths=[int(n) for n in lengths],
        tokens=[int(n) * per for n in lengths],
        depths=[d / 100 for d in depths],
        labels=[f"{d:g}%" for d in depths],
        correct=[[right for right, _ in row] for row in counts],
        trials=[[n for _, n in row] for row in counts],
        errors=0,
        chance=None,
        trained_length=trained_length,
        longest_sample=0,
    )


def _is_integer(value: float) -> bool:
    return abs(value - round(value)) < 1e-6


def write_longva(path: Path, grid: NeedleResults) -> None:
    """Write results as such a file; cells without results are left out."""
    length_key, depth_key = KEYS[grid.modality]
    cells: list[dict[str, Any]] = []
    for n, length in enumerate(grid.lengths):
        for d, depth in enumerate(grid.depths):
            score = grid.accuracy(d, n)
            if score is not None:
                cells.append({length_key: length, depth_key: round(100 * depth, 6), "Score": score})
    write_json(path, cells)
