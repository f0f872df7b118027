"""Questions about videos, separately or as a conversation (LongVA's prompt, section 4.1)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvctx.errors import InputError
from lvctx.inference.engine import Engine, EngineGone, Reply, Shown
from lvctx.inference.sampling_params import SamplingParams
from lvctx.video.sampling import VideoSampling


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
        self._show(path)
        for question in questions:
            yield self._answer(path, [question])

    def chat(self, path: Path, questions: Iterable[str]) -> Iterator[Answer]:
        """Answer the questions as one conversation, in which each turn follows the previous ones. Raises as `ask`."""
        self._show(path)
        turns: list[str] = []
        for question in questions:
            answer = self._answer(path, [*turns, question])
            turns += [question, answer.text]
            yield answer

    def _show(self, path: Path) -> None:
        state = (path, path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
        if state is not None and state == self._state:
            return
        self._state = None
        try:
            self._shown = self.engine.show([path], self.sampling)
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

    def _answer(self, path: Path, turns: Sequence[str]) -> Answer:
        def on_text(text: str) -> None:
            self._report()
            if self.on_text:
                self.on_text(text)

        try:
            reply = self.engine.reply(turns, self.params, on_text)
        except EngineGone:
            raise
        except InputError as e:
            raise InputError(e.what, where=path, fix=e.fix) from None
        shown = self._shown
        return Answer(
            question=turns[-1],
            text=reply.text,
            pts=shown.pts,
            reply=reply,
            params=self.params,
            sent={key: shown.facts[key] for key in ("send", "times") if key in shown.facts},
            reuse=shown.facts.get("reuse"),
            cost=self.engine.meter.take(),
            partial=bool(shown.facts.get("partial")),
        )
