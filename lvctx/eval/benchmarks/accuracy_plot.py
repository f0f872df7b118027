"""A plot of accuracy: by duration for one or several files, or by number of frames if the files differ in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lvctx.artifacts.store import atomic_file

WHOLE = "all"
"""The group of all questions, beside the durations."""


class Point(NamedTuple):
    """One bar, or one point of a line; in %."""

    x: float
    """Number of frames, or index of the group of bars."""
    mean: float
    low: float
    high: float


def duration_groups(scores: Sequence[dict[str, Any]]) -> list[str]:
    """The durations in the scores, and the group of all questions."""
    return [*dict.fromkeys(part for score in scores for part in score["by_duration"]), WHOLE]


def accuracy_series(
    scores: Sequence[dict[str, Any]], frames: Sequence[int] | None, rule: str
) -> dict[str, list[Point]]:
    """The series of `draw_accuracy` by their legend names.

    With `frames` a line per duration over the number of frames, ascending; else bars per file over the durations.
    Missing accuracies are left out; an unknown end of an interval is the mean.
    """
    parts = duration_groups(scores)
    series: dict[str, list[Point]] = {part: [] for part in parts} if frames else {s["file"]: [] for s in scores}
    for number, score in enumerate(scores):
        for position, part in enumerate(parts):
            of_rules = score["rules"] if part == WHOLE else score["by_duration"].get(part, {})
            e = of_rules.get(rule, {"mean": None})
            if e["mean"] is not None:
                ends = (e["mean"] if e[end] is None else e[end] for end in ("low", "high"))
                values = [100 * value for value in (e["mean"], *ends)]
                series[part if frames else score["file"]].append(Point(frames[number] if frames else position, *values))
    return {name: sorted(points) for name, points in series.items()}


def _verbatim(name: str) -> str:
    """Escape dollar signs in a name, which matplotlib would read as a formula."""
    return name.replace("$", r"\$")


def draw_accuracy(scores: Sequence[dict[str, Any]], frames: Sequence[int] | None, rule: str, target: Path) -> None:
    """Draw scores (see `videomme.score`) under a rule to a .png or .svg, with 95% intervals.

    With `frames`, one number for each score, durations are lines over the number of frames; else bars side by side.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    width = 0.9 / (len(scores) + 1)
    series = accuracy_series(scores, frames, rule)
    for number, (name, points) in enumerate(series.items()):
        xs, means = [p.x for p in points], [p.mean for p in points]
        errors = [[p.mean - p.low for p in points], [p.high - p.mean for p in points]]
        if frames:
            # Shifted slightly, so that no interval hides another.
            xs = [x * 1.03 ** (number - (len(series) - 1) / 2) for x in xs]
            ax.errorbar(
                xs, means, yerr=errors, marker="o", markersize=4, capsize=2, linewidth=1.4, label=_verbatim(name)
            )
        else:
            bar_xs = [x + (number + 0.5) / (len(scores) + 1) - 0.5 for x in xs]
            ax.bar(bar_xs, means, width=width, yerr=errors, capsize=2, label=_verbatim(name), align="edge")
    if frames:
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(set(frames)), [str(n) for n in sorted(set(frames))])
        ax.set_xlabel("frames", fontsize=8)
    else:
        ax.set_xticks(range(len(duration_groups(scores))), list(map(_verbatim, duration_groups(scores))))
    ax.axhline(25, color="grey", linewidth=0.8, linestyle=":")
    ax.set_ylabel("accuracy, %", fontsize=8)
    ax.set_ylim(0, 100)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(f"Video-MME, {rule} rule, 95% intervals clustered by video; dotted: chance", fontsize=8, loc="left")
    ax.legend(fontsize=7, frameon=False)
    with atomic_file(target) as partial, rc_context({"svg.hashsalt": "lvctx"}):
        metadata = {"Date": None} if target.suffix == ".svg" else {"Software": None}
        figure.savefig(partial, format=target.suffix[1:], metadata=metadata)
