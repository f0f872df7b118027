"""`lvctx vqa`: encoded videos and questions in, answers out."""

import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvctx.cli.common import (
    VIDEO,
    QuietOption,
    RecipeOption,
    VerboseOption,
    emit,
    examples,
    is_rank_zero,
    progress,
    say,
)
from lvctx.errors import EXIT_SAMPLES_FAILED, InputError, UsageError

if TYPE_CHECKING:
    from lvctx.stages.vqa import Answer

QwenOptions = "Video files with Qwen-VL models"


class HybridMode(StrEnum):
    """How hybrid resolution meets models that merge two frames."""

    pair = "pair"
    image = "image"
    literal = "literal"


class Select(StrEnum):
    """Which frames are of high resolution."""

    group = "group"
    adaptive = "adaptive"


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
    frames: Annotated[
        list[str] | None,
        typer.Argument(metavar="FRAMES...", help="Frames artifacts, or videos for a Qwen-VL model; - reads lines."),
    ] = None,
    ask: Annotated[list[str] | None, typer.Option(help="A question; repeat for more.")] = None,
    chat: Annotated[
        bool, typer.Option(help="One conversation: questions of --ask, then lines of stdin, each seeing those before.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 64,
    fps: Annotated[
        float, typer.Option(help="Frames a second of a video file.", min=0.001, rich_help_panel=QwenOptions)
    ] = 2.0,
    max_frames: Annotated[
        int, typer.Option(help="This many evenly spread where --fps gives more.", min=1, rich_help_panel=QwenOptions)
    ] = 768,
    hybrid: Annotated[
        str,
        typer.Option(
            metavar="L,M,S", help="Of every L frames one of M tokens, the others of M/S.", rich_help_panel=QwenOptions
        ),
    ] = "1,240,1",
    hybrid_mode: Annotated[
        HybridMode, typer.Option(help="Groups of merged pairs, of images, or of frames.", rich_help_panel=QwenOptions)
    ] = HybridMode.pair,
    select: Annotated[
        Select, typer.Option(help="adaptive: M tokens where the picture has changed.", rich_help_panel=QwenOptions)
    ] = Select.group,
    change: Annotated[
        float, typer.Option(help="adaptive: how much is a change, 0 to 1.", rich_help_panel=QwenOptions)
    ] = 0.1,
    cp: Annotated[
        int,
        typer.Option(
            help="Processes that read together, each with a part of the KV cache and all weights (torchrun).",
            min=1,
        ),
    ] = 1,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda.")] = "cpu",
    recipe: RecipeOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer questions about encoded videos. One JSON line an answer; what came in on a line goes out with it."""
    from lvctx.artifacts import schemas
    from lvctx.artifacts.stream import read_references
    from lvctx.stages.qwen_watch import open_watcher, viewing
    from lvctx.stages.vqa import LONG_PATIENCE, open_world

    named = frames or ["-"]
    if "-" in named and len(named) > 1:
        raise UsageError("- stands alone", fix="give frames artifacts or -")
    if named == ["-"] and sys.stdin.isatty():
        raise UsageError("no frames artifact", fix="name one, or pipe from lvctx encode-video")
    if not ask and not chat:
        raise UsageError("no question", fix="give --ask or --chat")
    if chat and (named == ["-"] or len(named) > 1):
        raise UsageError("--chat is about one frames artifact", fix="name it; stdin is for questions")
    threshold = change if select == Select.adaptive else None
    seen = viewing(fps=fps, max_frames=max_frames, hybrid=hybrid, mode=hybrid_mode.value, threshold=threshold)
    opened = open_world(device=device, cp=cp, patience=LONG_PATIENCE)
    with opened as world:
        if world.dp > 1:
            raise UsageError(f"{world.size} processes for one video", fix=f"--cp {world.size}, or no torchrun")
        watcher = open_watcher(
            model, viewing=seen, device=world.device, ring=world.ring, tell=lambda line: say(f"lvctx: {line}")
        )
        if chat:
            for answer in watcher.chat(
                Path(named[0]), world.follow(_questions(ask or [])), max_new_tokens=max_new_tokens, tell=_stream(quiet)
            ):
                emit({"schema": schemas.ANSWER, "path": named[0], **_row(answer)})
            return
        piped = named == ["-"]
        references = read_references(sys.stdin) if piped else ((Path(name), {}) for name in named)
        failed = 0
        with progress("vqa", quiet=quiet) as report:
            for done, (path, row) in enumerate(world.follow(references), start=1):
                passed = {k: v for k, v in row.items() if k not in ("schema", "sha256")} | {"path": str(path)}
                try:
                    if "error" in row:
                        raise InputError(str(row["error"]))
                    for answer in watcher.ask(path, ask or [], max_new_tokens=max_new_tokens):
                        emit({"schema": schemas.ANSWER, **passed, **_row(answer)})
                except InputError as e:
                    if len(named) == 1 and not piped:
                        raise
                    failed += 1
                    say(f"lvctx: {e}")
                    emit({"schema": schemas.ANSWER, **passed, "error": str(e)})
                report(done, done if piped else len(named), path.name)
    if failed:
        raise typer.Exit(EXIT_SAMPLES_FAILED)


def _row(answer: "Answer") -> dict[str, Any]:
    return {
        "frames": answer.frames,
        "seconds": answer.seconds,
        "question": answer.question,
        "answer": answer.text,
        "tokens": answer.tokens,
    }


def _questions(first: list[str]) -> Iterator[str]:
    """Those of --ask, then one a line of stdin, with a prompt where a human types them."""
    yield from first
    human = sys.stdin.isatty()
    while True:
        if human:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _stream(quiet: bool) -> Callable[[str], None]:
    """Shows an answer on a terminal's stderr as it grows."""
    if quiet or not sys.stderr.isatty() or not is_rank_zero():
        return lambda text: None

    def show(text: str) -> None:
        print(f"\r\033[K{text.splitlines()[-1] if text else ''}", end="", file=sys.stderr, flush=True)

    return show
