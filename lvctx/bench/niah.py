"""Needle in a haystack, text and video (V-NIAH, LongVA section 4): which cells there are, and each cell's sequence.

A cell is a haystack length, a depth and a trial. Its sequence is the haystack with the needle inserted at
int(depth * haystack), then the question, then the answer; right if the model's first choice is the answer at every
answer token.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lvctx.errors import InputError, UsageError
from lvctx.model.vlm import chat_ids
from lvctx.text.needle import (
    NEEDLE,
    PREFIX,
    QUESTION,
    draw_distractors,
    draw_needle,
    question_and_answer,
    sentence_ends,
)
from lvctx.vision.draw import COLORS, SHAPES, draw_picture
from lvctx.vision.images import open_image

FIND = "Find the image with the {shape}. What color is the {shape}?"
"""The question of a drawn needle; only the picture knows the answer."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One test."""

    length: int
    """Text: tokens of the whole sequence. Video: frames of the haystack."""
    depth: float
    """Requested place of the needle, 0 (start) to 1 (end)."""
    trial: int
    """Which needle."""
    position: int
    """Where it is inserted: haystack tokens (text) or frames (video) before it."""
    needle: str
    """What is inserted: the sentence (text), or the hash of the picture's pixels (video)."""
    question: str
    """What the model is asked."""
    answer: str
    """What it should say."""


