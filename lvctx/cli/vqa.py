"""`lvctx vqa`."""

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvctx.artifacts import schemas
from lvctx.artifacts.bounded import parse_json
from lvctx.cli.endpoint import open_endpoint, refuse_unused_options
from lvctx.cli.options import OutputOptions, command, given
from lvctx.cli.output import emit, is_quiet, is_rank_zero, progress, say, wants_json
from lvctx.config import Flag
from lvctx.errors import EXIT_SAMPLES_FAILED, InputError, UsageError
from lvctx.inference.endpoint_config import VideoEndpointConfig
from lvctx.inference.engine_config import EngineConfig
from lvctx.inference.sampling_params import SamplingParams
from lvctx.video.sampling import VideoSampling

if TYPE_CHECKING:
    from lvctx.inference.engine import Engine, Shown
    from lvctx.inference.video_questions import Answer, VideoQuestions
    from lvctx.parallel.context import ParallelContext


@dataclass(frozen=True, kw_only=True)
class VqaConfig:
    """The videos and the questions."""

    videos: Annotated[tuple[str, ...], Flag(argument=True, metavar="VIDEO...")] = ("-",)
    """Video files or feature caches of encode-video; - reads lines from stdin, which may have a `question`."""
    model: str
    """VLM: directory or hub id; with --endpoint its name on the server."""
    ask: tuple[str, ...] = ()
    """A question; repeat for more. - reads lines: text, or JSON objects with a `question`."""
    chat: bool = False
    """One conversation: the questions of --ask, then lines of stdin, each with the previous ones."""

    def __post_init__(self) -> None:
        if "-" in self.videos and len(self.videos) > 1:
            raise UsageError("- cannot be combined with other videos", fix="give either videos or -")
        if not self.ask and not self.chat and not self.piped:
            raise UsageError("no question", fix="give --ask or --chat")
        if self.reads_questions and (self.piped or len(self.videos) > 1):
            raise UsageError("--chat and --ask - need exactly one video", fix="give its path; stdin is for questions")

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
def vqa(
    ctx: typer.Context,
    config: VqaConfig,
    params: SamplingParams,
    sampling: VideoSampling,
    engine: EngineConfig,
    server: VideoEndpointConfig,
    output: OutputOptions,
) -> None:
    """Answer questions about videos.

    A video file is encoded first if the model needs it, and its features are kept in --feature-cache. On a pipe
    there is one JSON line for each answer, with the fields of its input line.
    """
    if config.chat and engine.batch > 1:
        raise UsageError("--batch with --chat: every turn waits for the reply before", fix="drop --batch")
    if config.piped and sys.stdin.isatty():
        raise UsageError("no video", fix="give one, or pipe from lvctx encode-video")
    if server.endpoint is not None:
        refuse_unused_options(given(ctx), server, EngineConfig)
        engine = replace(engine, device="cpu")
    from lvctx.inference.generation_config import resolve_sampling
    from lvctx.inference.video_questions import VideoQuestions
    from lvctx.parallel.context import SHARED_WORK_TIMEOUT, open_context

    params = resolve_sampling(params, config.model, given(ctx))
    opened = open_context(device=engine.device, cp=engine.cp, timeout=SHARED_WORK_TIMEOUT)
    with opened as parallel:
        if parallel.dp > 1:
            what = f"{parallel.size} processes for one video"
            raise UsageError(what, fix=f"--cp {parallel.size}, or no torchrun")
        live = len(config.videos) == 1 and not config.piped and is_rank_zero() and engine.batch == 1
        printer = StreamPrinter(live=live)
        model = _open_engine(config, sampling, engine, server, parallel, given(ctx))
        questions = VideoQuestions(model, sampling, params=params, on_text=printer.show, on_shown=_print_shown)
        if config.reads_questions:
            _answer_lines(config, questions, parallel, printer)
            return
        failed = _answer_videos(config, questions, parallel, printer)
    if failed:
        raise typer.Exit(EXIT_SAMPLES_FAILED)


def _open_engine(
    config: VqaConfig,
    sampling: VideoSampling,
    engine: EngineConfig,
    server: VideoEndpointConfig,
    parallel: "ParallelContext",
    set_by_user: frozenset[str],
) -> "Engine":
    """The model in this process, or on a server that answers; with sampling that it can have."""
    if server.endpoint is not None:
        endpoint = open_endpoint(server, config.model)
        endpoint.identity(sampling, images=False)
        endpoint.check()
        return endpoint
    from lvctx.inference.open_engine import open_checked_vlm, open_engine

    vlm = open_checked_vlm(config.model, parallel.device, engine.features_folder, set_by_user)
    vlm.resolve(sampling)
    return open_engine(vlm, replace(engine, device=parallel.device), ring=parallel.ring)


def _print_shown(path: Path, shown: "Shown") -> None:
    """Print frames and tokens of a video; also nominal tokens and delimiters if its frames are items in runs."""
    frames, facts = f"{len(shown.pts):,} frames", shown.facts
    if "send" in facts:
        what = f"{frames} sent as {facts['send']}" if shown.pts else "sent as the URL of the file"
    elif "runs" not in facts:
        what = f"{frames}, {facts['visual_tokens']:,} visual tokens"
    else:
        what = f"{frames} in {facts['runs']:,} runs, {facts['visual_tokens']:,} visual tokens "
        what += f"(nominal {facts['nominal_tokens']:,}) and {facts['delimiters']:,} delimiters"
    if not is_quiet():
        say(f"lvctx: {path}: {what}")


