"""Video needles (V-NIAH, LongVA section 4): a picture among a video's frames, and look-alikes beside it (V-NIAH-D).

What a drawn needle is asked, "What color is the {shape}?", has one answer as long as no other picture shows that shape.
So a look-alike is another shape in another colour, drawn the same way: whoever only notices that something was drawn
answers with its colour and is wrong. Shapes and colours of look-alikes are none of any needle's, and since the ten
colours are then divided, guessing is right once in seven instead of once in ten.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lvctx.bench.niah import Cell, begins_with, first_number, insertion_points, splice
from lvctx.errors import InputError, UsageError
from lvctx.model.vlm import VIDEO_TOKEN, answer_ids, chat_ids
from lvctx.text.records import read_records
from lvctx.vision.draw import COLORS, SHAPES, draw_picture
from lvctx.vision.images import open_image

Question = Literal["what", "when"]
FIND = "Find the image with the {shape}. What color is the {shape}?"
"""The question of a drawn needle; only the picture knows the answer."""
WHEN = (
    "The video goes from second {first} to second {last}. Find {subject}. At which second is it shown? "
    "Answer with the number alone."
)
"""The question for the time: a frame carries none, so the model has to know how far into the video it stands."""
LOOKALIKE_SHAPES, LOOKALIKE_COLORS = 4, 3
"""How many shapes and colours are kept for look-alikes."""


@dataclass(frozen=True, kw_only=True)
class Needle:
    """A picture that the haystack does not hold, and a question that only it answers."""

    image: Image.Image
    question: str
    answer: str
    subject: str
    """What to call the picture without giving the answer away."""

    @property
    def digest(self) -> str:
        """Sixteen hex digits of its pixels."""
        return hashlib.sha256(f"{self.image.size}".encode() + self.image.tobytes()).hexdigest()[:16]


def drawn_needles(count: int, *, size: int, seed: int, lookalikes: int = 0) -> tuple[list[Needle], list[Needle]]:
    """`count` seeded pictures of one coloured shape, and `lookalikes` of other shapes in other colours."""
    shapes, colors = list(SHAPES), list(COLORS)
    kept: tuple[list[str], list[str]] = ([], [])
    if lookalikes:
        shuffled = np.random.default_rng([seed, 1 << 20])
        shapes, colors = ([str(name) for name in shuffled.permutation(names)] for names in (shapes, colors))
        kept = shapes[:LOOKALIKE_SHAPES], colors[:LOOKALIKE_COLORS]
        shapes, colors = shapes[LOOKALIKE_SHAPES:], colors[LOOKALIKE_COLORS:]
    needles = [_drawn([seed, trial], size, shapes, colors) for trial in range(count)]
    return needles, [_drawn([seed, 1 << 20, i], size, *kept) for i in range(lookalikes)]


def _drawn(seed: list[int], size: int, shapes: list[str], colors: list[str]) -> Needle:
    rng = np.random.default_rng(seed)
    shape, color = shapes[int(rng.integers(len(shapes)))], colors[int(rng.integers(len(colors)))]
    picture = draw_picture(rng, size=size, shape=shape, color=color)
    subject = f"the image with the {shape}"
    return Needle(image=picture, question=FIND.format(shape=shape), answer=color, subject=subject)


def chance_of(lookalikes: int) -> float:
    """Share of drawn needles that a guess gets right."""
    return 1 / (len(COLORS) - (LOOKALIKE_COLORS if lookalikes else 0))


def read_needles(folder: Path) -> tuple[list[Needle], list[Needle]]:
    """Needles and look-alikes of a folder: one .jsonl file of `{"image", "question", "answer"}`, images beside it.

    A line with `"distractor": true` is a look-alike and needs its image only. Raises InputError naming the line for
    malformed JSON, a missing key, an unreadable image or an empty answer.
    """
    lists = sorted(folder.glob("*.jsonl"))
    if len(lists) != 1:
        raise InputError(f"{len(lists)} .jsonl files", where=folder, fix="a needle folder has one, and its images")
    needles: tuple[list[Needle], list[Needle]] = ([], [])
    for where, row in read_records(lists[0]):
        try:
            image, is_distractor = folder / row["image"], row.get("distractor") is True
            question, answer = ("", "") if is_distractor else (str(row["question"]), str(row["answer"]))
        except (KeyError, TypeError, AttributeError):
            raise InputError(
                "not an object with image, question and answer", where=where, fix="mend the line"
            ) from None
        if not answer.strip() and not is_distractor:
            raise InputError("an empty answer", where=where, fix="mend the line")
        subject = f'the image that answers the question "{question}"'
        needles[is_distractor].append(
            Needle(image=open_image(image), question=question, answer=answer.strip(), subject=subject)
        )
    return needles


class Layout(Protocol):
    """How numbered pictures become ids over the extended vocabulary: haystack frames first, then what is inserted."""

    mark: str
    """The token that stands for a video in a chat's text."""
    unit: int
    """Frames that the model merges: an inserted picture is shown that often, and stands between whole units."""
    facts: dict[str, Any]
    """What of it decides a result, for the rows' keys."""

    def ids(self, pictures: np.ndarray) -> np.ndarray:
        """The visual block of these pictures, with all that belongs to it."""


