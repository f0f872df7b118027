"""`lvctx vqa`: encoded videos and questions in, answers out."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lvctx.cli.common import VIDEO, QuietOption, RecipeOption, VerboseOption, emit, examples, progress, say
from lvctx.errors import EXIT_SAMPLES_FAILED, InputError, UsageError


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "vqa",
        rich_help_panel=VIDEO,
        epilog=examples(
            'lvctx vqa frames/bikes.frames.safetensors --model vlm --ask "What is on the road?"',
            'lvctx encode-video clips/bikes.mp4 --frames 8 --model vlm | lvctx vqa --model vlm --ask "What is it?"',
        ),
    )(vqa)


def vqa(
    model: Annotated[str, typer.Option(help="VLM: directory or hub id.")],
    ask: Annotated[list[str], typer.Option(help="A question; repeat for more.")],
    frames: Annotated[
        list[str] | None, typer.Argument(metavar="FRAMES...", help="Frames artifacts; - reads paths or JSON lines.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 64,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda.")] = "cpu",
    recipe: RecipeOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer questions about encoded videos. One JSON line an answer; what came in on a line goes out with it."""
    from lvctx.artifacts import schemas
    from lvctx.artifacts.stream import read_references
    from lvctx.stages.vqa import Watcher

    named = frames or ["-"]
    if "-" in named and len(named) > 1:
        raise UsageError("- stands alone", fix="give frames artifacts or -")
    if named == ["-"] and sys.stdin.isatty():
        raise UsageError("no frames artifact", fix="name one, or pipe from lvctx encode-video")
    watcher = Watcher(model, device=device)
    piped = named == ["-"]
    references = read_references(sys.stdin) if piped else ((Path(name), {}) for name in named)
    failed = 0
    with progress("vqa", quiet=quiet) as report:
        for done, (path, row) in enumerate(references, start=1):
            passed = {k: v for k, v in row.items() if k not in ("schema", "sha256")} | {"path": str(path)}
            try:
                if "error" in row:
                    raise InputError(str(row["error"]))
                for question, answer in zip(ask, watcher.ask(path, ask, max_new_tokens=max_new_tokens), strict=True):
                    said = {"question": question, "answer": answer.text, "tokens": answer.tokens}
                    emit({"schema": schemas.ANSWER, **passed, "frames": answer.frames, **said})
            except InputError as e:
                if len(named) == 1 and not piped:
                    raise
                failed += 1
                say(f"lvctx: {e}")
                emit({"schema": schemas.ANSWER, **passed, "error": str(e)})
            report(done, done if piped else len(named), path.name)
    if failed:
        raise typer.Exit(EXIT_SAMPLES_FAILED)
