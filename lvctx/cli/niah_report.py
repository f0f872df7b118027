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
    """A table for text and one for video: a row a run, a column a length; the mean with its 95 % interval."""
    from rich.console import Console
    from rich.table import Table

    from lvctx.bench.grid import wilson

    for modality in ("text", "video"):
        chosen = [grid for grid in grids if grid.modality == modality]
        if not chosen:
            continue
        tokens = {n: t for grid in chosen for n, t in zip(grid.lengths, grid.tokens, strict=True)}
        guessing = f", {chosen[0].guessing}" if chosen[0].guessing else ""
        title = f"{modality}: share of needles found by {chosen[0].unit}{guessing}; [] 95 % interval"
        table = Table(title=title.replace("[]", r"\[]"), title_justify="left")
        table.add_column("run")
        for n in sorted(tokens):
            table.add_column(f"{n:,}" if modality == "text" else f"{n:,}\n({tokens[n]:,} tokens)", justify="right")
        table.add_column("mean", justify="right")
        table.add_column(f"effective\nat {threshold:g}", justify="right")
        for grid in chosen:
            by = {n: grid.by_length(i) for i, n in enumerate(grid.lengths)}
            interval = wilson(*grid.total)
            shown = "" if interval is None else rf" \[{interval[0]:.2f}, {interval[1]:.2f}]"
            i = grid.effective(threshold)
            least = "≥ " if i == len(grid.lengths) - 1 else ""
            effective = f"< {grid.lengths[0]:,}" if i is None else f"{least}{grid.lengths[i]:,}"
            table.add_row(
                grid.name, *(_share(by.get(n)) for n in sorted(tokens)), f"{_share(grid.mean)}{shown}", effective
            )
        Console(stderr=stderr).print(table)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