def _answer_lines(
    config: VqaConfig, questions: "VideoQuestions", parallel: "ParallelContext", printer: "StreamPrinter"
) -> None:
    """Answer the questions of --ask and of stdin about one video."""
    rows: deque[dict[str, Any]] = deque()

    def texts() -> Iterator[str]:
        for question, row in parallel.follow(_questions(config.ask, config.chat)):
            rows.append(row)
            yield question

    ask = questions.chat if config.chat else questions.ask
    for answer in ask(Path(config.videos[0]), texts()):
        _emit_answer({**rows.popleft(), "path": config.videos[0]}, answer, printer)


def _answer_videos(
    config: VqaConfig, questions: "VideoQuestions", parallel: "ParallelContext", printer: "StreamPrinter"
) -> int:
    """Answer the same questions, or those of stdin's lines, about each video; returns the number of failed videos."""
    from lvctx.artifacts.stream import read_references

    references = read_references(sys.stdin) if config.piped else ((Path(name), {}) for name in config.videos)

    def asked() -> Iterator[tuple[tuple[int, dict[str, Any]], Path, tuple[str, ...] | InputError]]:
        for number, (path, row) in enumerate(parallel.follow(references)):
            reference = {k: v for k, v in row.items() if k not in ("schema", "sha256")} | {"path": str(path)}
            texts = config.ask or ((str(row["question"]),) if row.get("question") else ())
            error = InputError(str(row["error"])) if "error" in row else None
            if not texts:
                error = error or InputError("no question", where=path, fix="give --ask, or a `question` in its line")
            yield (number, reference), path, error or texts

    failed = 0
    # A progress bar would be drawn into the text of a streamed answer.
    no_bar = nullcontext(lambda done, total, note: None)
    with no_bar if printer.live else progress("vqa", "loading the model") as on_progress:
        for (number, reference), answer in questions.ask_all(asked()):
            if not isinstance(answer, InputError):
                _emit_answer(reference, answer, printer)
            elif len(config.videos) == 1 and not config.piped:
                raise answer
            else:
                failed += 1
                say(f"lvctx: {answer}")
                emit({"schema": schemas.ANSWER, **reference, "error": str(answer), **questions.engine.meter.take()})
            on_progress(number + 1, 0 if config.piped else len(config.videos), Path(reference["path"]).name)
    return failed


def _emit_answer(row: dict[str, Any], answer: "Answer", printer: "StreamPrinter") -> None:
    printed = printer.end()
    if printed and not wants_json():
        return
    fields = {
        "frames": len(answer.pts),
        "seconds": [answer.pts[0], answer.pts[-1]] if answer.pts else None,
        "pts": answer.pts,
        "question": answer.question,
        "answer": answer.text,
        **answer.reply.facts,
        "sampling_params": answer.params.facts,
        **answer.sent,
        **({"reuse": answer.reuse} if answer.reuse else {}),
        **({"partial": True} if answer.partial else {}),
        **answer.cost,
    }
    line = answer.text if printer.live else f"{row['path']}: {answer.text}"
    emit({"schema": schemas.ANSWER, **row, **fields}, line)


def _questions(ask: tuple[str, ...], chat: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The questions of --ask, with stdin's lines for -, and those of stdin in a chat; each with its input row."""
    for question in [*ask, *(["-"] if chat and "-" not in ask else [])]:
        if question == "-":
            yield from _question_lines()
        else:
            yield question, {}


def _question_lines() -> Iterator[tuple[str, dict[str, Any]]]:
    """Questions from lines of stdin, text or JSON objects, with a prompt on a terminal."""
    interactive, number = sys.stdin.isatty(), 0
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        number += 1
        if not line:
            return
        text = line.strip()
        if not text:
            continue
        where = f"stdin:{number}"
        row = parse_json(text, where=where) if text.startswith("{") else {"question": text}
        if "question" not in row:
            raise InputError("no `question` in the object", where=where)
        question = str(row["question"])
        try:
            question.encode()
        except UnicodeEncodeError:
            raise InputError("the question is not UTF-8", where=where) from None
        yield question, {k: v for k, v in row.items() if k != "schema"} if text.startswith("{") else {}


class StreamPrinter:
    """Streams an answer to a terminal: to stdout if it is one, else to stderr."""

    def __init__(self, *, live: bool) -> None:
        self.live = live
        self._file = sys.stderr if wants_json() else sys.stdout
        self._prints = live and self._file.isatty() and not (is_quiet() and wants_json())
        self._printed = ""

    def show(self, text: str) -> None:
        """The answer so far."""
        text = text.rstrip("\ufffd")  # the rest of a character is not decoded yet
        if not self._prints:
            return
        new = text.removeprefix(self._printed) if text.startswith(self._printed) else f"\n{text}"
        print(new, end="", file=self._file, flush=True)
        self._printed = text

    def end(self) -> bool:
        """End the answer; returns whether any of it was printed."""
        printed = bool(self._printed)
        if printed:
            print(file=self._file, flush=True)
        self._printed = ""
        return printed
