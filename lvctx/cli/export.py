"""`lvctx export`: a model of ours in, a directory that others' programs expect out."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lvctx.cli.common import (
    PIPELINE,
    ForceOption,
    QuietOption,
    RecipeOption,
    Resume,
    ResumeOption,
    VerboseOption,
    emit,
    examples,
    progress,
)


class FormatChoice(StrEnum):
    """Whose format."""

    hf = "hf"
    llava = "llava"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "export",
        rich_help_panel=PIPELINE,
        epilog=examples("lvctx export vlm --to hf -o vlm-hf", "lvctx export vlm --to llava -o vlm-llava"),
    )(export)


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub id.")],
    to: Annotated[
        FormatChoice,
        typer.Option(
            help="hf: stock files alone, weights linked. llava: as LongVA was released (VLMs with a CLIP tower)."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write.")],
    recipe: RecipeOption = None,
    resume: ResumeOption = Resume.auto,
    force: ForceOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write a model as other programs expect it; import-longva reads --to llava back, bit for bit."""
    from lvctx.stages.export import export_model

    with progress("export", quiet=quiet) as report:
        row = export_model(model, to.value, out, resume=resume, force=force, report=report)
    emit(row)
