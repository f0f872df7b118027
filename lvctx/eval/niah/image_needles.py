"""Needles of a video test: drawn or given images, with questions that only they answer.

The question about a drawn needle, "What color is the {shape}?", has one answer as long as no other image has that
shape. A distractor is therefore another shape in another color, drawn the same way: a model that only notices a drawn
image answers with the distractor's color and is wrong. Distractors share no shape or color with any needle, and since
this divides the ten colors, guessing is right once in seven instead of once in ten.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lvctx.data.records import read_records
from lvctx.errors import InputError
from lvctx.models.image_processing import open_image
from lvctx.video.drawn_images import COLORS, SHAPES, draw_image

FIND = "Find the image with the {shape}. What color is the {shape}?"
"""The question about a drawn needle; only the image contains the answer."""
DISTRACTOR_SHAPES, DISTRACTOR_COLORS = 4, 3
"""Numbers of shapes and colors reserved for distractors."""


@dataclass(frozen=True, kw_only=True)
class ImageNeedle:
    """An image that is not in the haystack, and a question that only it answers."""

    image: Image.Image
    question: str
    answer: str
    subject: str
    """A description of the image that does not contain the answer."""

    @property
    def digest(self) -> str:
        """Sixteen hex digits of its pixels."""
        return hashlib.sha256(f"{self.image.size}".encode() + self.image.tobytes()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class NeedleSet:
    """Needles and distractors."""

    needles: list[ImageNeedle]
    distractors: list[ImageNeedle]
    chance: float | None = None
    """Accuracy of guessing; None if it is not known."""


def drawn_needles(count: int, *, size: int, seed: int, distractors: int = 0) -> NeedleSet:
    """`count` seeded images of one colored shape, and `distractors` of other shapes in other colors."""
    shapes, colors = list(SHAPES), list(COLORS)
    reserved: tuple[list[str], list[str]] = ([], [])
    if distractors:
        shuffled = np.random.default_rng([seed, 1 << 20])
        shapes, colors = ([str(name) for name in shuffled.permutation(names)] for names in (shapes, colors))
        reserved = shapes[:DISTRACTOR_SHAPES], colors[:DISTRACTOR_COLORS]
        shapes, colors = shapes[DISTRACTOR_SHAPES:], colors[DISTRACTOR_COLORS:]
    needles = [_drawn([seed, trial], size, shapes, colors) for trial in range(count)]
    distractor_images = [_drawn([seed, 1 << 20, i], size, *reserved) for i in range(distractors)]
    return NeedleSet(needles=needles, distractors=distractor_images, chance=chance_of(distractors))


def _drawn(seed: list[int], size: int, shapes: list[str], colors: list[str]) -> ImageNeedle:
    rng = np.random.default_rng(seed)
    shape, color = shapes[int(rng.integers(len(shapes)))], colors[int(rng.integers(len(colors)))]
    image = draw_image(rng, size=size, shape=shape, color=color)
    subject = f"the image with the {shape}"
    return ImageNeedle(image=image, question=FIND.format(shape=shape), answer=color, subject=subject)


def chance_of(distractors: int) -> float:
    """Accuracy of guessing for drawn needles."""
    return 1 / (len(COLORS) - (DISTRACTOR_COLORS if distractors else 0))


def read_needles(folder: Path) -> NeedleSet:
    """Needles and distractors of a folder: one .jsonl file of `{"image", "question", "answer"}`, and the images.

    A line with `"distractor": true` is a distractor and needs only its image. Raises InputError naming the line for
    malformed JSON, a missing key, an unreadable image or an empty answer.
    """
    lists = sorted(folder.glob("*.jsonl"))
    if len(lists) != 1:
        raise InputError(f"{len(lists)} .jsonl files", where=folder, fix="a needle folder has one, and its images")
    needles: tuple[list[ImageNeedle], list[ImageNeedle]] = ([], [])
    for where, row in read_records(lists[0]):
        try:
            image, is_distractor = folder / row["image"], row.get("distractor") is True
            question, answer = ("", "") if is_distractor else (str(row["question"]), str(row["answer"]))
        except (KeyError, TypeError, AttributeError):
            raise InputError(
                "not an object with image, question and answer", where=where, fix="correct the line"
            ) from None
        if not answer.strip() and not is_distractor:
            raise InputError("an empty answer", where=where, fix="correct the line")
        subject = f'the image that answers the question "{question}"'
        needles[is_distractor].append(
            ImageNeedle(image=open_image(image), question=question, answer=answer.strip(), subject=subject)
        )
    return NeedleSet(needles=needles[False], distractors=needles[True])
