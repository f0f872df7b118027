"""Needle in a haystack, text and video (V-NIAH, LongVA section 4): cells, and the insertion points of needles.

A cell is a haystack length, a depth and a trial. Its sequence is the haystack with the needle inserted at
int(depth * haystack), then the question, then the answer. It is right if every answer token is the model's most likely
token, or if the generated text is judged to be the answer.

Insertion points of different lengths are different positions of the haystack, so two lengths share computation only
up to the earlier point. `nested` points are positions of the longest haystack; a shorter one has those within it and
its own end. Then the tokens after a point are shared as well, so a grid of any number of lengths computes little more
than its longest haystack.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lvctx.eval.niah.niah_config import Scoring


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One test."""

    length: int
    """Text: tokens of the whole sequence, or of the haystack (`length_of`). Video: frames of the haystack."""
    depth: float | None
    """Depth of the needle, 0 (start) to 1 (end): as given, or the actual one if nested; None without a needle."""
    trial: int
    """Which needle."""
    position: int
    """Insertion point: number of haystack tokens (text) or frames (video) before it."""
    point: float | None = None
    """Nested: the position as a share of the longest haystack; 1 is this haystack's own end."""
    needle: str
    """The needle: the sentence (text), or the hash of the image's pixels (video); empty without a needle."""
    question: str
    """The question."""
    answer: str
    """The right answer."""

    @property
    def place(self) -> str:
        """Length and depth for a progress line."""
        return f"{self.length}" if self.depth is None else f"{self.length} at {100 * self.depth:g}%"


class NeedleTask(Protocol):
    """A modality: its cells and their sequences."""

    modality: str
    chance: float | None
    """Accuracy of guessing; None if it is not known."""
    can_force: bool
    """Whether the answer has a single form, so that teacher forcing can score it."""

    def cells(self, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
        """Every cell of a grid."""

    def sequence(self, cell: Cell) -> tuple[np.ndarray, int]:
        """Ids over the extended vocabulary, and the number of answer tokens at the end."""

    def max_new_tokens(self, answer: int) -> int:
        """Tokens to generate for an answer of `answer` tokens."""

    def score_text(self, cell: Cell, generated: str) -> float:
        """Share of the answer in the generated text, 0 to 1."""

    def prompt(self) -> dict[str, Any]:
        """The part of the prompt common to all cells, for the rows' keys."""


def insertion_points(
    depths: Sequence[float], haystack_length: int, longest: int, nested: bool, unit: int = 1
) -> Iterator[tuple[float, float | None, int]]:
    """Depth, point (see `Cell`) and position of each needle in a haystack; `longest` is the longest haystack's length.

    Positions are multiples of `unit`, rounded down.
    """
    for depth in depths:
        if not nested:
            yield depth, None, int(depth * haystack_length) // unit * unit
        elif depth == 1:
            yield 1.0, 1.0, haystack_length
        elif (position := int(depth * longest) // unit * unit) < haystack_length:
            yield round(position / haystack_length, 4), depth, position


def splice(haystack: np.ndarray, pieces: Iterable[tuple[int, Any]]) -> list[Any]:
    """The parts of a haystack with pieces inserted at positions; at equal positions the earlier piece comes first."""
    parts, last = [], 0
    for position, piece in sorted(pieces, key=lambda p: p[0]):
        parts += [haystack[last:position], piece]
        last = position
    return [*parts, haystack[last:]]


def normalize(text: str) -> str:
    """Lower case, single spaces, no space at the ends, for comparing answers."""
    return " ".join(text.lower().split())


def is_same_text(scoring: Scoring, predicted: str, answer: str) -> bool:
    """Whether the most likely tokens of teacher forcing, as text, are the answer.

    Lower case; LongVILA's script (llava/eval/vision_niah_vila/eval_vision_niah.py; its first version compared tokens)
    leaves spaces out, VideoChat-Flash's (single_eval_vision_niah.py and multi_) the brackets of what is predicted.
    """
    predicted, answer = predicted.lower(), answer.lower()
    if scoring == "longvila":
        return predicted.replace(" ", "") == answer.replace(" ", "")
    return predicted.replace("(", "").replace(")", "") == answer


def begins_with(generated: str, answer: str) -> bool:
    """Whether the generated text begins with the answer."""
    return normalize(generated).startswith(normalize(answer))


def share_listed(generated: str, answers: Sequence[str]) -> float:
    """Share of the answers that are in the generated text as whole words (RULER's string match over all)."""
    words = set(re.findall(r"\w+", generated.lower()))
    return sum(answer.lower() in words for answer in answers) / len(answers)


def first_number(generated: str) -> float | None:
    """The first number in a text; None if there is none."""
    match = re.search(r"\d+(?:\.\d+)?", generated.replace(",", ""))
    return float(match[0]) if match else None
