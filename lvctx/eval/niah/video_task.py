"""Video needles (V-NIAH, LongVA section 4): an image among a video's frames, and distractors beside it (V-NIAH-D)."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lvctx.errors import InputError, UsageError
from lvctx.eval.niah.image_needles import FIND, ImageNeedle, NeedleSet
from lvctx.eval.niah.needle_task import Cell, begins_with, first_number, insertion_points, splice
from lvctx.eval.niah.niah_config import NeedleQuestion
from lvctx.models.vlm_assembly import answer_ids, chat_ids
from lvctx.vlm.base import VisualTokens, prompt_tail

WHEN = (
    "The video goes from second {first} to second {last}. Find {subject}. At which second is it shown? "
    "Answer with the number alone."
)
"""The question for the time: a frame carries none, so the model has to know its position in the video."""


class VideoNeedleTask:
    """An image among a video's frames."""

    modality = "video"

    def __init__(
        self,
        tokenizer: Any,
        needles: NeedleSet,
        tokens: VisualTokens,
        *,
        seconds: np.ndarray,
        question: NeedleQuestion = "what",
        tolerance: float = 0.0,
        nested: bool = False,
        loop: bool = False,
        seed: int = 0,
    ) -> None:
        """`seconds` is when each haystack frame is shown, of a whole number of the model's grids.

        The question `when` asks for it, right within `tolerance` seconds. Distractors go to places that `seed` draws,
        the same in every cell. Raises InputError for an answer that is no token.
        """
        self.tokenizer, self.tokens, self.chance = tokenizer, tokens, needles.chance
        self.needles, self.distractors = needles.needles, needles.distractors
        self.question, self.tolerance, self.nested, self.loop = question, tolerance, nested, loop
        self.can_force = question == "what"
        self.extra_tokens = 2 if self.can_force else 16
        self._seconds, self._frames = seconds, len(seconds)
        self._spread = self._longest = 0
        self._distractor_fractions = np.random.default_rng([seed, 1 << 20, 1 << 20]).random(len(self.distractors))
        self._chat, self._prompt_ids = functools.cache(self._question_ids), functools.cache(self._answer_ids)
        for needle in self.needles:
            if not self._ids(needle.answer):
                raise InputError(f"the answer {needle.answer!r} is no token of this model", fix="change the needle")

    def _question_ids(self, question: str) -> tuple[list[int], list[int]]:
        """Ids before and after the frames."""
        if (tail := prompt_tail(self.tokens)) is not None:
            return [], tail([question])[0]
        return chat_ids(self.tokenizer, question, mark=self.tokens.placeholder)

    def _answer_ids(self, question: str, answer: str) -> tuple[list[int], list[int], list[int]]:
        """The same, and ids of the answer."""
        if (tail := prompt_tail(self.tokens)) is not None:
            return [], *tail([question], answer)
        return answer_ids(self.tokenizer, question, answer, self.tokens.placeholder)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def cells(self, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
        """See `NeedleTask.cells`. Raises InputError for too few frames, UsageError for too few needles."""
        self._spread, self._longest = min(lengths), max(lengths)
        unit = self.tokens.frames_per_grid
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
            for depth, point, position in insertion_points(depths, length, self._longest, self.nested, unit):
                for trial, needle in enumerate(self.needles[:trials]):
                    question, answer = self._question_and_answer(needle, position, length)
                    cells.append(
                        Cell(
                            length=length,
                            depth=depth,
                            point=point,
                            trial=trial,
                            position=position,
                            needle=needle.digest,
                            question=question,
                            answer=answer,
                        )
                    )
        return cells

    def _question_and_answer(self, needle: ImageNeedle, position: int, length: int) -> tuple[str, str]:
        if self.question == "what":
            return needle.question, needle.answer
        first, last = self._second(0), self._second(length - 1)
        # Between two frames: in the middle of their times. At an end: with the one neighbour it has.
        second = (self._second(max(position - 1, 0)) + self._second(min(position, length - 1))) / 2
        return WHEN.format(first=_two_decimals(first), last=_two_decimals(last), subject=needle.subject), _two_decimals(
            second
        )

    def _second(self, frame: int) -> float:
        """When a frame is shown; a haystack that is repeated goes on a step after its last frame."""
        repeats, i = divmod(frame, self._frames)
        step = (self._seconds[-1] - self._seconds[0]) / max(self._frames - 1, 1)
        return float(self._seconds[i] + repeats * (self._seconds[-1] - self._seconds[0] + step))

    def sequence(self, cell: Cell) -> tuple[np.ndarray, int]:
        """See `NeedleTask.sequence`."""
        prefix, suffix, answer = self._prompt_ids(cell.question, cell.answer)
        unit = self.tokens.frames_per_grid
        haystack = np.resize(np.arange(self._frames), cell.length)
        # Distractors are placed where all lengths have them if prefixes are to be shared.
        spread = self._spread if self.nested else cell.length
        distractor_numbers = self._frames + len(self.needles) + np.arange(len(self.distractors))
        pieces = [
            (int(f * spread) // unit * unit, int(n))
            for f, n in zip(self._distractor_fractions, distractor_numbers, strict=True)
        ]
        pieces.append((cell.position, self._frames + cell.trial))
        order = np.concatenate(splice(haystack, [(position, np.repeat(number, unit)) for position, number in pieces]))
        return np.concatenate([prefix, self.tokens.ids(order), suffix, answer]).astype(np.int64), len(answer)

    def score_text(self, cell: Cell, generated: str) -> float:
        """See `NeedleTask.score_text`."""
        if self.question == "what":
            return float(begins_with(generated, cell.answer))
        number = first_number(generated)
        return float(number is not None and abs(number - float(cell.answer)) <= self.tolerance)

    def prompt(self) -> dict[str, Any]:
        """See `NeedleTask.prompt`."""
        prefix, suffix = self._chat(FIND if self.question == "what" else WHEN)
        facts: dict[str, Any] = {"chat": [*prefix, *suffix], **self.tokens.facts}
        if self.question == "when":
            facts["tolerance"] = self.tolerance
        if self.distractors:
            facts["distractors"] = [needle.digest for needle in self.distractors]
            facts["places"] = [round(float(f), 9) for f in self._distractor_fractions]
            facts["spread"] = self._spread if self.nested else None
        if self.nested:
            facts["longest"] = self._longest
        return facts


def _two_decimals(second: float) -> str:
    """Seconds with at most two decimals: 12, 12.5."""
    return f"{second:.2f}".rstrip("0").rstrip(".")
