"""Video needles without a model's tokens: which frames a cell has in which order, and what is asked about them."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lvctx.artifacts.result_log import short_hash
from lvctx.errors import InputError, UsageError
from lvctx.eval.niah.image_needles import FIND, READ, NeedleSet
from lvctx.eval.niah.needle_task import Cell, begins_with, first_number, insertion_points, share_listed, splice
from lvctx.eval.niah.niah_config import NeedleQuestion
from lvctx.video.drawn_images import COLORS

WHEN = (
    "The video goes from second {first} to second {last}. Find {subject}. At which second is it shown? "
    "Answer with the number alone."
)
"""The question for the time: frames have no timestamps, so the model has to use positions in the video."""
HOW_MANY = "How many different images with a {shape} does the video have? Answer with the number alone."
WHICH_ORDER = (
    "The video has images with these shapes: {shapes}. In which order are they shown? Answer with their names alone, "
    "separated by commas."
)
WHICH_VALUES = (
    "The video has {count} images with a {shape}. Which colors does the {shape} have in them? Answer with the colors "
    "alone, separated by commas."
)
FOLLOW = (
    "Find the image with the {shape}. Every image with a shape names the shape of the next image. Go from image to "
    "image for {hops}. What color is the shape of the image where you arrive?"
)
DISTANCE = 200
"""V-NIAH-D: frames from a needle to its distractor."""
TEMPLATES: dict[NeedleQuestion, str] = {
    "what": FIND,
    "when": WHEN,
    "count": HOW_MANY,
    "order": WHICH_ORDER,
    "values": WHICH_VALUES,
    "hops": FOLLOW,
    "code": READ,
}


class FrameNeedles:
    """Images among a video's frames, and distractors beside them."""

    modality = "video"

    def __init__(
        self,
        needles: NeedleSet,
        *,
        seconds: np.ndarray,
        unit: int = 1,
        question: NeedleQuestion = "what",
        tolerance: float = 0.0,
        nested: bool = False,
        loop: bool = False,
        seed: int = 0,
    ) -> None:
        """`seconds` are the timestamps of the haystack frames; the model merges `unit` frames.

        The question `when` asks for the time, right within `tolerance` seconds. Distractor positions are drawn from
        `seed` and are the same in every cell. The first needle of a trial is at the cell's depth, the others are at
        even distances from it, around the end of the haystack.
        """
        self.chance, self.unit = needles.chance, unit
        self.needles, self.distractors, self._set = needles.needles, needles.distractors, needles
        self.question, self.tolerance, self.nested, self.loop = question, tolerance, nested, loop
        self.can_force = question not in ("when", "values")
        self._seed = seed
        self._seconds, self._frames = seconds, len(seconds)
        self._spread = self._longest = 0
        self._distractor_fractions = np.random.default_rng([seed, 1 << 20, 1 << 20]).random(len(self.distractors))

    @property
    def trials(self) -> int:
        """The largest number of trials."""
        return self._set.trials

    def cells(self, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
        """See `NeedleTask.cells`. Raises InputError for too few frames, UsageError for too few needles."""
        self._spread, self._longest = min(lengths), max(lengths)
        unit = self.unit
        if any(length % unit for length in lengths):
            raise UsageError(f"--lengths: this model merges {unit} frames", fix=f"give multiples of {unit}")
        if self._longest > self._frames and not self.loop:
            raise InputError(
                f"{self._longest} frames exceed the haystack (it has {self._frames})",
                fix="give more --frames, or --loop to repeat them",
            )
        if trials > self.trials:
            raise UsageError(f"--trials {trials} with {self.trials} needles")
        cells = []
        for length in lengths:
            points: Iterable[tuple[float | None, float | None, int]] = [(None, None, 0)]
            if self._set.has_depths:
                points = insertion_points(depths, length, self._longest, self.nested, unit)
            if self._set.spread:  # V-RULER's script leaves out a window that begins at the end
                points = [point for point in points if point[2] < length]
            for depth, point, position in points:
                for trial in range(trials):
                    question, answer = self._question_and_answer(trial, position, length)
                    cells.append(
                        Cell(
                            length=length,
                            depth=depth,
                            point=point,
                            trial=trial,
                            position=position,
                            needle=self.digest(trial),
                            question=question,
                            answer=answer,
                        )
                    )
        return cells

    def _used(self, trial: int) -> int:
        """Needles of a trial that are in the video: from 1 to all in turn where they are to be counted."""
        if self._set.spread:
            return len(self._set.spread[trial].images)
        return trial % self._set.per_trial + 1 if self.question == "count" else self._set.per_trial

    def _numbers(self, trial: int, needle: int) -> range:
        """Numbers of a needle's images."""
        number = self._set.spread[trial].images[needle] if self._set.spread else trial * self._set.per_trial + needle
        first = number * self._set.frames
        return range(first, first + self._set.frames)

    def first_image(self, trial: int) -> Image.Image | None:
        """The first image of a trial's first needle; None for a trial without one."""
        return self.needles[self._numbers(trial, 0)[0]].image if self._used(trial) else None

    def _distractors(self, cell: Cell) -> list[tuple[int, int]]:
        """Position and number of each distractor of a cell."""
        first = self._frames + len(self.needles)
        if self._set.paired and self.distractors:
            position = beside(cell.position, cell.length, [self._seed, cell.trial, cell.length, cell.position])
            return [] if position is None else [(position // self.unit * self.unit, first + cell.trial)]
        # They have the same positions for all lengths if prefixes are to be shared.
        spread = self._spread if self.nested else cell.length
        positions = [int(f * spread) // self.unit * self.unit for f in self._distractor_fractions]
        return [(position, first + i) for i, position in enumerate(positions)]

    def part(self, trial: int) -> dict[str, str]:
        """Which of two questions about the same images a trial is, for its row (VideoChat-Flash); empty for others."""
        part = self._set.spread[trial].part if self._set.spread else ""
        return {"part": part} if part else {}

    def digest(self, trial: int) -> str:
        """What identifies a trial's images."""
        images = [self.needles[n].digest for i in range(self._used(trial)) for n in self._numbers(trial, i)]
        return images[0] if len(images) == 1 else short_hash(images)

    def _places(self, trial: int, position: int, length: int) -> list[tuple[int, int]]:
        """Position and number of each needle of a trial, as they are shown."""
        used = self._used(trial)
        if self._set.spread:
            positions = self._set.spread[trial].positions(length, position, [self._seed, trial, length, position])
            return [(place // self.unit * self.unit, i) for i, place in enumerate(positions)]
        span = self._spread if self.nested else length
        shares = [(position / span + i / used) % 1 for i in range(1, used)]
        others = [int(share * span) // self.unit * self.unit for share in shares]
        return sorted(zip([position, *others], range(used), strict=True), key=lambda place: place[0])

    def _question_and_answer(self, trial: int, position: int, length: int) -> tuple[str, str]:
        if self._set.spread:
            return self._set.spread[trial].question, self._set.spread[trial].answer
        needle = self.needles[self._numbers(trial, 0)[0]]
        if self.question in ("what", "code"):
            return needle.question, needle.answer
        if self.question == "hops":
            return self._follow(trial)
        if self.question == "count":
            return HOW_MANY.format(shape=needle.shape), str(self._used(trial))
        if self.question == "values":
            colors = [self.needles[self._numbers(trial, i)[0]].answer for i in range(self._used(trial))]
            return WHICH_VALUES.format(count=len(colors), shape=needle.shape), ", ".join(colors)
        if self.question == "order":
            shown = [self.needles[self._numbers(trial, i)[0]].shape for _, i in self._places(trial, position, length)]
            return WHICH_ORDER.format(shapes=", ".join(sorted(shown))), ", ".join(shown)
        first, last = self._second(0), self._second(length - 1)
        question = WHEN.format(first=_two_decimals(first), last=_two_decimals(last), subject=needle.subject)
        return question, _two_decimals(self._second_between(position, length))

    def _follow(self, trial: int) -> tuple[str, str]:
        """The question about the needle half-way round the cycle, so that going backwards is no shorter."""
        of_trial = (self.needles[self._numbers(trial, i)[0]] for i in range(self._set.per_trial))
        needles = {needle.shape: needle for needle in of_trial}
        first = needle = next(iter(needles.values()))
        hops = len(needles) // 2
        for _ in range(hops):
            needle = needles[needle.next_shape]
        return FOLLOW.format(shape=first.shape, hops=f"{hops} step{'s' * (hops > 1)}"), needle.answer

    def _second_between(self, position: int, length: int) -> float:
        """Time of an image before the haystack's frame `position`, in seconds.

        Between two frames: the middle of their times. At an end: the time of its neighbour.
        """
        return (self._second(max(position - 1, 0)) + self._second(min(position, length - 1))) / 2

    def _second(self, frame: int) -> float:
        """Time of a frame; a repeated haystack continues one step after its last frame."""
        repeats, i = divmod(frame, self._frames)
        step = (self._seconds[-1] - self._seconds[0]) / max(self._frames - 1, 1)
        return float(self._seconds[i] + repeats * (self._seconds[-1] - self._seconds[0] + step))

    def order(self, cell: Cell) -> np.ndarray:
        """The cell's frames (F,): haystack frames by number, then needles, then distractors."""
        haystack = np.resize(np.arange(self._frames), cell.length)
        pieces = [(position, [number]) for position, number in self._distractors(cell)]
        for position, needle in self._places(cell.trial, cell.position, cell.length):
            pieces.append((position, [self._frames + n for n in self._numbers(cell.trial, needle)]))
        return np.concatenate(
            splice(haystack, [(position, np.repeat(numbers, self.unit)) for position, numbers in pieces])
        )

    def times(self, cell: Cell) -> list[float]:
        """Times of the cell's frames, in seconds; haystack frames keep theirs."""
        times, position = [], 0
        for number in self.order(cell):
            is_haystack = number < self._frames
            times.append(self._second(position) if is_haystack else self._second_between(position, cell.length))
            position += int(is_haystack)
        return times

    def score_text(self, cell: Cell, generated: str) -> float:
        """See `NeedleTask.score_text`."""
        if self.question in ("what", "hops"):
            return float(begins_with(generated, cell.answer))
        if self.question == "code":
            return share_listed(generated, [cell.answer])
        if self.question == "values":  # of all colors that are named or right, so that naming every color is no answer
            said = set(re.findall(rf"\b({'|'.join(COLORS)})\b", generated.lower()))
            right = set(cell.answer.split(", "))
            return len(right & said) / len(right | said)
        if self.question == "order":
            named = re.findall(rf"\b({'|'.join(cell.answer.split(', '))})s?\b", generated.lower())
            return float(list(dict.fromkeys(named)) == cell.answer.split(", "))
        number = first_number(generated)
        if self.question == "count":
            return float(number == float(cell.answer))
        return float(number is not None and abs(number - float(cell.answer)) <= self.tolerance)

    def facts(self) -> dict[str, Any]:
        """What all cells share of the question and the positions, for the rows' keys."""
        facts: dict[str, Any] = {}
        if self._set.per_trial > 1 or self._set.frames > 1:
            facts |= {"needles": self._set.per_trial, "needle_frames": self._set.frames}
            facts |= {"others": self._spread} if self.nested and self._set.per_trial > 1 else {}
        if self._set.spread:
            facts |= {"needles": "spread", "needle_frames": self._set.frames}
            facts |= {"seed": self._seed} if self._set.has_depths else {}
        if self.question == "when":
            facts["tolerance"] = self.tolerance
        if self._set.paired and self.distractors:
            facts |= {"distractors": [needle.digest for needle in self.distractors], "distance": DISTANCE}
            facts["seed"] = self._seed
        elif self.distractors:
            facts["distractors"] = [needle.digest for needle in self.distractors]
            facts["places"] = [round(float(f), 9) for f in self._distractor_fractions]
            facts["spread"] = self._spread if self.nested else None
        if self.nested:
            facts["longest"] = self._longest
        return facts


def beside(position: int, length: int, seed: Sequence[int]) -> int | None:
    """V-NIAH-D: `DISTANCE` frames after or before a needle, from `seed` where both are in the haystack; or none."""
    after, before = position + DISTANCE, position - DISTANCE
    fitting = [place for place in (after, before) if 0 <= place < length]
    return fitting[int(np.random.default_rng(seed).integers(len(fitting)))] if fitting else None


def _two_decimals(second: float) -> str:
    """Seconds with at most two decimals: 12, 12.5."""
    return f"{second:.2f}".rstrip("0").rstrip(".")
