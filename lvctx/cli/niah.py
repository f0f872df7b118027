"""`lvctx niah`: needles in a haystack of text or video, and `lvctx niah report`: their heatmaps and tables."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lvctx.cli.common import (
    VIDEO,
    DryRunOption,
    ForceOption,
    QuietOption,
    RecipeOption,
    Resume,
    ResumeOption,
    SeedOption,
    VerboseOption,
    emit,
    examples,
    numbers,
    progress,
)
from lvctx.errors import EXIT_SAMPLES_FAILED, UsageError

if TYPE_CHECKING:
    from lvctx.bench.grid import Grid


class Modality(StrEnum):
    """What the haystack is made of."""

    text = "text"
    video = "video"


class Scoring(StrEnum):
    """How an answer is judged."""

    forced = "forced"
    generate = "generate"
    both = "both"


def register(app: typer.Typer) -> None:
    """Add the command and its `report` to the program."""
    group = typer.Typer(invoke_without_command=True)
    group.callback()(niah)
    group.command(
        "report", epilog=examples("lvctx niah report niah", "lvctx niah report niah niah -o both.png --json")
    )(report)
    app.add_typer(
        group,
        name="niah",
        rich_help_panel=VIDEO,
        epilog=examples(
            "lvctx niah --model lm --modality text --haystack essays --lengths 256 --depths 0,1 --trials 1 -o needles",
            "lvctx niah report niah -o heatmap.png",
        ),
    )


def niah(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Option(help="Language model or VLM: directory or hub id.")] = None,
    modality: Annotated[Modality, typer.Option(help="Haystack of text or of video frames.")] = Modality.video,
    haystack: Annotated[list[Path] | None, typer.Option(help="Text: files or folders; repeat for more.")] = None,
    frames: Annotated[list[Path] | None, typer.Option(help="Video: frames artifacts, one after the other.")] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens in all (text) or haystack frames (video), comma-separated.")
    ] = "",
    depths: Annotated[
        str, typer.Option(help="Where the needle goes, 0 to 1, comma-separated.")
    ] = "0,0.2,0.4,0.6,0.8,1",
    trials: Annotated[int, typer.Option(help="Needles a cell.", min=1)] = 5,
    distractors: Annotated[int, typer.Option(help="Text: look-alike needles in the haystack.", min=0, max=20)] = 0,
    needles: Annotated[str, typer.Option(help="Video: drawn, or a folder with images and one .jsonl.")] = "drawn",
    score: Annotated[Scoring, typer.Option(help="Teacher forcing, greedy generation, or both.")] = Scoring.forced,
    training_length: Annotated[
        int | None, typer.Option(help="Tokens the LM was trained on (the heatmap's line). Default: as it says.", min=1)
    ] = None,
    chunk: Annotated[int, typer.Option(help="Tokens of one forward (memory).", min=1)] = 2048,
    reuse: Annotated[bool, typer.Option(help="Compute what cells share once.")] = True,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Results directory.")] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda.")] = "cpu",
    recipe: RecipeOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = Resume.auto,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Hide a needle at every depth of ever longer haystacks, and ask for it. One JSON line a cell."""
    if ctx.invoked_subcommand is not None:
        return
    if model is None or out is None or not lengths:
        raise UsageError("--model, --lengths and -o are needed", fix="see lvctx niah --help")
    hay = haystack if modality is Modality.text else frames
    if not hay:
        raise UsageError(
            "--haystack is needed for text" if modality is Modality.text else "--frames is needed for video"
        )
    depths_wanted, lengths_wanted = numbers("--depths", depths), numbers("--lengths", lengths)
    if any(n != int(n) for n in lengths_wanted):
        raise UsageError(f"--lengths {lengths!r}: whole numbers are wanted")

    from lvctx.bench.grid import read_grid
    from lvctx.stages.niah import NiahConfig, plan_niah, run_niah

    plan = plan_niah(
        NiahConfig(
            model=model,
            modality=modality.value,
            haystack=tuple(hay),
            lengths=tuple(int(n) for n in lengths_wanted),
            depths=tuple(depths_wanted),
            trials=trials,
            distractors=distractors,
            needles=needles,
            scoring=score.value,
            training_length=training_length,
            seed=seed,
        )
    )
    if dry_run:
        emit({"dry_run": True, "path": str(out), **plan.shown, **plan.facts()})
        return
    failed = 0
    with progress(f"niah {modality.value}", quiet=quiet) as tell:
        for row in run_niah(
            plan, out, device=device, chunk=chunk, reuse=reuse, resume=resume.value, force=force, report=tell
        ):
            failed += "error" in row
            emit(row)
    if not quiet:
        _print_tables([read_grid(out)], stderr=True)
    if failed:
        raise typer.Exit(EXIT_SAMPLES_FAILED)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Results directories of niah.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Heatmaps side by side: .png or .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line a run instead of a table.")] = False,
) -> None:
    """Tabulate accuracy by length and draw runs side by side on one scale; without -o, rebuild each run's own files.

    Needs the results only, no model.
    """
    from lvctx.bench.grid import read_grid
    from lvctx.bench.heatmap import draw_heatmaps, write_report

    if out is not None and out.suffix not in (".png", ".svg"):
        raise UsageError(f"-o {out}: .png or .svg is wanted")
    grids = [read_grid(run) for run in runs]
    if out is not None:
        draw_heatmaps(grids, out)
    else:
        for run, grid in zip(runs, grids, strict=True):
            write_report(run, grid)
    if as_json:
        for grid in grids:
            emit(grid.to_dict())
    else:
        _print_tables(grids, stderr=False)


def _print_tables(grids: "list[Grid]", *, stderr: bool) -> None:
    """A table for text and one for video: a row a run, a column a length."""
    from rich.console import Console
    from rich.table import Table

    for modality in ("text", "video"):
        chosen = [grid for grid in grids if grid.modality == modality]
        if not chosen:
            continue
        tokens = {n: t for grid in chosen for n, t in zip(grid.lengths, grid.tokens, strict=True)}
        guessing = f", {chosen[0].guessing}" if chosen[0].guessing else ""
        table = Table(title=f"{modality}: share of needles found by {chosen[0].unit}{guessing}", title_justify="left")
        table.add_column("run")
        for n in sorted(tokens):
            table.add_column(f"{n:,}" if modality == "text" else f"{n:,}\n({tokens[n]:,} tokens)", justify="right")
        table.add_column("mean", justify="right")
        for grid in chosen:
            by = {n: grid.by_length(i) for i, n in enumerate(grid.lengths)}
            table.add_row(grid.name, *(_share(by.get(n)) for n in sorted(tokens)), _share(grid.mean))
        Console(stderr=stderr).print(table)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
