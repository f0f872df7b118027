"""Needles of a video test: drawn or given images, with questions that only they answer.

The question about a drawn needle, "What color is the {shape}?", has one answer as long as no other image has that
shape. A distractor is therefore another shape in another color, drawn the same way: a model that only notices a drawn
image answers with the distractor's color and is wrong. Distractors share no shape or color with any needle, and since
this divides the ten colors, guessing is right once in seven instead of once in ten.
"""

import hashlib
from dataclasses import dataclass, replace
from math import factorial

import numpy as np
from PIL import Image

from lvctx.eval.niah.niah_config import NeedleQuestion
from lvctx.video.drawn_images import COLORS, SHAPES, draw_blank, draw_image, paint

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
    shape: str = ""
    """Name of the drawn shape; empty for images of a folder."""

    @property
    def digest(self) -> str:
        """Sixteen hex digits of its pixels."""
        return hashlib.sha256(f"{self.image.size}".encode() + self.image.tobytes()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class NeedleSet:
    """Needles and distractors."""

    needles: list[ImageNeedle]
    """Every image: trial by trial, needle by needle, frame by frame."""
    distractors: list[ImageNeedle]
    chance: float | None = None
    """Accuracy of guessing; None if it is not known."""
    per_trial: int = 1
    """Needles of a trial."""
    frames: int = 1
    """Images of a needle."""
    paired: bool = False
    """Whether each distractor belongs to the needle of its place in the list, and is inserted near it (V-NIAH-D)."""

    @property
    def trials(self) -> int:
        """The number of trials that the needles are enough for."""
        return len(self.needles) // (self.per_trial * self.frames)


def drawn_needles(count: int, *, size: int, seed: int, distractors: int = 0) -> NeedleSet:
    """`count` seeded images of one colored shape, and `distractors` of other shapes in other colors."""
    shapes, colors, reserved = _palettes(seed, distractors)
    needles = [_drawn([seed, trial], size, shapes, colors) for trial in range(count)]
    distractor_images = [_drawn([seed, 1 << 20, i], size, *reserved) for i in range(distractors)]
    return NeedleSet(needles=needles, distractors=distractor_images, chance=chance_of(distractors))


def drawn_groups(
    trials: int, *, per_trial: int, frames: int, question: NeedleQuestion, size: int, seed: int, distractors: int = 0
) -> NeedleSet:
    """Several needles a trial, or needles of several frames.

    The needles of a trial have different shapes and colors; those to be counted have one shape. The frames of a
    needle are its shape at different places of one background. Chance: a color (what), a number from 1 to `per_trial`
    (count), an order of the needles (order).
    """
    shapes, colors, reserved = _palettes(seed, distractors)
    needles = []
    for trial in range(trials):
        rng = np.random.default_rng([seed, trial, 1])
        chosen = [str(shape) for shape in rng.permutation(shapes)[:per_trial]]
        chosen = chosen[:1] * per_trial if question == "count" else chosen
        hues = [str(color) for color in rng.permutation(colors)[:per_trial]]
        for shape, color in zip(chosen, hues, strict=True):
            needle = _needle(draw_blank(rng, size=size), shape, color)
            for _ in range(frames):
                image = np.array(needle.image)
                paint(rng, image, shape=shape, color=color)
                needles.append(replace(needle, image=Image.fromarray(image)))
    chance = {"count": 1 / per_trial, "order": 1 / factorial(per_trial), "what": chance_of(distractors)}
    return NeedleSet(
        needles=needles,
        distractors=[_drawn([seed, 1 << 20, i], size, *reserved) for i in range(distractors)],
        chance=chance.get(question),
        per_trial=per_trial,
        frames=frames,
    )


def _palettes(seed: int, distractors: int) -> tuple[list[str], list[str], tuple[list[str], list[str]]]:
    """Shapes and colors of needles, and those of distractors."""
    shapes, colors = list(SHAPES), list(COLORS)
    reserved: tuple[list[str], list[str]] = ([], [])
    if distractors:
        shuffled = np.random.default_rng([seed, 1 << 20])
        shapes, colors = ([str(name) for name in shuffled.permutation(names)] for names in (shapes, colors))
        reserved = shapes[:DISTRACTOR_SHAPES], colors[:DISTRACTOR_COLORS]
        shapes, colors = shapes[DISTRACTOR_SHAPES:], colors[DISTRACTOR_COLORS:]
    return shapes, colors, reserved


def _drawn(seed: list[int], size: int, shapes: list[str], colors: list[str]) -> ImageNeedle:
    rng = np.random.default_rng(seed)
    shape, color = shapes[int(rng.integers(len(shapes)))], colors[int(rng.integers(len(colors)))]
    return _needle(draw_image(rng, size=size, shape=shape, color=color), shape, color)


def _needle(image: Image.Image, shape: str, color: str) -> ImageNeedle:
    question, subject = FIND.format(shape=shape), f"the image with the {shape}"
    return ImageNeedle(image=image, question=question, answer=color, subject=subject, shape=shape)


def chance_of(distractors: int) -> float:
    """Accuracy of guessing for drawn needles."""
    return 1 / (len(COLORS) - (DISTRACTOR_COLORS if distractors else 0))
