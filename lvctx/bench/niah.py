"""Needle in a haystack, text and video (V-NIAH, LongVA section 4): which cells there are, and each cell's sequence.

A cell is a haystack length, a depth and a trial. Its sequence is the haystack with the needle inserted at
int(depth * haystack), then the question, then the answer; right if the model's first choice is the answer at every
answer token. Cells are listed so that those that begin alike follow each other (see `prefix`).
"""

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
from lvctx.text.needle import NEEDLE, PREFIX, draw_needle, question_and_answer, sentence_ends
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
    answer: str
    """What the model should say."""


class Niah(Protocol):
    """A modality: its cells and their sequences."""

    modality: str
    chance: float
    """Accuracy of guessing."""

    def cells(self, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
        """Every cell of a grid, in an order that keeps shared prefixes together."""

    def sequence(self, cell: Cell) -> tuple[np.ndarray, int]:
        """Ids over the extended vocabulary, and how many of the last are the answer."""

    def prompt(self) -> dict[str, Any]:
        """What of the prompt decides the result, for the row's key."""


class TextNiah:
    """Magic numbers of cities in a book."""

    modality = "text"
    chance = 1e-7

    def __init__(self, tokenizer: Any, haystack: str, *, distractors: int, seed: int) -> None:
        self.tokenizer, self.distractors, self.seed = tokenizer, distractors, seed
        self._prefix = tokenizer(PREFIX).input_ids  # with the bos of tokenizers that add one
        self._hay = np.array(tokenizer(haystack, add_special_tokens=False).input_ids)
        self._ends = sentence_ends(tokenizer, self._hay)

    def cells(self, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
        """See `Niah.cells`. Raises InputError for a length too short for a needle or too long for the haystack."""
        cells = []
        for length in lengths:
            for trial in range(trials):
                _, number, _ = draw_needle(self.seed, trial, self.distractors)
                room = self._room(length, trial)
                for depth in depths:
                    target = int(depth * room)
                    # The very end stays the end; elsewhere back to the last sentence's end, as the original does.
                    at = target if target == room else int(self._ends[self._ends <= target].max())
                    cells.append(Cell(length=length, depth=depth, trial=trial, position=at, answer=number))
        # With distractors the haystack itself depends on length and trial.
        varies = bool(self.distractors)
        return sorted(cells, key=lambda c: ((c.length, c.trial) * varies, c.position, c.trial, c.length))

    def _parts(self, trial: int) -> tuple[list[int], list[list[int]], list[int], list[int]]:
        city, number, others = draw_needle(self.seed, trial, self.distractors)

        def encode(city: str, number: str) -> list[int]:
            return self.tokenizer(NEEDLE.format(city=city, number=number), add_special_tokens=False).input_ids

        question, answer = question_and_answer(self.tokenizer, city, number)
        return encode(city, number), [encode(*other) for other in others], question, answer

    def _room(self, length: int, trial: int) -> int:
        needle, others, question, answer = self._parts(trial)
        fixed = [*self._prefix, *needle, *(i for other in others for i in other), *question, *answer]
        room = length - len(fixed)
        if room < 0:
            raise InputError(
                f"a length of {length} tokens cannot hold needle and question ({len(fixed)})", fix="raise --lengths"
            )
        if room > len(self._hay):
            raise InputError(
                f"a length of {length} tokens is beyond the haystack ({len(self._hay)})", fix="give more --haystack"
            )
        return room

    def sequence(self, cell: Cell) -> tuple[np.ndarray, int]:
        """See `Niah.sequence`; exactly `cell.length` ids."""
        needle, others, question, answer = self._parts(cell.trial)
        hay = self._hay[: self._room(cell.length, cell.trial)]
        pieces = [(cell.position, needle)]
        rng = np.random.default_rng([self.seed, cell.length, cell.trial, 1])
        for other in others:
            pieces.append((int(rng.choice(self._ends[self._ends <= len(hay)])), other))
        parts: list[Any] = [self._prefix]
        last = 0
        for at, piece in sorted(pieces, key=lambda p: p[0]):
            parts += [hay[last:at], piece]
            last = at
        ids = np.concatenate([*parts, hay[last:], question, answer]).astype(np.int64)
        assert len(ids) == cell.length
        return ids, len(answer)

    def prompt(self) -> dict[str, Any]:
        """See `Niah.prompt`."""
        return {"prefix": PREFIX, "needle": NEEDLE, "distractors": self.distractors, "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class Needle:
    """A picture that the haystack does not hold, and a question that only it answers."""

    image: Image.Image
    question: str
    answer: str


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
    """Needles of a folder: one .jsonl file of `{"image", "question", "answer"}`, images beside it."""
    lists = sorted(folder.glob("*.jsonl"))
    if len(lists) != 1:
        raise InputError(f"{len(lists)} .jsonl files", where=folder, fix="a needle folder has one, and its images")
    needles = []
    for number, line in enumerate(lists[0].read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            image, question, answer = folder / row["image"], str(row["question"]), str(row["answer"])
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"no needle ({e!r})", where=f"{lists[0]}:{number}") from None
        needles.append(Needle(image=open_image(image), question=question, answer=answer))
    return needles


class VideoNiah:
    """A picture among a video's frames."""

    modality = "video"

    def __init__(
        self, tokenizer: Any, vocabulary: int, frames: int, per_frame: int, needles: Sequence[Needle], chance: float
    ) -> None:
        """`frames` haystack frames of `per_frame` tokens each; see `visual_table` for what the ids mean."""
        self.tokenizer, self.needles, self.chance = tokenizer, needles, chance
        self._frames, self._per_frame = frames, per_frame
        rows = vocabulary + np.arange((frames + len(needles)) * per_frame + 1).astype(np.int64)
        self._hay, self._newline = rows[: frames * per_frame], rows[-1:]
        self._needle_rows = rows[frames * per_frame : -1].reshape(len(needles), per_frame)

    def cells(self, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
        """See `Niah.cells`. Raises InputError for more frames than the haystack has, UsageError for too few needles."""
        if max(lengths) > self._frames:
            raise InputError(
                f"{max(lengths)} frames are beyond the haystack ({self._frames})", fix="give more --frames, or fewer"
            )
        if trials > len(self.needles):
            raise UsageError(f"--trials {trials} with {len(self.needles)} needles")
        cells = [
            Cell(length=n, depth=d, trial=k, position=int(d * n), answer=self.needles[k].answer)
            for n in lengths
            for d in depths
            for k in range(trials)
        ]
        return sorted(cells, key=lambda c: (c.position, c.trial, c.length))

    def sequence(self, cell: Cell) -> tuple[np.ndarray, int]:
        """See `Niah.sequence`."""
        needle = self.needles[cell.trial]
        before, after = chat_ids(self.tokenizer, needle.question)
        answer = self.tokenizer(needle.answer, add_special_tokens=False).input_ids
        if not answer:
            raise InputError("an answer without a token", where=f"needle {cell.trial}")
        at = cell.position * self._per_frame
        hay = self._hay[: cell.length * self._per_frame]
        shown = [before, hay[:at], self._needle_rows[cell.trial], hay[at:], self._newline]
        return np.concatenate([*shown, after, answer]).astype(np.int64), len(answer)

    def prompt(self) -> dict[str, Any]:
        """See `Niah.prompt`."""
        return {"questions": [n.question for n in self.needles], "answers": [n.answer for n in self.needles]}


def visual_table(hay_NE: Tensor, needles_NE: Tensor, newline_1E: Tensor) -> Tensor:
    """The rows that a `VideoNiah`'s ids point into: haystack, needles, then the newline."""
    return torch.cat([hay_NE, needles_NE, newline_1E])
