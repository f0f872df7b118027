"""`lvctx import-longva`: a LLaVA checkpoint, as LongVA was released, in; a VLM that stock transformers loads out."""

from pathlib import Path
from typing import Annotated

import typer

from lvctx.cli.common import (
    PIPELINE,
    DryRunOption,
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


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "import-longva",
        rich_help_panel=PIPELINE,
        epilog=examples(
            "lvctx import-longva longva-released -o longva",
            "lvctx import-longva longva-released --context 224000 --dry-run -o longva-224k",
        ),
    )(import_longva)


def import_longva(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="LLaVA checkpoint: directory, or hub id like lmms-lab/LongVA-7B.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the VLM.")],
    tower: Annotated[
        str | None,
        typer.Option(help="CLIP tower: its configuration, and its weights if SRC has none. Default: what SRC names."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Positions the model promises to read. Default: what SRC says.", min=1)
    ] = None,
    recipe: RecipeOption = None,
    resume: ResumeOption = Resume.auto,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Turn a released LongVA checkpoint into a VLM like those that align writes. Every tensor is accounted for."""
    from lvctx.artifacts import schemas
    from lvctx.artifacts.manifest import MANIFEST
    from lvctx.artifacts.store import sha256_file
    from lvctx.stages.import_longva import plan_import, run_import

    plan = plan_import(source=source, tower=tower, context=context)
    if dry_run:
        emit({"dry_run": True, "path": str(out), **plan.facts})
        return
    with progress("import-longva", quiet=quiet) as report:
        run_import(plan, out, resume=resume, force=force, report=report)
    emit({"schema": schemas.MODEL, "path": str(out), "sha256": sha256_file(out / MANIFEST), **plan.facts})
