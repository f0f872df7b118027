"""`lvctx encode-video` and `lvctx vqa`."""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvctx.artifacts import schemas
from lvctx.cli.options import OutputOptions, RunOptions, command
from lvctx.cli.output import emit, is_quiet, is_rank_zero, progress, say, wants_json
from lvctx.config import Flag
from lvctx.device import Dtype
from lvctx.errors import EXIT_SAMPLES_FAILED, InputError, LvctxError, UsageError
from lvctx.inference.engine_config import EngineConfig
from lvctx.video.sampling import VideoSampling

if TYPE_CHECKING:
    from lvctx.inference.vqa import Answer, VideoQuestions
    from lvctx.parallel.context import ParallelContext
    from lvctx.vlm.video_encoder import VideoEncoder

Row = dict[str, Any]
FEATURE_CACHE = Path("~/.cache/lvctx/features")
"""Where vqa keeps features of videos by default."""


@dataclass(frozen=True, kw_only=True)
class EncodeVideoConfig:
    """What to encode, and with what."""

    videos: Annotated[tuple[str, ...], Flag(argument=True, metavar="VIDEO...")]
    """Video files; - reads them from stdin."""
    model: str | None = None
    """VLM whose vision tower is used: directory or hub id."""
    tower: str | None = None
    """Or a CLIP or SigLIP vision tower alone: directory or hub id."""
    out: Annotated[Path, Flag(names=("-o", "--out"))] = Path("frames")
    """Directory of the feature caches."""
    jobs: Annotated[int, Flag(min=1)] = 1
    """Videos decoded at the same time."""
    batch: Annotated[int, Flag(min=1)] = 64
    """Frames per forward pass of the vision tower."""
    dtype: Dtype = "auto"
    """Data type of the computation. auto is bfloat16 where the device is fast with it."""
    device: str = "auto"
    """Device: cpu, cuda or mps. auto takes the first GPU, else the CPU."""


@command(
    "encode-video",
    "lvctx encode-video clips/bikes.mp4 --model vlm --fps 2 -o frames-2fps",
    "ls clips/*.mp4 | lvctx encode-video - --model vlm --frames 4 -o frames-4",
)
def encode_video(config: EncodeVideoConfig, sampling: VideoSampling, run: RunOptions) -> None:
    """Sample videos and store the vision tower's features of their frames.

    Writes OUT/NAME.frames.safetensors for each video. A video that cannot be read is an error row; the others go on.
    Under torchrun the processes share the videos, and the rows come at the end.
    """
    if (config.model is None) == (config.tower is None):
        raise UsageError("give either --model or --tower")
    from lvctx.parallel.context import SHARED_WORK_TIMEOUT, open_context
    from lvctx.vlm.video_encoder import VideoEncoder

    done = 0
    failures: list[LvctxError] = []
    opened = open_context(device=config.device, cp=1, timeout=SHARED_WORK_TIMEOUT)
    with opened as parallel, progress("encode-video", "finding the vision tower") as on_progress:
        encoder = VideoEncoder.open(
            str(config.model or config.tower),
            sampling,
            batch=config.batch,
            dtype=config.dtype,
            device=parallel.device,
        )

        def encode(share: Iterator[tuple[Path, Row]]) -> Iterator[Any]:
            if run.dry_run:
                return _describe(encoder, share, config.out)
            report = on_progress if config.jobs == 1 else lambda done, total, note: None
            options = {"resume": run.resume, "force": run.force, "report": report}
            share = _count_tokens(encoder, share) if encoder.hybrid else share
            return encoder.encode_all(share, config.out, jobs=config.jobs, processes=parallel.size, **options)

        for video, row, result in _share_out(_references(config.videos), encode, parallel):
            if isinstance(result, LvctxError):
                say(f"lvctx: {result}")
                emit({**row, "schema": schemas.FRAMES, "path": str(video), "error": str(result)})
                failures.append(result)
            else:
                emit({**row, **result}, None if run.dry_run else _one_line(video, result))
                done += 1
    if failures:
        raise typer.Exit(EXIT_SAMPLES_FAILED if done else failures[0].exit_code)


def _one_line(video: Path, row: Row) -> str:
    damage = f", {row['corrupt_frames']} damaged" if row["corrupt_frames"] else ""
    return f"{video}: {row['frames']:,} frames{damage} -> {row['path']}"


def _share_out(
    videos: Iterator[Any], encode: Callable[[Iterator[Any]], Iterator[Any]], parallel: "ParallelContext"
) -> Iterator[Any]:
    """`encode` over all videos in their order: as they are done, or at the end where several processes share them."""
    if parallel.size == 1:
        yield from encode(videos)
        return
    from lvctx.vlm.video_encoder import share_videos

    # The first process alone reads stdin.
    todo = parallel.gather(list(videos) if parallel.rank == 0 else None)[0]
    mine = parallel.gather(share_videos(todo, parallel.size) if parallel.rank == 0 else None)[0][parallel.rank]
    results = list(zip(mine, encode(todo[i] for i in mine), strict=True))
    for _, result in sorted(chain.from_iterable(parallel.gather(results)), key=itemgetter(0)):
        yield result


