"""RULER's tasks over a whole context as cells: they have lengths and trials, but no needle and no depth."""

import functools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from lvctx.errors import InputError, UsageError
from lvctx.eval.niah.needle_task import Cell
from lvctx.eval.niah.ruler_texts import RulerPrompt, RulerText


class RulerTask:
    """A text of a kind at each length: the largest that fits in trial 0, with the tokens to be generated after it."""

    modality = "text"
    chance: float | None = None
    can_force = False

    def __init__(self, tokenizer: Any, text: RulerText, *, task: str) -> None:
        """`task` is the name of the kind of `text`."""
        self.tokenizer, self.text, self.task = tokenizer, text, task
        self._size = functools.cache(self._fitting_size)
        self._first_size = functools.cache(self._largest_size)

    def cells(self, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
        """See `NeedleTask.cells`; `depths` are not used. Raises InputError for lengths that no text fits."""
        if self.text.trials is not None and trials > self.text.trials:
            raise UsageError(f"--trials {trials} with {self.text.trials} questions")
        cells = []
        for length in lengths:
            for trial in range(trials):
                prompt = self.text.prompt(length, trial, self._size(length, trial))
                answer = (" | " if self.text.any_of else ", ").join(prompt.answers)
                cells.append(
                    Cell(
                        length=length,
                        depth=None,
                        trial=trial,
                        position=0,
                        needle="",
                        question=prompt.question,
                        answer=answer,
                    )
                )
        return cells

    def sequence(self, cell: Cell) -> tuple[np.ndarray, int]:
        """See `NeedleTask.sequence`; with the tokens to be generated, the prompt has at most `cell.length`."""
        prompt = self._prompt(cell)
        answer = self.tokenizer(f" {prompt.answer}", add_special_tokens=False).input_ids
        return np.array([*self._ids(prompt), *answer], dtype=np.int64), len(answer)

    def max_new_tokens(self, answer: int) -> int:
        """See `NeedleTask.max_new_tokens`: RULER's number."""
        return self.text.new_tokens

    def score_text(self, cell: Cell, generated: str) -> float:
        """See `NeedleTask.score_text`: RULER's string match, in which a reference may be a part of a word."""
        reply = generated.lower()
        found = [answer.lower() in reply for answer in self._prompt(cell).answers]
        return float(any(found)) if self.text.any_of else sum(found) / len(found)

    score_chat = score_text

    def prompt(self) -> dict[str, Any]:
        """See `NeedleTask.prompt`."""
        return {"text": [self.text.template], "task": self.task}

    def _prompt(self, cell: Cell) -> RulerPrompt:
        return self.text.prompt(cell.length, cell.trial, self._size(cell.length, cell.trial))

    def _ids(self, prompt: RulerPrompt) -> list[int]:
        # The text of a special token in a document is encoded as text.
        return list(self.tokenizer(prompt.text, split_special_tokens=True).input_ids)

    def _tokens(self, length: int, trial: int, size: int) -> int:
        return len(self._ids(self.text.prompt(length, trial, size))) + self.text.new_tokens

    def _largest_size(self, length: int) -> int:
        """The largest size with which trial 0 fits, by doubling and bisection; 0 if there is none."""
        smallest, largest = self.text.sizes(length, 0)
        low, high = 0, smallest
        while high <= largest and self._tokens(length, 0, high) <= length:
            low, high = high, 2 * high
        if low == 0:
            return 0
        sizes = range(low, min(high, largest + 1))
        size = low + bisect_right(sizes, length, key=lambda size: self._tokens(length, 0, size)) - 1
        if size == largest:
            raise InputError(f"{length} tokens hold the whole haystack", fix="give more --haystack")
        return size

    def _fitting_size(self, length: int, trial: int) -> int:
        """Trial 0's size, or a smaller one with which this trial fits, as in RULER."""
        smallest, largest = self.text.sizes(length, trial)
        size = min(max(self._first_size(length), smallest), largest)
        while (tokens := self._tokens(length, trial, size)) > length:
            if size == smallest:
                raise InputError(f"{length} tokens cannot hold trial {trial} ({tokens})", fix="give larger --lengths")
            size = max(smallest, min(size - 1, size * length // tokens))
        return size
