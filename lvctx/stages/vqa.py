"""Ask a vision-language model about encoded videos: frames in, greedy answers out (LongVA's prompt, section 4.1)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lvctx.artifacts.frames import read_frames
from lvctx.dist.mesh import LONG_PATIENCE, open_world
from lvctx.dist.ring import ALONE, Ring
from lvctx.errors import InputError, UsageError
from lvctx.model.load import VLM_TYPE, load_config, resolve_model
from lvctx.stages.asker import Asker
from lvctx.vision.tower import TowerFiles

__all__ = ["LONG_PATIENCE", "Answer", "Watcher", "open_world"]
CHUNK = 2048
"""Tokens of one forward."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said, and how much it had read before it spoke."""

    question: str
    """What was asked."""
    text: str
    """Decoded answer without special tokens."""
    frames: int
    """Frames of the video it was shown."""
    seconds: tuple[float, float]
    """When the first and the last of them are on display."""
    tokens: int
    """Tokens of the whole prompt, visual ones included."""


class Watcher:
    """A loaded vision-language model that answers questions about frames artifacts."""

    def __init__(self, model: str, *, device: str, ring: Ring = ALONE) -> None:
        """Load the model; the ranks of a `ring` watch together.

        Raises InputError if it cannot be loaded, UsageError if it cannot see.
        """
        path = resolve_model(model)
        if load_config(path).model_type != VLM_TYPE:
            raise UsageError(f"{model} is a language model and cannot see", fix="give a model that align wrote")
        self.tower = TowerFiles.find(path).fingerprint
        self.asker = Asker(path, device=device, chunk=CHUNK, ring=ring)

    def ask(self, path: Path, questions: Sequence[str], *, max_new_tokens: int) -> Iterator[Answer]:
        """Greedy answers to each question about one video on its own; its frames are read once.

        Raises InputError for a file that is no frames artifact, features of another tower, or a prompt longer than the
        model's context.
        """
        frames, seconds = self._watch(path)
        for question in questions:
            yield self._answer(path, [question], frames, seconds, max_new_tokens)

    def chat(
        self,
        path: Path,
        questions: Iterable[str],
        *,
        max_new_tokens: int,
        tell: Callable[[str], None] = lambda text: None,
    ) -> Iterator[Answer]:
        """Greedy answers in one conversation: each turn sees those before it and runs only what is new.

        `tell` gets an answer's text as it grows. Raises InputError as `ask` does.
        """
        frames, seconds = self._watch(path)
        turns: list[str] = []
        for question in questions:
            answer = self._answer(path, [*turns, question], frames, seconds, max_new_tokens, tell)
            turns += [question, answer.text]
            yield answer

    def _watch(self, path: Path) -> tuple[int, tuple[float, float]]:
        frames = read_frames(path)
        if frames.provenance["inputs"].get("tower") != self.tower:
            raise InputError("encoded by another tower", where=path, fix="encode the video with --model of this VLM")
        try:
            self.asker.show(frames.features, frames.grid)
        except InputError as e:
            raise InputError(e.what, where=path, fix=e.fix) from None
        return len(frames.pts), (float(frames.pts[0]), float(frames.pts[-1]))

    def _answer(
        self,
        path: Path,
        turns: list[str],
        frames: int,
        seconds: tuple[float, float],
        max_new_tokens: int,
        tell: Callable[[str], None] = lambda text: None,
    ) -> Answer:
        ids = self.asker.ids(*turns)
        said: list[int] = []

        def heard(token: int) -> None:
            said.append(token)
            tell(self.asker.text(said))

        try:
            written = self.asker.reply(ids, max_new_tokens, heard)
        except InputError as e:
            raise InputError(e.what, where=path, fix=e.fix) from None
        return Answer(
            question=turns[-1], text=self.asker.text(written), frames=frames, seconds=seconds, tokens=len(ids)
        )
