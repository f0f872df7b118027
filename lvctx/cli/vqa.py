"""`lvctx vqa`: encoded videos and questions in, answers out."""

import json
import sys
from collections import deque
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvctx.cli.common import (
    VIDEO,
    AllowPartialOption,
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
    from lvctx.stages.vqa import Answer, DeviceMap

QwenOptions = "Video files with Qwen-VL models"
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        metavar="MAP",
        help="Spread the model over devices by accelerate: auto, balanced, sequential, or a JSON file of devices.",
    ),
]


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
        typer.Argument(
            metavar="FRAMES...",
            help="Frames artifacts, or videos for a Qwen-VL model; - reads lines, which may hold a `question`.",
        ),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(help="A question; repeat for more. - reads lines: text, or JSON objects with a `question`."),
    ] = None,
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
    allow_partial: AllowPartialOption = False,
    cp: Annotated[
        int,
        typer.Option(
            help="Processes that read together, each with a part of the KV cache and all weights (torchrun).",
            min=1,
        ),
    ] = 1,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda.")] = "cpu",
    device_map: DeviceMapOption = None,
    recipe: RecipeOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer questions about encoded videos. One JSON line an answer; what came in on a line goes out with it."""
    from lvctx.artifacts import schemas
    from lvctx.artifacts.stream import read_references
    from lvctx.stages.qwen_watch import open_watcher, viewing
    from lvctx.stages.vqa import SHARED_WORK_TIMEOUT, open_context

    named, asked = frames or ["-"], ask or []
    listens = chat or "-" in asked
    if "-" in named and len(named) > 1:
        raise UsageError("- stands alone", fix="give frames artifacts or -")
    if named == ["-"] and sys.stdin.isatty():
        raise UsageError("no frames artifact", fix="name one, or pipe from lvctx encode-video")
    if not asked and not chat and named != ["-"]:
        raise UsageError("no question", fix="give --ask or --chat")
    if listens and (named == ["-"] or len(named) > 1):
        raise UsageError("--chat and --ask - are about one frames artifact", fix="name it; stdin is for questions")
    if device_map is not None and cp > 1:
        raise UsageError("--device-map is for one process", fix="drop --cp")
    threshold = change if select == Select.adaptive else None
    seen = viewing(
        fps=fps,
        max_frames=max_frames,
        hybrid=hybrid,
        mode=hybrid_mode.value,
        threshold=threshold,
        allow_partial=allow_partial,
    )
    opened = open_context(device=device, cp=cp, timeout=SHARED_WORK_TIMEOUT)
    with opened as world:
        if world.dp > 1:
            raise UsageError(f"{world.size} processes for one video", fix=f"--cp {world.size}, or no torchrun")
        watcher = open_watcher(
            model,
            viewing=seen,
            device=world.device,
            ring=world.ring,
            device_map=parse_device_map(device_map),
            tell=lambda line: say(f"lvctx: {line}"),
        )
        piped = named == ["-"]
        ticker = Ticker(live=not quiet and len(named) == 1 and not piped and sys.stderr.isatty() and is_rank_zero())
        if listens:
            rows: deque[dict[str, Any]] = deque()

            def questions() -> Iterator[str]:
                for question, row in world.follow(_questions(asked, chat)):
                    rows.append(row)
                    yield question

            converse = watcher.chat if chat else watcher.ask
            for answer in converse(Path(named[0]), questions(), max_new_tokens=max_new_tokens, tell=ticker.show):
                ticker.end()
                emit({"schema": schemas.ANSWER, **rows.popleft(), "path": named[0], **_row(answer)})
            return
        references = read_references(sys.stdin) if piped else ((Path(name), {}) for name in named)
        failed = 0
        with progress("vqa", quiet=quiet or ticker.live) as report:
            for done, (path, row) in enumerate(world.follow(references), start=1):
                passed = {k: v for k, v in row.items() if k not in ("schema", "sha256")} | {"path": str(path)}
                try:
                    if "error" in row:
                        raise InputError(str(row["error"]))
                    own = asked or ([str(row["question"])] if row.get("question") else [])
                    if not own:
                        raise InputError("no question", where=path, fix="give --ask, or a `question` on its line")
                    for answer in watcher.ask(path, own, max_new_tokens=max_new_tokens, tell=ticker.show):
                        ticker.end()
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


def parse_device_map(text: str | None) -> "DeviceMap | None":
    """What --device-map says. Raises UsageError for a word that accelerate does not know and no file, InputError."""
    if text is None or text in ("auto", "balanced", "balanced_low_0", "sequential"):
        return text
    if not Path(text).is_file():
        raise UsageError(
            f"--device-map {text!r} is no file", fix="give auto, balanced, sequential or a JSON file of module: device"
        )
    try:
        found = json.loads(Path(text).read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"malformed JSON ({e})", where=text) from e
    if not isinstance(found, dict):
        raise InputError("not an object of modules and their devices", where=text)
    return found


def _row(answer: "Answer") -> dict[str, Any]:
    return {
        "frames": len(answer.pts),
        "seconds": [answer.pts[0], answer.pts[-1]],
        "pts": answer.pts,
        "question": answer.question,
        "answer": answer.text,
        "tokens": answer.tokens,
        **({"partial": True} if answer.partial else {}),
    }


def _questions(asked: list[str], chat: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those of --ask, a - among them standing for stdin's lines; a chat goes on with stdin's. With the line's row."""
    for question in [*asked, *(["-"] if chat and "-" not in asked else [])]:
        if question == "-":
            yield from _lines()
        else:
            yield question, {}


def _lines() -> Iterator[tuple[str, dict[str, Any]]]:
    """Questions on stdin's lines, text or JSON objects, with a prompt where a human types them."""
    human, number = sys.stdin.isatty(), 0
    while True:
        if human:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        number += 1
        if not line:
            return
        text = line.strip()
        if not text.startswith("{"):
            if text:
                yield text, {}
            continue
        try:
            row = json.loads(text)
            yield str(row["question"]), {k: v for k, v in row.items() if k != "schema"}
        except (ValueError, KeyError):
            raise InputError("no JSON object with a `question`", where=f"stdin:{number}") from None


class Ticker:
    """Shows an answer on a terminal's stderr as it grows."""

    def __init__(self, *, live: bool) -> None:
        self.live, self._shown = live, ""

    def show(self, text: str) -> None:
        """The answer so far."""
        text = text.rstrip("\ufffd")  # the rest of a character is yet to come
        if not self.live:
            return
        new = text.removeprefix(self._shown) if text.startswith(self._shown) else f"\n{text}"
        print(new, end="", file=sys.stderr, flush=True)
        self._shown = text

    def end(self) -> None:
        """The answer is whole."""
        if self._shown:
            print(file=sys.stderr, flush=True)
        self._shown = ""
