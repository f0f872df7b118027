"""Questions about videos, one after the other or as a conversation (LongVA's prompt, section 4.1)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvctx.errors import InputError
from lvctx.inference.engine import Engine, Shown
from lvctx.video.sampling import VideoSampling


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A reply to a question about a video."""

    question: str
    """What was asked."""
    text: str
    """Decoded answer without special tokens."""
    pts: tuple[float, ...]
    """When each frame that the model was shown is on display, in seconds."""
    tokens: int
    """Tokens of the whole prompt, visual ones included."""
    reuse: str | None = None
    """`none` where prompts share no computation, see `forward_engine`."""
    partial: bool = False
    """Whether the video is truncated or damaged, and only what is left of it was shown."""


class VideoQuestions:
    """Answers questions about video files or feature caches; one that was shown last is not read again."""

    def __init__(
        self,
        engine: Engine,
        sampling: VideoSampling,
        *,
        max_new_tokens: int,
        on_text: Callable[[str], None] | None = None,
        on_shown: Callable[[Path, Shown], None] | None = None,
    ) -> None:
        """`on_text` gets each answer as it grows, `on_shown` what the model is shown of a file.

        Answers are of at most `max_new_tokens` tokens.
        """
        self.engine, self.sampling, self.max_new_tokens = engine, sampling, max_new_tokens
        self.on_text, self.on_shown = on_text, on_shown
        self._state: Any = None
        self._shown = Shown(pts=(), facts={})

    def ask(self, path: Path, questions: Iterable[str]) -> Iterator[Answer]:
        """Answer each question about one video by itself.

        Raises InputError for a file that cannot be read or was encoded by another model, or a prompt longer than the
        model's context.
        """
        self._show(path)
        for question in questions:
            yield self._answer(path, [question])

    def chat(self, path: Path, questions: Iterable[str]) -> Iterator[Answer]:
        """Answer the questions as one conversation, in which each turn has those before it. Raises as `ask`."""
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
        if self.on_shown:
            self.on_shown(path, self._shown)

    def _answer(self, path: Path, turns: Sequence[str]) -> Answer:
        try:
            reply = self.engine.reply(turns, self.max_new_tokens, self.on_text)
        except InputError as e:
            raise InputError(e.what, where=path, fix=e.fix) from None
        shown = self._shown
        return Answer(
            question=turns[-1],
            text=reply.text,
            pts=shown.pts,
            tokens=reply.prompt_tokens,
            reuse=shown.facts.get("reuse"),
            partial=bool(shown.facts.get("partial")),
        )
