"""`lvctx niah report`: what needle tests found, as tables, heatmaps and JSON; needs the results only, no model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lvctx.cli.common import emit
from lvctx.errors import UsageError

if TYPE_CHECKING:
    from lvctx.bench.grid import Grid

ThresholdOption = Annotated[
    float, typer.Option(help="Accuracy under which a length is not read: the effective length.", min=0, max=1)
]


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Results directories, or LongVA's all_accuracies.json.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help=".png or .svg: side by side; .json: numbers; all_accuracies.json: LongVA's."),
    ] = None,
    threshold: ThresholdOption = 0.9,
    training_length: Annotated[
        int | None, typer.Option(help="Tokens the model of an all_accuracies.json was trained on (the line).", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line a run instead of a table.")] = False,
) -> None:
    """Tabulate accuracy by length and draw runs side by side on one scale; without -o, rebuild each run's own files."""
    from lvctx.artifacts.store import write_json
    from lvctx.bench.grid import read_grid
    from lvctx.bench.heatmap import draw_heatmaps, write_report
    from lvctx.bench.longva import NAME, read_longva, write_longva

    if out is not None and out.suffix not in (".png", ".svg", ".json"):
        raise UsageError(f"-o {out}: .png, .svg or .json is wanted")
    if out is not None and out.name == NAME and len(runs) > 1:
        raise UsageError(f"-o {out}: LongVA's file holds one run")
    grids = [
        read_longva(run, trained_length=training_length) if run.suffix == ".json" else read_grid(run) for run in runs
    ]
    if out is None:
        for run, grid in zip(runs, grids, strict=True):
            if run.suffix != ".json":
                write_report(run, grid, threshold=threshold)
    elif out.name == NAME:
        write_longva(out, grids[0])
    elif out.suffix == ".json":
        write_json(out, [grid.to_dict(threshold) for grid in grids])
    else:
        draw_heatmaps(grids, out, threshold=threshold)
    if as_json:
        for grid in grids:
            emit(grid.to_dict(threshold))
    else:
        print_tables(grids, threshold=threshold, stderr=False)


def print_tables(grids: "list[Grid]", *, threshold: float, stderr: bool) -> None:
    """A table for text and one for video: a row a length, a column a run, then its mean and its effective length."""
    from rich.console import Console
    from rich.table import Table

    from lvctx.bench.grid import wilson

    for modality in ("text", "video"):
        chosen = [grid for grid in grids if grid.modality == modality]
        if not chosen:
            continue
        tokens = {n: t for grid in chosen for n, t in zip(grid.lengths, grid.tokens, strict=True)}
        guessing = f", {chosen[0].guessing}" if chosen[0].guessing else ""
        title = f"{modality}: share of needles found{guessing}"
        table = Table(title=title, title_justify="left")
        for name in (chosen[0].unit, *(("tokens",) if modality == "video" else ()), *(grid.name for grid in chosen)):
            table.add_column(name, justify="right")
        for n in sorted(tokens):
            found = [_share(g.by_length(g.lengths.index(n)) if n in g.lengths else None) for g in chosen]
            table.add_row(f"{n:,}", *((f"{tokens[n]:,}",) if modality == "video" else ()), *found)
        table.add_section()
        lead = ("",) if modality == "video" else ()
        intervals = [wilson(*grid.total) for grid in chosen]
        table.add_row("mean", *lead, *(_share(grid.mean) for grid in chosen))
        table.add_row("95 %", *lead, *("–" if i is None else f"{i[0]:.2f} to {i[1]:.2f}" for i in intervals))
        table.add_row(f"effective at {threshold:g}", *lead, *(_effective(grid, threshold) for grid in chosen))
        Console(stderr=stderr).print(table)


def _effective(grid: "Grid", threshold: float) -> str:
    i = grid.effective(threshold)
    if i is None:
        return f"< {grid.lengths[0]:,}"
    return f"{'≥ ' if i == len(grid.lengths) - 1 else ''}{grid.lengths[i]:,}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
