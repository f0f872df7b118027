"""Accuracy as a picture: by duration for one file or several, and by number of frames where files differ in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvctx.artifacts.store import atomic_file


def draw_accuracy(scores: Sequence[dict[str, Any]], frames: Sequence[int] | None, rule: str, target: Path) -> None:
    """Draw scores (see `videomme.score`) under a rule to a .png or .svg, with 95% intervals.

    With `frames`, one number for each score, durations become lines over the number of frames; else bars side by side.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [*scores[0]["by_duration"], "all"]
    groups = [
        {**{d: s["by_duration"].get(d, {}).get(rule) for d in parts[:-1]}, "all": s["rules"][rule]} for s in scores
    ]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    series = (
        [(part, list(frames), [g[part] for g in groups]) for part in parts]
        if frames
        else [
            (s["file"], [i + (k + 0.5) / (len(scores) + 1) - 0.5 for i in range(len(parts))], [g[p] for p in parts])
            for k, (s, g) in enumerate(zip(scores, groups, strict=True))
        ]
    )
    for name, places, estimates in series:
        shown = sorted(
            ((x, e) for x, e in zip(places, estimates, strict=True) if e and e["mean"] is not None), key=lambda p: p[0]
        )
        xs, means = [x for x, _ in shown], [100 * e["mean"] for _, e in shown]
        reach = [
            [100 * abs(e["mean"] - (e[end] if e[end] is not None else e["mean"])) for _, e in shown]
            for end in ("low", "high")
        ]
        if frames:
            ax.errorbar(xs, means, yerr=reach, marker="o", markersize=4, capsize=2, linewidth=1.4, label=name)
        else:
            ax.bar(xs, means, width=0.9 / (len(scores) + 1), yerr=reach, capsize=2, label=name, align="edge")
    if frames:
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(set(frames)), [str(n) for n in sorted(set(frames))])
        ax.set_xlabel("frames", fontsize=8)
    else:
        ax.set_xticks(range(len(parts)), parts)
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
