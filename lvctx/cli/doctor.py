"""`lvctx doctor`: whether context parallelism is exact with this model on this machine."""

from dataclasses import asdict
from typing import Annotated

import typer

from lvctx.cli.common import TOOLS, SeedOption, VerboseOption, emit, examples, say


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "doctor",
        rich_help_panel=TOOLS,
        epilog=examples(
            "lvctx doctor --model lm --cp 2 --length 101",
            "lvctx doctor --model lm --cp 1 --length 64",
        ),
    )(doctor)


def doctor(
    model: Annotated[str, typer.Option(help="Language model: directory or hub id.")],
    cp: Annotated[int, typer.Option(help="Processes that share a row, as in extend-lm.", min=1)] = 2,
    length: Annotated[int, typer.Option(help="Tokens of the row it is tried on.", min=8)] = 501,
    device: Annotated[str, typer.Option(help="Under torchrun: cpu, cuda.")] = "cpu",
    seed: SeedOption = 0,
    verbose: VerboseOption = False,
) -> None:
    """Check that CP processes give the loss and gradients of one, in float32, on your model and machine.

    Alone it starts the processes itself, on the CPU; under torchrun it tries the machine that extend-lm would use.
    """
    from lvctx.errors import InputError
    from lvctx.stages.doctor import TOLERANCE, diagnose

    found = diagnose(model=model, cp=cp, length=length, device=device, seed=seed)
    for f in found:
        emit({"model": model, "cp": cp, "length": length, "exact": f.exact, **asdict(f)})
        how = "documents apart" if f.doc_mask else "whole row"
        say(f"{how}: loss off by {f.loss:.1e}, gradients by at most {f.gradient:.1e} ({f.parameter})")
    if not all(f.exact for f in found):
        raise InputError(
            f"{cp} processes do not give what one does (allowed {TOLERANCE:.0e})",
            where=model,
            fix="please report it with the lines above",
        )