class Niah(Protocol):
    """A modality: its cells and their sequences."""

    modality: str
    chance: float | None
    """Accuracy of guessing; None where it is not known."""

    def cells(self, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
        """Every cell of a grid."""

    def sequence(self, cell: Cell) -> tuple[np.ndarray, int]:
        """Ids over the extended vocabulary, and how many of the last are the answer."""

    def prompt(self) -> dict[str, Any]:
        """What of the prompt all cells share, for the rows' keys."""


class TextNiah:
    """Magic numbers of cities in a book."""

    modality = "text"
    chance: float | None = 1 / 9_000_000

    def __init__(self, tokenizer: Any, haystack: str, *, distractors: int, seed: int) -> None:
        """Tokenize the haystack; `distractors` look-alikes go into it, `seed` draws cities, numbers and places."""
        self.tokenizer, self.distractors, self.seed = tokenizer, distractors, seed
        self._prefix = tokenizer(PREFIX).input_ids  # with the bos of tokenizers that add one
        self._hay = np.array(tokenizer(haystack, add_special_tokens=False).input_ids, dtype=np.int64)
        self._ends = sentence_ends(tokenizer, self._hay)
        self._others = [(self._needle(c, n), place) for c, n, place in draw_distractors(seed, distractors)]
        self._parts = functools.cache(self._draw)

    def cells(self, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
        """See `Niah.cells`. Raises InputError for a length too short for a needle or too long for the haystack."""
        cells = []
        for length in lengths:
            for trial in range(trials):
                city, number = draw_needle(self.seed, trial, self.distractors)
                asked = {"needle": NEEDLE.format(city=city, number=number).strip(), "answer": number}
                asked["question"] = f"What is the special magic {city} number?"
                room = self._room(length, trial)
                for depth in depths:
                    target = int(depth * room)
                    # The very end stays the end; elsewhere back to the last sentence's end, as the original does.
                    at = target if target == room else self._sentence_end(target)
                    cells.append(Cell(length=length, depth=depth, trial=trial, position=at, **asked))
        return cells

    def _needle(self, city: str, number: str) -> list[int]:
        return list(self.tokenizer(NEEDLE.format(city=city, number=number), add_special_tokens=False).input_ids)

    def _draw(self, trial: int) -> tuple[list[int], list[int], list[int]]:
        """Ids of a trial's needle, question and answer."""
        city, number = draw_needle(self.seed, trial, self.distractors)
        return self._needle(city, number), *question_and_answer(self.tokenizer, city, number)

    def _sentence_end(self, target: int) -> int:
        return int(self._ends[np.searchsorted(self._ends, target, side="right") - 1])

    def _room(self, length: int, trial: int) -> int:
        """Haystack tokens in a sequence of `length`."""
        fixed = len(self._prefix) + sum(map(len, self._parts(trial))) + sum(len(ids) for ids, _ in self._others)
        room = length - fixed
        if room < 0:
            raise InputError(f"{length} tokens cannot hold needle and question ({fixed} tokens)", fix="raise --lengths")
        if room > len(self._hay):
            raise InputError(
                f"{length} tokens are beyond the haystack (it has {len(self._hay)})", fix="give more --haystack"
            )
        return room

    def sequence(self, cell: Cell) -> tuple[np.ndarray, int]:
        """See `Niah.sequence`; exactly `cell.length` ids."""
        needle, question, answer = self._parts(cell.trial)
        room = self._room(cell.length, cell.trial)
        pieces = [(self._sentence_end(min(int(place * cell.length), room)), ids) for ids, place in self._others]
        parts: list[Any] = [self._prefix]
        last = 0
        for at, piece in sorted([*pieces, (cell.position, needle)], key=lambda p: p[0]):
            parts += [self._hay[last:at], piece]
            last = at
        ids = np.concatenate([*parts, self._hay[last:room], question, answer]).astype(np.int64)
        assert len(ids) == cell.length
        return ids, len(answer)

    def prompt(self) -> dict[str, Any]:
        """See `Niah.prompt`."""
        return {"text": [PREFIX, NEEDLE, QUESTION], "distractors": self.distractors}


@dataclass(frozen=True, kw_only=True)
class Needle:
    """A picture that the haystack does not hold, and a question that only it answers."""

    image: Image.Image
    question: str
    answer: str

    @property
    def digest(self) -> str:
        """Sixteen hex digits of its pixels."""
        return hashlib.sha256(f"{self.image.size}".encode() + self.image.tobytes()).hexdigest()[:16]


def drawn_needles(count: int, *, size: int, seed: int) -> list[Needle]:
    """`count` seeded pictures of one coloured shape; ten colours, so chance is one in ten."""
    needles = []
    for trial in range(count):
        rng = np.random.default_rng([seed, trial])
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        color = list(COLORS)[int(rng.integers(len(COLORS)))]
        picture = draw_picture(rng, size=size, shape=shape, color=color)
        needles.append(Needle(image=picture, question=FIND.format(shape=shape), answer=color))
    return needles


def read_needles(folder: Path) -> list[Needle]:
    """Needles of a folder: one .jsonl file of `{"image", "question", "answer"}`, images beside it.

    Raises InputError naming the line for malformed JSON, a missing key, an unreadable image or an empty answer.
    """
    lists = sorted(folder.glob("*.jsonl"))
    if len(lists) != 1:
        raise InputError(f"{len(lists)} .jsonl files", where=folder, fix="a needle folder has one, and its images")
    needles = []
    for number, line in enumerate(lists[0].read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{lists[0]}:{number}"
        try:
            row = json.loads(line)
            image, question, answer = folder / row["image"], str(row["question"]), str(row["answer"])
        except (ValueError, KeyError, TypeError):
            raise InputError(
                "not an object with image, question and answer", where=where, fix="mend the line"
            ) from None
        if not answer.strip():
            raise InputError("an empty answer", where=where, fix="mend the line")
        needles.append(Needle(image=open_image(image), question=question, answer=answer.strip()))
    return needles


class VideoNiah:
    """A picture among a video's frames."""

    modality = "video"

    def __init__(
        self,
        tokenizer: Any,
        needles: Sequence[Needle],
        *,
        vocabulary: int,
        frames: int,
        per_frame: int,
        chance: float | None,
    ) -> None:
        """`frames` haystack frames of `per_frame` tokens each; ids from `vocabulary` on are rows of `visual_table`.

        Raises InputError for an answer that is no token.
        """
        self.tokenizer, self.needles, self.chance = tokenizer, needles, chance
        self._frames, self._per_frame = frames, per_frame
        rows = vocabulary + np.arange((frames + len(needles)) * per_frame + 1).astype(np.int64)
        self._hay, self._newline = rows[: frames * per_frame], rows[-1:]
        self._needle_rows = rows[frames * per_frame : -1].reshape(len(needles), per_frame)
        self._asks = [chat_ids(tokenizer, needle.question) for needle in needles]
        self._answers = [tokenizer(needle.answer, add_special_tokens=False).input_ids for needle in needles]
        for needle, ids in zip(needles, self._answers, strict=True):
            if not ids:
                raise InputError(f"the answer {needle.answer!r} is no token of this model", fix="change the needle")

    def cells(self, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
        """See `Niah.cells`. Raises InputError for more frames than the haystack has, UsageError for too few needles."""
        if max(lengths) > self._frames:
            raise InputError(
                f"{max(lengths)} frames are beyond the haystack (it has {self._frames})", fix="give more --frames"
            )
        if trials > len(self.needles):
            raise UsageError(f"--trials {trials} with {len(self.needles)} needles")
        asked = [{"needle": n.digest, "question": n.question, "answer": n.answer} for n in self.needles[:trials]]
        return [
            Cell(length=n, depth=d, trial=k, position=int(d * n), **asked[k])
            for n in lengths
            for d in depths
            for k in range(trials)
        ]

    def sequence(self, cell: Cell) -> tuple[np.ndarray, int]:
        """See `Niah.sequence`."""
        (before, after), answer = self._asks[cell.trial], self._answers[cell.trial]
        at = cell.position * self._per_frame
        hay = self._hay[: cell.length * self._per_frame]
        shown = [before, hay[:at], self._needle_rows[cell.trial], hay[at:], self._newline]
        return np.concatenate([*shown, after, answer]).astype(np.int64), len(answer)

    def prompt(self) -> dict[str, Any]:
        """See `Niah.prompt`."""
        before, after = chat_ids(self.tokenizer, FIND)
        return {"chat": [*before, *after], "tokens_per_frame": self._per_frame}


def visual_table(hay_NE: Tensor, needles_NE: Tensor, newline_1E: Tensor) -> Tensor:
    """The rows that a `VideoNiah`'s ids point into: haystack, needles, then the newline."""
    return torch.cat([hay_NE, needles_NE, newline_1E])
