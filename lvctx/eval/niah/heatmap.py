"""Heatmaps of needle tests, a panel per run on one scale: LongVA's figure 4, with the trained length as a line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.artifacts.store import atomic_file, write_json
from lvctx.eval.niah.results import THRESHOLD, NeedleResults

NOTHING = "#d9d9d9"
"""Colour of a cell without results."""
ABREAST = 3
"""Maximum number of readable panels side by side."""


def write_report(out: Path, grid: NeedleResults, *, threshold: float = THRESHOLD) -> None:
    """summary.json, heatmap.json and heatmap.png of a run, all computed from its rows; summary.json last."""
    accuracy = [[grid.accuracy(d, n) for n in range(len(grid.lengths))] for d in range(len(grid.depths))]
    write_json(out / "heatmap.json", {"lengths": grid.lengths, "depths": grid.depths, "accuracy": accuracy})
    draw_heatmaps([grid], out / "heatmap.png", threshold=threshold)
    write_json(out / "summary.json", grid.to_dict(threshold))


def draw_heatmaps(grids: Sequence[NeedleResults], target: Path, *, threshold: float = THRESHOLD) -> None:
    """Draw runs side by side, text above video and three panels per line, to a .png or .svg."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [[g for g in grids if g.modality == m] for m in ("text", "video")]
    lines = [kind[first : first + ABREAST] for kind in kinds for first in range(0, len(kind), ABREAST)]
    columns = max(map(len, lines))
    # Cells large enough for their number, panels wide enough for their title.
    width = max(4.0, 1.1 + 0.62 * max(len(g.lengths) for g in grids))
    heights = [1.9 + 0.42 * max(len(g.depths) for g in line) for line in lines]
    figure = Figure(figsize=(columns * width + 1.0, sum(heights) + 0.35), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    shades: Any = None
    for row, line in zip(axes, lines, strict=True):
        for ax in row[len(line) :]:
            ax.set_visible(False)
        for ax, grid in zip(row, line, strict=False):
            shades = _panel(ax, grid, threshold)
    bar = figure.colorbar(shades, ax=axes, shrink=0.85, pad=0.02, aspect=24)
    bar.set_label("accuracy", fontsize=8)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
    figure.suptitle("Needle in a haystack", fontsize=11, x=0.012, ha="left", weight="bold")
    with atomic_file(target) as partial, rc_context({"svg.hashsalt": "lvctx"}):
        # No date, version or random names in the file, so that the same results give the same bytes.
        metadata = {"Date": None} if target.suffix == ".svg" else {"Software": None}
        figure.savefig(partial, format=target.suffix[1:], metadata=metadata)


def _panel(ax: Any, grid: NeedleResults, threshold: float) -> Any:
    depths, lengths = range(len(grid.depths)), range(len(grid.lengths))
    values = np.array([[np.nan if (v := grid.accuracy(d, n)) is None else v for n in lengths] for d in depths])
    ax.set_facecolor(NOTHING)
    edges = np.arange(len(lengths) + 1) - 0.5, np.arange(len(depths) + 1) - 0.5
    shades = ax.pcolormesh(*edges, values, cmap="viridis", vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
    ax.set_ylim(len(depths) - 0.5, -0.5)
    for d in depths:
        for n in lengths:
            value = values[d, n]
            dark = value > 0.6 or np.isnan(value)
            ax.text(n, d, _number(value), ha="center", va="center", fontsize=8, color="black" if dark else "white")
    ax.set_xticks(lengths, [_ticks(grid, n) for n in lengths], fontsize=7)
    ax.set_yticks(depths, grid.labels, fontsize=7)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("tokens" if grid.modality == "text" else "frames (tokens)", fontsize=8)
    ax.set_ylabel("depth", fontsize=8)
    ax.set_title(_title(grid, threshold), fontsize=8, loc="left", linespacing=1.4)
    boundary = trained_at(grid)
    if boundary is not None:
        ax.axvline(boundary, color="white", linewidth=4)
        ax.axvline(boundary, color="red", linestyle=(0, (3, 1.5)), linewidth=1.8)
    return shades


def _title(grid: NeedleResults, threshold: float) -> str:
    """The run with its mean, its effective length, and its training lengths, one per line."""
    mean = "nothing ran" if grid.mean is None else f"mean {grid.mean:.2f}"
    guessing = f", {grid.guessing}" if grid.guessing else ""
    errors = f", {grid.errors} failed" if grid.errors else ""
    lines = [f"{grid.name}: {mean}{guessing}; {max(map(max, grid.trials))} trials per cell{errors}"]
    if grid.mean is not None:
        lines.append(grid.verdict(threshold))
    if grid.trained_length is not None:
        if trained_at(grid) is not None:
            where = "red line"
        else:
            where = "all within" if grid.trained_length >= grid.tokens[-1] else "all beyond"
        lines.append(f"language model trained to {grid.trained_length:,} tokens ({where})")
    if grid.longest_sample:
        lines.append(f"aligned on samples of up to {grid.longest_sample:,} tokens")
    return "\n".join(lines)


def _number(value: float) -> str:
    """One or two decimals: 1.0, 0.5, 0.67."""
    if np.isnan(value):
        return "–"
    return f"{value:.1f}" if abs(value * 10 - round(value * 10)) < 1e-9 else f"{value:.2f}"


def _ticks(grid: NeedleResults, n: int) -> str:
    return f"{grid.lengths[n]:,}" if grid.modality == "text" else f"{grid.lengths[n]:,}\n({grid.tokens[n]:,})"


def trained_at(grid: NeedleResults) -> float | None:
    """Position of the trained length between columns (0 is the first column's centre); columns to the right of it are
    beyond the trained length. None if all columns are on one side or that length is not known.
    """
    if grid.trained_length is None:
        return None
    columns = sum(tokens <= grid.trained_length for tokens in grid.tokens)
    return columns - 0.5 if 0 < columns < len(grid.tokens) else None
