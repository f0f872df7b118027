"""Needles of a video test: drawn or given images, with questions that only they answer.

The question about a drawn needle, "What color is the {shape}?", has one answer as long as no other image has that
shape. A distractor is therefore another shape in another color, drawn the same way: a model that only notices a drawn
image answers with the distractor's color and is wrong. Distractors share no shape or color with any needle, and since
this divides the ten colors, guessing is right once in seven instead of once in ten.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import comb, factorial
from statistics import mean
from typing import Literal

import numpy as np
from PIL import Image

from lvctx.eval.niah.niah_config import NeedleQuestion
from lvctx.eval.niah.text_needles import CITIES
from lvctx.video.drawn_images import COLORS, SHAPES, draw_blank, draw_image, paint
from lvctx.video.drawn_text import paint_text

FIND = "Find the image with the {shape}. What color is the {shape}?"
"""The question about a drawn needle; only the image contains the answer."""
READ = "Find the image with the word {key}. Which code is written below the word? Answer with the code alone."
"""The question about drawn text."""
CODE_LETTERS, CODE_LENGTH = "ACDEFHJKLMNPRTUVWXY3479", 5
"""Characters of a code, of which no two are easily taken for each other, and their number."""
DISTRACTOR_SHAPES, DISTRACTOR_COLORS = 4, 3
"""Numbers of shapes and colors reserved for distractors."""
Placing = Literal["ends", "even", "window"]
"""Image j of k is before frame j n / (k - 1) of n (ends: VideoChat-Flash), after frame j (n - 1) / (k - 1) (even:
V-RULER's counting and ordering), or before one drawn from the n `WINDOW` frames after the cell's depth (window: its
multi-key multi-value); all rounded down, and frames counted from 0.
"""
WINDOW = 0.2
"""V-RULER: the step of its depths, within which the images of a question are."""


@dataclass(frozen=True, kw_only=True)
class ImageNeedle:
    """An image that is not in the haystack, and a question that only it answers."""

    image: Image.Image
    question: str
    answer: str
    subject: str
    """A description of the image that does not contain the answer."""
    shape: str = ""
    """Name of the drawn shape; empty for other images."""
    next_shape: str = ""
    """The shape that is named in the image (hops)."""

    @property
    def digest(self) -> str:
        """Sixteen hex digits of its pixels."""
        return hashlib.sha256(f"{self.image.size}".encode() + self.image.tobytes()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class SpreadNeedles:
    """A question about several images that are spread over the whole video, or over a part of it."""

    images: tuple[int, ...]
    """Numbers of the images, in the order of the video; there may be none, where they are counted."""
    question: str
    answer: str
    placing: Placing
    part: str = ""
    """What VideoChat-Flash calls the question in its scores: caption or qa."""

    def positions(self, length: int, first: int, seed: Sequence[int]) -> list[int]:
        """How many frames of a haystack of `length` are before each image; a window begins at `first`."""
        k = len(self.images)
        if self.placing == "ends":
            return [j * length // max(k - 1, 1) for j in range(k)]
        if self.placing == "even":
            return [1 + int(frame) for frame in np.linspace(0, length - 1, k)]
        end = min(first + max(int(WINDOW * length), 1), length)
        return sorted(np.random.default_rng(list(seed)).integers(first, end, k).tolist())


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

    spread: list[SpreadNeedles] = field(default_factory=list)
    """The questions, if each is about several images of the list that have places of their own."""

    @property
    def has_depths(self) -> bool:
        """Whether the depths of the cells decide where needles are."""
        return not self.spread or self.spread[0].placing == "window"

    @property
    def trials(self) -> int:
        """The number of trials that the needles are enough for."""
        if self.spread:
            return len(self.spread)
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
    """Several needles a trial, needles of several frames, or needles with text.

    The needles of a trial have different colors, and different shapes except where they are to be counted or all values
    of one shape are asked for. The frames of a
    needle are its shape at different places of one background. With hops every needle also names the shape of another
    one, in a cycle through all of them, whose order is not that of the video; distractors name each other. Needles
    with a code have a word and a code in place of a shape. Chance: a color (what, hops), a number from 1 to
    `per_trial` (count), an order of the needles (order), as many colors as there are needles (values), a code (code).
    """
    others: list[ImageNeedle] = []
    if question == "code":
        needles, others = _codes(trials, per_trial, frames, size, seed, distractors)
    else:
        shapes, colors, reserved = _palettes(seed, distractors)
        needles = []
        for trial in range(trials):
            needles += _shapes_of_trial(trial, per_trial, frames, question, size, seed, (shapes, colors))
        for i in range(distractors):
            drawn = _drawn([seed, 1 << 20, i], size, *reserved)
            if question == "hops":
                named = [shape for shape in reserved[0] if shape != drawn.shape]
                rng = np.random.default_rng([seed, 1 << 20, i, 1])
                drawn = _naming(rng, drawn, str(rng.choice(named)))
            others.append(drawn)
    chance = {
        "count": 1 / per_trial,
        "order": 1 / factorial(per_trial),
        "values": 1 / comb(_colors_left(distractors), per_trial),
        "code": len(CODE_LETTERS) ** -CODE_LENGTH,
        **dict.fromkeys(("what", "hops"), chance_of(distractors)),
    }
    return NeedleSet(
        needles=needles,
        distractors=others,
        chance=chance.get(question),
        per_trial=per_trial,
        frames=frames,
    )


def _shapes_of_trial(
    trial: int,
    per_trial: int,
    frames: int,
    question: NeedleQuestion,
    size: int,
    seed: int,
    palette: tuple[list[str], list[str]],
) -> list[ImageNeedle]:
    """The images of a trial's needles, from shapes and colors."""
    rng = np.random.default_rng([seed, trial, 1])
    chosen = [str(shape) for shape in rng.permutation(palette[0])[:per_trial]]
    chosen = chosen[:1] * per_trial if question in ("count", "values") else chosen
    hues = [str(color) for color in rng.permutation(palette[1])[:per_trial]]
    cycle = [0, *(1 + np.random.default_rng([seed, trial, 2]).permutation(per_trial - 1)).tolist()]
    needles = []
    for i, (shape, color) in enumerate(zip(chosen, hues, strict=True)):
        needle = _needle(draw_blank(rng, size=size), shape, color)
        for _ in range(frames):
            image = np.array(needle.image)
            paint(rng, image, shape=shape, color=color)
            drawn = replace(needle, image=Image.fromarray(image))
            following = chosen[cycle[(cycle.index(i) + 1) % per_trial]]
            needles.append(_naming(rng, drawn, following) if question == "hops" else drawn)
    return needles


def _naming(rng: np.random.Generator, needle: ImageNeedle, shape: str) -> ImageNeedle:
    """The needle with the name of a shape written on it."""
    image = np.array(needle.image)
    paint_text(rng, image, f"next: {shape}", width=0.6)
    return replace(needle, image=Image.fromarray(image), next_shape=shape)


def _codes(
    trials: int, per_trial: int, frames: int, size: int, seed: int, distractors: int
) -> tuple[list[ImageNeedle], list[ImageNeedle]]:
    """Needles and distractors with a word and a code: the words of distractors are on no needle."""
    words = [str(word) for word in np.random.default_rng([seed, 1 << 20]).permutation(CITIES)]

    def draw(rng: np.random.Generator, key: str, count: int) -> list[ImageNeedle]:
        code = "".join(rng.choice(list(CODE_LETTERS), CODE_LENGTH))
        background = draw_blank(rng, size=size)
        images = []
        for _ in range(count):
            image = np.array(background)
            paint_text(rng, image, f"{key}\n{code}")
            images.append(Image.fromarray(image))
        facts = {"question": READ.format(key=key), "answer": code, "subject": f"the image with the word {key}"}
        return [ImageNeedle(image=image, **facts) for image in images]

    needles = []
    for trial in range(trials):
        rng = np.random.default_rng([seed, trial, 1])
        for key in rng.permutation(words[distractors:])[:per_trial]:
            needles += draw(rng, str(key), frames)
    rngs = (np.random.default_rng([seed, 1 << 20, i]) for i in range(distractors))
    return needles, [draw(rng, key, 1)[0] for rng, key in zip(rngs, words, strict=False)]


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


def _colors_left(distractors: int) -> int:
    """Number of colors that a needle may have."""
    return len(COLORS) - (DISTRACTOR_COLORS if distractors else 0)


def chance_of(distractors: int) -> float:
    """Accuracy of guessing for drawn needles."""
    return 1 / _colors_left(distractors)


def chance_of_options(questions: Sequence[tuple[str, str]]) -> float | None:
    """Accuracy of guessing for questions with lettered options and their answers; None if one has none."""
    shares = []
    for question, answer in questions:
        letters = set(re.findall(r"(?:^|\n|Options: )\(?([A-Z])[.)]", question))
        if not (found := re.match(r"\(?([A-Z])\b", answer)) or found[1] not in letters:
            return None
        shares.append(1 / len(letters))
    return mean(shares) if shares else None