def _count_tokens(encoder: "VideoEncoder", videos: Iterator[tuple[Path, Row]]) -> Iterator[tuple[Path, Row]]:
    """The videos, with a line about the tokens of each before it is encoded."""
    for video, row in videos:
        with suppress(LvctxError):  # reported when its turn comes
            frames, exact, tokens = encoder.count(video)
            if tokens:
                shown, nominal, about = tokens["visual_tokens"], tokens["nominal_tokens"], "" if exact else "about "
                what = f"{shown:,} visual tokens (nominal {nominal:,}) and a newline"
                say(f"lvctx: {video}: {about}{frames} frames, {what}")
        yield video, row


def _describe(encoder: "VideoEncoder", videos: Iterator[tuple[Path, Row]], out: Path) -> Iterator[Any]:
    """What would be done with each video: video, row, plan or error."""
    for video, row in videos:
        try:
            plan = encoder.describe(video, out)
            if plan["about"]:
                say(f"lvctx: {video}: about {plan['expected_frames']} frames; only decoding gives the number")
            yield video, row, {"dry_run": True, **plan}
        except LvctxError as e:
            yield video, row, e


def _references(videos: tuple[str, ...]) -> Iterator[tuple[Path, Row]]:
    """The videos with the rows they came in, if any: arguments, and lines of stdin where an argument is `-`."""
    from lvctx.artifacts.stream import read_references

    for video in videos:
        if video == "-":
            for path, row in read_references(sys.stdin):
                yield path, {key: value for key, value in row.items() if key not in ("path", "sha256")}
        else:
            yield Path(video), {}


@dataclass(frozen=True, kw_only=True)
class VqaConfig:
    """What to ask about what."""

    videos: Annotated[tuple[str, ...], Flag(argument=True, metavar="VIDEO...")] = ("-",)
    """Video files or feature caches of encode-video; - reads lines, which may hold a `question`."""
    model: str
    """VLM: directory or hub id."""
    ask: tuple[str, ...] = ()
    """A question; repeat for more. - reads lines: text, or JSON objects with a `question`."""
    chat: bool = False
    """One conversation: the questions of --ask, then lines of stdin, each with those before it."""
    max_new_tokens: Annotated[int, Flag(min=1)] = 64
    """Longest answer, in tokens."""

    def __post_init__(self) -> None:
        if "-" in self.videos and len(self.videos) > 1:
            raise UsageError("- excludes other videos", fix="give videos or -")
        if not self.ask and not self.chat and not self.piped:
            raise UsageError("no question", fix="give --ask or --chat")
        if self.reads_questions and (self.piped or len(self.videos) > 1):
            raise UsageError("--chat and --ask - are about one video", fix="name it; stdin is for questions")

    @property
    def piped(self) -> bool:
        """Whether the videos come from stdin."""
        return self.videos == ("-",)

    @property
    def reads_questions(self) -> bool:
        """Whether questions come from stdin."""
        return self.chat or "-" in self.ask


@command(
    "vqa",
    'lvctx vqa frames/bikes.frames.safetensors --model vlm --ask "What is on the road?"',
    'lvctx encode-video clips/bikes.mp4 --frames 8 --model vlm | lvctx vqa --model vlm --ask "What is it?"',
)
def vqa(config: VqaConfig, sampling: VideoSampling, engine: EngineConfig, output: OutputOptions) -> None:
    """Answer questions about videos.

    A video file is encoded first where the model needs it, and its features are kept in --feature-cache. On a pipe
    there is one JSON line for each answer, and what came in on a line goes out with it.
    """
    if config.piped and sys.stdin.isatty():
        raise UsageError("no video", fix="name one, or pipe from lvctx encode-video")
    from lvctx.parallel.context import SHARED_WORK_TIMEOUT, open_context

    opened = open_context(device=engine.device, cp=engine.cp, timeout=SHARED_WORK_TIMEOUT)
    with opened as parallel:
        if parallel.dp > 1:
            what = f"{parallel.size} processes for one video"
            raise UsageError(what, fix=f"--cp {parallel.size}, or no torchrun")
        printer = StreamPrinter(live=len(config.videos) == 1 and not config.piped and is_rank_zero())
        questions = _open(config, sampling, engine, parallel, printer)
        if config.reads_questions:
            _answer_lines(config, questions, parallel, printer)
            return
        failed = _answer_videos(config, questions, parallel, printer)
    if failed:
        raise typer.Exit(EXIT_SAMPLES_FAILED)


def _open(
    config: VqaConfig,
    sampling: VideoSampling,
    engine: EngineConfig,
    parallel: "ParallelContext",
    printer: "StreamPrinter",
) -> "VideoQuestions":
    from lvctx.inference.transformers_engine import TransformersEngine
    from lvctx.inference.vqa import VideoQuestions
    from lvctx.vlm.registry import open_vlm

    cache = (engine.feature_cache or FEATURE_CACHE).expanduser()
    vlm = open_vlm(config.model, device=parallel.device, feature_cache=cache)
    vlm.resolve(sampling)

    def on_shown(path: Path, shown: Any) -> None:
        if not is_quiet():
            say(f"lvctx: {path}: {_cost(len(shown.pts), shown.facts)}")

    return VideoQuestions(
        TransformersEngine.from_config(vlm, replace(engine, device=parallel.device), ring=parallel.ring),
        sampling,
        max_new_tokens=config.max_new_tokens,
        on_text=printer.show,
        on_shown=on_shown,
    )