class EvenFrames:
    """LlavaOnevision: every frame has as many tokens, and one newline closes the block (see `visual_table`)."""

    mark, unit = VIDEO_TOKEN, 1

    def __init__(self, *, vocabulary: int, per_frame: int, shown: int) -> None:
        """`shown` pictures in all, of `per_frame` tokens each; ids from `vocabulary` on are rows of the table."""
        self._vocabulary, self._per_frame, self._newline = vocabulary, per_frame, shown * per_frame
        self.facts = {"tokens_per_frame": per_frame}

    def ids(self, pictures: np.ndarray) -> np.ndarray:
        """See `Layout`."""
        rows = pictures[:, None] * self._per_frame + np.arange(self._per_frame)
        return self._vocabulary + np.append(rows.ravel(), self._newline)


class MixedFrames:
    """LlavaOnevision with hybrid resolution: frames differ in their tokens, and one newline closes the block.

    A picture that is inserted has the resolution of the frame in front of which it comes; at the end, of the last one.
    """

    mark, unit = VIDEO_TOKEN, 1

    def __init__(self, *, vocabulary: int, tokens: Sequence[int], sizes: Sequence[int], inserted: int) -> None:
        """`tokens` of each haystack frame; the table then has every inserted picture once in each of `sizes`."""
        self._tokens, self._sizes = np.asarray(tokens), list(sizes)
        self._starts = vocabulary + np.cumsum(self._tokens) - self._tokens
        self._inserted = vocabulary + int(self._tokens.sum())
        self._newline = self._inserted + inserted * sum(sizes)
        self.facts = {"tokens_per_frame": self._sizes}

    def ids(self, pictures: np.ndarray) -> np.ndarray:
        """See `Layout`."""
        hay, count, parts = len(self._tokens), int(self._tokens[-1]), [np.array([self._newline])]
        if (pictures < hay).any():
            count = int(self._tokens[pictures[pictures < hay][-1]])
        for picture in pictures[::-1]:
            if picture < hay:
                count, start = int(self._tokens[picture]), int(self._starts[picture])
            else:
                place = sum(self._sizes[: self._sizes.index(count)])
                start = self._inserted + (int(picture) - hay) * sum(self._sizes) + place
            parts.append(np.arange(start, start + count))
        return np.concatenate(parts[::-1])


