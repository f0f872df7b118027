"""Questions about videos, separately or as a conversation (LongVA's prompt, section 4.1)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lvctx.errors import InputError
from lvctx.inference.concurrency import read_ahead
from lvctx.inference.engine import Engine, EngineGone, Reply, Shown
from lvctx.inference.reply_batches import finish_in_batches
from lvctx.inference.sampling_params import SamplingParams
from lvctx.video.sampling import VideoSampling

KeyT = TypeVar("KeyT")
ReplyT = TypeVar("ReplyT")
Asked = tuple[KeyT, Path, Iterable[str] | InputError]
"""What answers are yielded with, a video, and the questions about it, or an error in their place."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A reply to a question about a video."""

    question: str
    """The question."""
    text: str
    """Decoded answer without special tokens."""
    pts: tuple[float, ...]
    """When each frame that the model was shown is on display, in seconds; empty where a server samples."""
    reply: Reply
    """With its reasoning."""
    params: SamplingParams
    """How it was generated."""
    sent: dict[str, Any]
    """How the video was sent to a server, and how its times; empty for a model in this process."""
    reuse: str | None = None
    """`none` where prompts share no computation, see `forward_engine`."""
    cost: dict[str, Any]
    """What it cost, as a row has it, see `CostMeter.take`: the first answer about a video pays for reading it."""
    partial: bool = False
    """Whether the video is truncated or damaged, so that only its intact frames were used."""


class VideoQuestions:
    """Answers questions about video files or feature caches; the current file is not read again."""

    def __init__(
        self,
        engine: Engine,
        sampling: VideoSampling,
        *,
        params: SamplingParams,
        on_text: Callable[[str], None] | None = None,
        on_shown: Callable[[Path, Shown], None] | None = None,
    ) -> None:
        """`on_text` gets each answer as it grows, `on_shown` what the model is shown of a file.

        A server is said to be sent a file once it has answered.
        """
        self.engine, self.sampling, self.params = engine, sampling, params
        self.on_text, self.on_shown = on_text, on_shown
        self._state: Any = None
        self._shown = Shown(pts=(), facts={})
        self._unreported: Path | None = None

    def ask(self, path: Path, questions: Iterable[str]) -> Iterator[Answer]:
        """Answer each question about one video separately.

        Raises InputError for a file that cannot be read or was encoded by another model, or a prompt longer than the
        model's context.
        """
        for _, answer in self.ask_all([(None, path, questions)]):
            if isinstance(answer, InputError):
                raise answer
            yield answer

    def ask_all(self, videos: Iterable[Asked[KeyT]]) -> Iterator[tuple[KeyT, Answer | InputError]]:
        """Answer each question about each video, in order; the next video is read meanwhile.

        An error ends the questions about its video; one in place of questions is passed on.
        """
        failed: set[int] = set()

        def start() -> Iterator[tuple[tuple[int, KeyT, Path, str, Shown | None], Any]]:
            with closing(read_ahead(videos, self._reader(), self._use, self.engine)) as read:
                for number, ((key, path, questions), show) in enumerate(read):
                    try:
                        show()
                        assert not isinstance(questions, InputError), "raised by what reads the videos"
                        for question in questions:
                            started = self._naming(path, self.engine.start_reply, [question])
                            yield (number, key, path, question, self._shown), started
                            if number in failed:
                                break
                    except EngineGone:
                        raise
                    except InputError as e:
                        yield (number, key, path, "", None), e

        for (number, key, path, question, shown), reply in finish_in_batches(self.engine, start()):
            if isinstance(reply, Reply):
                assert shown is not None
                yield key, self._answer(question, reply, shown)
            elif isinstance(reply, InputError):
                failed.add(number)
                yield key, reply if shown is None else InputError(reply.what, where=path, fix=reply.fix)
            else:
                raise reply

    def chat(self, path: Path, questions: Iterable[str]) -> Iterator[Answer]:
        """Answer the questions as one conversation, in which each turn follows the previous ones. Raises as `ask`."""
        self._use(self._reader()((None, path, ())))
        turns: list[str] = []
        for question in questions:
            reply = self._naming(path, self.engine.reply, [*turns, question])
            answer = self._answer(question, reply, self._shown)
            turns += [question, answer.text]
            yield answer

    def _naming(self, path: Path, reply: Callable[..., ReplyT], turns: Sequence[str]) -> ReplyT:
        """Reply or start a reply; an error names the video."""
        try:
            return reply(turns, self.params, self._on_text)
        except EngineGone:
            raise
        except InputError as e:
            raise InputError(e.what, where=path, fix=e.fix) from None

    def _reader(self) -> Callable[[Asked[Any]], Any]:
        """Reads one video after another, for `_use`; None in place of the one before, as it is shown already."""
        last = self._state

        def read(asked: Asked[Any]) -> tuple[Path, Any, Any]:
            nonlocal last
            _, path, questions = asked
            if isinstance(questions, InputError):
                raise questions
            state = (path, path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
            if state is not None and state == last:
                return path, state, None
            last = None
            loaded = self._load(path)
            last = state
            return path, state, loaded

        return read

    def _load(self, path: Path) -> Any:
        try:
            return self.engine.load([path], self.sampling)
        except EngineGone:
            raise
        except InputError as e:
            raise InputError(e.what, where=e.where or path, fix=e.fix) from None

    def _use(self, read: tuple[Path, Any, Any]) -> None:
        path, state, loaded = read
        if loaded is None:
            if state == self._state:
                return
            loaded = self._load(path)  # it could not be shown before
        self._state = None
        try:
            self._shown = self.engine.show_loaded(loaded)
        except EngineGone:
            raise
        except InputError as e:
            raise InputError(e.what, where=e.where or path, fix=e.fix) from None
        self._state = state
        self._unreported = path
        if "send" not in self._shown.facts:
            self._report()

    def _report(self) -> None:
        if self.on_shown and self._unreported:
            self.on_shown(self._unreported, self._shown)
        self._unreported = None

    def _on_text(self, text: str) -> None:
        self._report()
        if self.on_text:
            self.on_text(text)

    def _answer(self, question: str, reply: Reply, shown: Shown) -> Answer:
        return Answer(
            question=question,
            text=reply.text,
            pts=shown.pts,
            reply=reply,
            params=self.params,
            sent={key: shown.facts[key] for key in ("send", "times") if key in shown.facts},
            reuse=shown.facts.get("reuse"),
            cost=self.engine.meter.take(),
            partial=bool(shown.facts.get("partial")),
        )