def _cost(frames: int, facts: Row) -> str:
    """Frames and tokens of a video; the model's nominal tokens and delimiters where its frames are items in runs."""
    if "runs" not in facts:
        return f"{frames:,} frames, {facts['visual_tokens']:,} visual tokens"
    return (
        f"{frames:,} frames in {facts['runs']:,} runs, {facts['visual_tokens']:,} visual tokens "
        f"(nominal {facts['nominal_tokens']:,}) and {facts['delimiters']:,} delimiters"
    )


def _answer_lines(
    config: VqaConfig, questions: "VideoQuestions", parallel: "ParallelContext", printer: "StreamPrinter"
) -> None:
    """Questions of --ask and of stdin's lines about one video."""
    rows: deque[Row] = deque()

    def texts() -> Iterator[str]:
        for question, row in parallel.follow(_asked(config.ask, config.chat)):
            rows.append(row)
            yield question

    ask = questions.chat if config.chat else questions.ask
    for answer in ask(Path(config.videos[0]), texts()):
        _emit_answer({**rows.popleft(), "path": config.videos[0]}, answer, printer)


def _answer_videos(
    config: VqaConfig, questions: "VideoQuestions", parallel: "ParallelContext", printer: "StreamPrinter"
) -> int:
    """The same questions, or those of stdin's lines, about each video; the number of videos that failed."""
    from lvctx.artifacts.stream import read_references

    references = read_references(sys.stdin) if config.piped else ((Path(name), {}) for name in config.videos)
    failed = 0
    # A bar would be drawn between the words of an answer that grows.
    no_bar = nullcontext(lambda done, total, note: None)
    with no_bar if printer.live else progress("vqa", "loading the model") as on_progress:
        for done, (path, row) in enumerate(parallel.follow(references), start=1):
            passed = {k: v for k, v in row.items() if k not in ("schema", "sha256")} | {"path": str(path)}
            try:
                if "error" in row:
                    raise InputError(str(row["error"]))
                asked = config.ask or ((str(row["question"]),) if row.get("question") else ())
                if not asked:
                    raise InputError("no question", where=path, fix="give --ask, or a `question` on its line")
                for answer in questions.ask(path, asked):
                    _emit_answer(passed, answer, printer)
            except InputError as e:
                if len(config.videos) == 1 and not config.piped:
                    raise
                failed += 1
                say(f"lvctx: {e}")
                emit({"schema": schemas.ANSWER, **passed, "error": str(e)})
            on_progress(done, 0 if config.piped else len(config.videos), path.name)
    return failed


def _emit_answer(row: Row, answer: "Answer", printer: "StreamPrinter") -> None:
    printed = printer.end()
    if printed and not wants_json():
        return
    fields = {
        "frames": len(answer.pts),
        "seconds": [answer.pts[0], answer.pts[-1]],
        "pts": answer.pts,
        "question": answer.question,
        "answer": answer.text,
        "tokens": answer.tokens,
        **({"partial": True} if answer.partial else {}),
    }
    line = answer.text if printer.live else f"{row['path']}: {answer.text}"
    emit({"schema": schemas.ANSWER, **row, **fields}, line)


def _asked(ask: tuple[str, ...], chat: bool) -> Iterator[tuple[str, Row]]:
    """Those of --ask, a - among them for stdin's lines; a chat goes on with stdin's. With the line's row."""
    for question in [*ask, *(["-"] if chat and "-" not in ask else [])]:
        if question == "-":
            yield from _question_lines()
        else:
            yield question, {}


def _question_lines() -> Iterator[tuple[str, Row]]:
    """Questions on stdin's lines, text or JSON objects, with a prompt where a person types them."""
    typed, number = sys.stdin.isatty(), 0
    while True:
        if typed:
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


class StreamPrinter:
    """Prints an answer on a terminal as it grows: on stdout where that is one, else on stderr."""

    def __init__(self, *, live: bool) -> None:
        self.live = live
        self._file = sys.stderr if wants_json() else sys.stdout
        self._prints = live and self._file.isatty() and not (is_quiet() and wants_json())
        self._shown = ""

    def show(self, text: str) -> None:
        """The answer so far."""
        text = text.rstrip("\ufffd")  # the rest of a character is yet to come
        if not self._prints:
            return
        new = text.removeprefix(self._shown) if text.startswith(self._shown) else f"\n{text}"
        print(new, end="", file=self._file, flush=True)
        self._shown = text

    def end(self) -> bool:
        """The answer is complete; whether anything of it was printed."""
        printed = bool(self._shown)
        if printed:
            print(file=self._file, flush=True)
        self._shown = ""
        return printed
