"""Ask a vision-language model about encoded videos: frames in, greedy answers out (LongVA's prompt, section 4.1)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvctx.artifacts.frames import read_frames
from lvctx.dist.context import SHARED_WORK_TIMEOUT, open_context
from lvctx.dist.ring import ALONE, Ring
from lvctx.errors import InputError, UsageError
from lvctx.model.load import VLM_TYPE, DeviceMap, load_config, resolve_model
from lvctx.stages.asker import Asker
from lvctx.vision.tower import TowerFiles

__all__ = ["SHARED_WORK_TIMEOUT", "Answer", "DeviceMap", "Watcher", "open_context"]
CHUNK = 2048
"""Tokens of one forward."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said, and how much it had read before it spoke."""

    question: str
    """What was asked."""
    text: str
    """Decoded answer without special tokens."""
    pts: tuple[float, ...]
    """When each frame that it was shown is on display, in seconds."""
    tokens: int
    """Tokens of the whole prompt, visual ones included."""
    partial: bool = False
    """Whether its video is cut short or damaged, and what is left of it was shown."""


Tell = Callable[[str], None]
"""Gets an answer's text as it grows."""


def keep_quiet(text: str) -> None:
    """Tells nobody."""


class Watcher:
    """A loaded vision-language model that answers questions about frames artifacts."""

    def __init__(self, model: str, *, device: str, ring: Ring = ALONE, device_map: DeviceMap | None = None) -> None:
        """Load the model; the ranks of a `ring` watch together, or a `device_map` says where its modules are.

        Raises InputError if it cannot be loaded, UsageError if it cannot see, MissingError without accelerate.
        """
        self.model = model
        path = resolve_model(model)
        if load_config(path).model_type != VLM_TYPE:
            raise UsageError(f"{model} is a language model and cannot see", fix="give a model that align wrote")
        self.tower = TowerFiles.find(path).fingerprint
        self.asker = Asker(path, device=device, chunk=CHUNK, ring=ring, device_map=device_map)

    partial = False
    """Whether what was last shown is only what is left of a video."""
    _watched: tuple[Any, tuple[float, ...]] = (None, ())
    """What file was last shown, in which state, and when its frames are on display."""

    def ask(
        self, path: Path, questions: Iterable[str], *, max_new_tokens: int, tell: Tell = keep_quiet
    ) -> Iterator[Answer]:
        """Greedy answers to each question about one video on its own; its frames are read once, also in later calls.

        Raises InputError for a file that is no frames artifact, features of another tower, or a prompt longer than the
        model's context.
        """
        pts = self._watch(path)
        for question in questions:
            yield self._answer(path, [question], pts, max_new_tokens, tell)

    def chat(
        self, path: Path, questions: Iterable[str], *, max_new_tokens: int, tell: Tell = keep_quiet
    ) -> Iterator[Answer]:
        """Greedy answers in one conversation: each turn sees those before it and runs only what is new.

        Raises InputError as `ask` does.
        """
        pts = self._watch(path)
        turns: list[str] = []
        for question in questions:
            answer = self._answer(path, [*turns, question], pts, max_new_tokens, tell)
            turns += [question, answer.text]
            yield answer

    def _watch(self, path: Path) -> tuple[float, ...]:
        """Show a file, unless it was shown last: then its keys and values still stand. When its frames are."""
        state = (path, path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
        if state is None or state != self._watched[0]:
            self._watched = (None, ())  # what is half shown is nothing to go on from
            self._watched = (state, self._show(path))
        return self._watched[1]

    def _show(self, path: Path) -> tuple[float, ...]:
        frames = read_frames(path, model=self.model)
        self.partial = bool(frames.provenance.get("facts", {}).get("partial"))
        if frames.provenance["inputs"].get("tower") != self.tower:
            raise InputError("encoded by another tower", where=path, fix="encode the video with --model of this VLM")
        try:
            self.asker.show(frames.features, frames.grid)
        except InputError as e:
            raise InputError(e.what, where=path, fix=e.fix) from None
        return tuple(frames.pts.tolist())

    def _answer(self, path: Path, turns: list[str], pts: tuple[float, ...], max_new_tokens: int, tell: Tell) -> Answer:
        ids = self.asker.ids(*turns)
        said: list[int] = []

        def heard(token: int) -> None:
            said.append(token)
            tell(self.asker.text(said))

        try:
            written = self.asker.reply(ids, max_new_tokens, heard)
        except InputError as e:
            raise InputError(e.what, where=path, fix=e.fix) from None
        text = self.asker.text(written)
        return Answer(question=turns[-1], text=text, pts=pts, tokens=len(ids), partial=self.partial)
