"""`lvctx niah`: needles in a haystack of text or video, and `lvctx niah report`: their heatmaps and tables."""

from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import Annotated

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
    progress,
)
from lvctx.cli.niah_report import ThresholdOption, print_tables, report
from lvctx.errors import EXIT_SAMPLES_FAILED, UsageError


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
    threshold: ThresholdOption = 0.9,
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
    depths_wanted, lengths_wanted = _numbers("--depths", depths), _numbers("--lengths", lengths)
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
            plan, out, device=device, chunk=chunk, reuse=reuse, resume=resume.value, force=force, report=tell, threshold=threshold
        ):
            failed += "error" in row
            emit(row)
    if not quiet:
        print_tables([read_grid(out)], threshold=threshold, stderr=True)
    if failed:
        raise typer.Exit(EXIT_SAMPLES_FAILED)


def _numbers(flag: str, text: str) -> list[float]:
    try:
        numbers = sorted({float(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not all(isfinite(n) for n in numbers):
        raise UsageError(f"{flag} {text!r}: comma-separated numbers are wanted")
    return numbers
