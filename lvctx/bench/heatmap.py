"""Heatmaps of needle tests, a panel a run on one scale: LongVA's figure 4, with the trained length as a line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.artifacts.store import atomic_file, write_json
from lvctx.bench.grid import Grid


def write_report(out: Path, grid: Grid) -> None:
    """summary.json, heatmap.json and heatmap.png of a run, all derived from its rows; summary.json last."""
    accuracy = [[grid.accuracy(d, n) for n in range(len(grid.lengths))] for d in range(len(grid.depths))]
    write_json(out / "heatmap.json", {"lengths": grid.lengths, "depths": grid.depths, "accuracy": accuracy})
    draw_heatmaps([grid], out / "heatmap.png")
    write_json(out / "summary.json", grid.to_dict())


def draw_heatmaps(grids: Sequence[Grid], target: Path) -> None:
    """Draw runs side by side, one line of panels for each modality, to a .png or .svg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [[g for g in grids if g.modality == m] for m in ("text", "video")]
    lines = [line for line in lines if line]
    columns = max(map(len, lines))
    widest = max(len(g.lengths) for g in grids)
    figure = Figure(figsize=(columns * (1.9 + 0.62 * widest), 0.6 + 2.9 * len(lines)), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    shades: Any = None
    for row, line in zip(axes, lines, strict=True):
        for ax in row[len(line) :]:
            ax.set_visible(False)
        for ax, grid in zip(row, line, strict=False):
            shades = _panel(ax, grid)
    bar = figure.colorbar(shades, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("accuracy")
    figure.suptitle("Needle in a haystack: share of needles found", fontsize=11, x=0.02, ha="left", weight="bold")
    with atomic_file(target) as partial:
        # No date and no version in the file: the same results give the same bytes.
        metadata = {"Date": None} if target.suffix == ".svg" else {"Software": None}
        figure.savefig(partial, format=target.suffix[1:] or "png", metadata=metadata)


def _panel(ax: Any, grid: Grid) -> Any:
    shape = range(len(grid.depths)), range(len(grid.lengths))
    values = [[grid.accuracy(d, n) for n in shape[1]] for d in shape[0]]
    image = np.array([[np.nan if v is None else v for v in row] for row in values])
    shades = ax.imshow(image, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for d in shape[0]:
        for n in shape[1]:
            value = values[d][n]
            said = "–" if value is None else f"{value:.1f}".rstrip("0").rstrip(".")
            ax.text(n, d, said, ha="center", va="center", fontsize=8, color="black" if (value or 0) > 0.6 else "white")
    ax.set_xticks(shape[1], [_ticks(grid, n) for n in shape[1]], fontsize=7)
    ax.set_yticks(shape[0], [f"{100 * d:g}%" for d in grid.depths], fontsize=7)
    ax.set_xlabel("tokens" if grid.modality == "text" else "haystack frames (tokens)", fontsize=8)
    ax.set_ylabel("depth of the needle", fontsize=8)
    at = trained_at(grid)
    if at is not None:
        ax.axvline(at, color="red", linestyle="--", linewidth=1.4)
    chance = f", chance {grid.chance:.2f}" if grid.chance > 0.001 else ""
    trials = max(map(max, grid.trials))
    mean = "nothing ran" if grid.mean is None else f"mean {grid.mean:.2f}{chance}"
    ax.set_title(
        f"{grid.name}\n{mean}; {trials} a cell; dashed: language model trained to {grid.trained_length:,} tokens",
        fontsize=7.5,
        loc="left",
    )
    return shades


def _ticks(grid: Grid, n: int) -> str:
    return f"{grid.lengths[n]:,}" if grid.modality == "text" else f"{grid.lengths[n]:,}\n({grid.tokens[n]:,})"


def trained_at(grid: Grid) -> float | None:
    """Where between the columns (0 is the first column's centre) the trained length falls; None outside the axis."""
    if not grid.tokens[0] <= grid.trained_length <= grid.tokens[-1]:
        return None
    return float(np.interp(grid.trained_length, grid.tokens, range(len(grid.tokens))))