class VideoNiah:
    """A picture among a video's frames."""

    modality = "video"

    def __init__(
        self,
        tokenizer: Any,
        needles: Sequence[Needle],
        *,
        layout: Layout,
        frames: int,
        chance: float | None,
        lookalikes: Sequence[Needle] = (),
        seconds: np.ndarray | None = None,
        question: Question = "what",
        tolerance: float = 0.0,
        nested: bool = False,
        loop: bool = False,
        seed: int = 0,
    ) -> None:
        """`frames` haystack frames, a whole number of the layout's units.

        `seconds` is when each frame is shown; `when` asks for that, right within `tolerance` seconds. `lookalikes` go
        to places that `seed` draws, the same in every cell. Raises InputError for an answer that is no token.
        """
        self.tokenizer, self.needles, self.chance = tokenizer, needles, chance
        self.lookalikes, self.question, self.tolerance = lookalikes, question, tolerance
        self.nested, self.loop = nested, loop
        self.forcible = question == "what"
        self.spare = 2 if self.forcible else 16
        self._seconds = np.arange(frames) if seconds is None else seconds[:frames]
        self._frames, self.layout = frames, layout
        self._spread = self._longest = 0
        self._places = np.random.default_rng([seed, 1 << 20, 1 << 20]).random(len(lookalikes))
        self._chat = functools.cache(lambda question: chat_ids(tokenizer, question, mark=layout.mark))
        self._asking = functools.cache(lambda question, answer: answer_ids(tokenizer, question, answer, layout.mark))
        for needle in needles:
            if not self._ids(needle.answer):
                raise InputError(f"the answer {needle.answer!r} is no token of this model", fix="change the needle")

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def cells(self, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
        """See `Niah.cells`. Raises InputError for more frames than the haystack has, UsageError for too few needles."""
        self._spread, self._longest = min(lengths), max(lengths)
        unit = self.layout.unit
        if any(length % unit for length in lengths):
            raise UsageError(f"--lengths: this model merges {unit} frames", fix=f"give multiples of {unit}")
        if self._longest > self._frames and not self.loop:
            raise InputError(
                f"{self._longest} frames are beyond the haystack (it has {self._frames})",
                fix="give more --frames, or --loop to repeat them",
            )
        if trials > len(self.needles):
            raise UsageError(f"--trials {trials} with {len(self.needles)} needles")
        cells = []
        for length in lengths:
            for depth, point, at in insertion_points(depths, length, self._longest, self.nested, unit):
                for trial, needle in enumerate(self.needles[:trials]):
                    question, answer = self._asked(needle, at, length)
                    cells.append(
                        Cell(
                            length=length,
                            depth=depth,
                            point=point,
                            trial=trial,
                            position=at,
                            needle=needle.digest,
                            question=question,
                            answer=answer,
                        )
                    )
        return cells

    def _asked(self, needle: Needle, at: int, length: int) -> tuple[str, str]:
        if self.question == "what":
            return needle.question, needle.answer
        first, last = self._second(0), self._second(length - 1)
        # Between two frames: in the middle of their times. At an end: with the one neighbour it has.
        second = (self._second(max(at - 1, 0)) + self._second(min(at, length - 1))) / 2
        return WHEN.format(first=_said(first), last=_said(last), subject=needle.subject), _said(second)

    def _second(self, frame: int) -> float:
        """When a frame is shown; a haystack that is repeated goes on a step after its last frame."""
        turns, i = divmod(frame, self._frames)
        step = (self._seconds[-1] - self._seconds[0]) / max(self._frames - 1, 1)
        return float(self._seconds[i] + turns * (self._seconds[-1] - self._seconds[0] + step))

    def sequence(self, cell: Cell) -> tuple[np.ndarray, int]:
        """See `Niah.sequence`."""
        before, after, answer = self._asking(cell.question, cell.answer)
        unit = self.layout.unit
        hay = np.resize(np.arange(self._frames), cell.length)
        # Look-alikes stand where all lengths have them if they are to share what they read.
        spread = self._spread if self.nested else cell.length
        others = self._frames + len(self.needles) + np.arange(len(self.lookalikes))
        pieces = [(int(f * spread) // unit * unit, int(n)) for f, n in zip(self._places, others, strict=True)]
        pieces.append((cell.position, self._frames + cell.trial))
        film = np.concatenate(splice(hay, [(at, np.repeat(number, unit)) for at, number in pieces]))
        return np.concatenate([before, self.layout.ids(film), after, answer]).astype(np.int64), len(answer)

    def judge(self, cell: Cell, written: str) -> float:
        """See `Niah.judge`."""
        if self.question == "what":
            return float(begins_with(written, cell.answer))
        number = first_number(written)
        return float(number is not None and abs(number - float(cell.answer)) <= self.tolerance)

    def prompt(self) -> dict[str, Any]:
        """See `Niah.prompt`."""
        before, after = self._chat(FIND if self.question == "what" else WHEN)
        facts: dict[str, Any] = {"chat": [*before, *after], **self.layout.facts}
        if self.question == "when":
            facts["tolerance"] = self.tolerance
        if self.lookalikes:
            facts["lookalikes"] = [needle.digest for needle in self.lookalikes]
            facts["places"] = [round(float(f), 9) for f in self._places]
            facts["spread"] = self._spread if self.nested else None
        if self.nested:
            facts["longest"] = self._longest
        return facts


def _said(second: float) -> str:
    """Seconds with at most two decimals: 12, 12.5."""
    return f"{second:.2f}".rstrip("0").rstrip(".")


def visual_table(hay_NE: Tensor, needles_NE: Tensor, newline_1E: Tensor) -> Tensor:
    """The rows that a `VideoNiah`'s ids point into: haystack, needles and look-alikes, then the newline."""
    return torch.cat([hay_NE, needles_NE, newline_1E])
