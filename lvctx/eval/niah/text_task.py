"""Text needles: magic numbers of cities and chains of variables in a book (see `lvctx.eval.niah.text_needles`)."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lvctx.errors import InputError
from lvctx.eval.niah.needle_task import Cell, begins_with, insertion_points, share_listed, splice
from lvctx.eval.niah.text_needles import (
    LISTS,
    NEEDLE,
    PREFIX,
    QUESTION,
    Task,
    TextNeedle,
    draw_distractors,
    draw_text_needle,
    question_and_answer,
    sentence_ends,
)


class TextNeedleTask:
    """A needle in a book of a given number of tokens."""

    modality = "text"

    def __init__(
        self,
        tokenizer: Any,
        haystack: str,
        *,
        distractors: int,
        seed: int,
        task: Task = "single",
        count: int = 4,
        nested: bool = False,
        loop: bool = False,
        city: str | None = None,
        haystack_only: bool = False,
    ) -> None:
        """Tokenize the haystack; `distractors` are inserted, `seed` draws cities, numbers and places.

        `count` is the number of keys, values, queries or hops of `task`; with `loop` the haystack is repeated. `city`
        is that of all needles; with `haystack_only` lengths count the haystack's tokens.
        """
        self.tokenizer, self.distractors, self.seed = tokenizer, distractors, seed
        self.task, self.count, self.nested, self.loop = task, count, nested, loop
        self.city, self.haystack_only = city, haystack_only
        self.can_force = task not in LISTS
        self.chance = 1 / 9_000_000 if self.can_force else None
        self._prefix = tokenizer(PREFIX).input_ids  # with bos if the tokenizer adds one
        # The text of a special token in a book is encoded as text.
        haystack_ids = tokenizer(haystack, add_special_tokens=False, split_special_tokens=True).input_ids
        self._haystack_ids = np.array(haystack_ids, dtype=np.int64)
        self._ends = sentence_ends(tokenizer, self._haystack_ids)
        self._distractor_ids = [
            (self._ids(NEEDLE.format(city=c, number=n)), f)
            for c, n, f in draw_distractors(seed, distractors, city=city)
        ]
        self._needle = functools.cache(self._draw)
        self._spread = self._longest = 0

    def cells(self, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
        """See `NeedleTask.cells`. Raises InputError for a length that is too small or exceeds the haystack."""
        self._spread, self._longest = min(lengths), max(lengths)
        cells = []
        for length in lengths:
            for trial in range(trials):
                needle = self._needle(trial)[0]
                haystack_length = self._haystack_length(length, trial)
                longest = self._haystack_length(self._longest, trial)
                needle_facts = {
                    "needle": needle.sentences[0].strip(),
                    "question": needle.question,
                    "answer": needle.answer,
                }
                for depth, point, target in insertion_points(depths, haystack_length, longest, self.nested):
                    position = self._snap(target, haystack_length)
                    cells.append(
                        Cell(length=length, depth=depth, point=point, trial=trial, position=position, **needle_facts)
                    )
        return cells

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _draw(self, trial: int) -> tuple[TextNeedle, list[list[int]], list[int], list[int]]:
        """A trial's needle, and the ids of its sentences, question and answer."""
        needle = draw_text_needle(
            self.task, self.seed, trial, distractors=self.distractors, count=self.count, key=self.city
        )
        return needle, [self._ids(text) for text in needle.sentences], *question_and_answer(self.tokenizer, needle)

    def _snap(self, target: int, haystack_length: int) -> int:
        """The previous sentence end, as in the original; the end of the haystack is kept."""
        if target >= haystack_length:
            return haystack_length
        repeats, offset = divmod(target, len(self._haystack_ids))
        return repeats * len(self._haystack_ids) + int(
            self._ends[np.searchsorted(self._ends, offset, side="right") - 1]
        )

    def _haystack_length(self, length: int, trial: int) -> int:
        """Haystack tokens in a sequence of `length`."""
        _, sentences, question, answer = self._needle(trial)
        fixed = len(self._prefix) + sum(
            map(len, [*sentences, question, answer, *(ids for ids, _ in self._distractor_ids)])
        )
        haystack_length = length if self.haystack_only else length - fixed
        if haystack_length < 0:
            raise InputError(f"{length} tokens cannot hold needle and question ({fixed})", fix="give larger --lengths")
        if haystack_length > len(self._haystack_ids) and not self.loop:
            raise InputError(
                f"{length} tokens exceed the haystack (it has {len(self._haystack_ids)}, {haystack_length} are needed)",
                fix="give more --haystack, smaller --lengths, or --loop to repeat it",
            )
        return haystack_length

    def sequence(self, cell: Cell) -> tuple[np.ndarray, int]:
        """See `NeedleTask.sequence`; exactly `cell.length` ids, or more if only the haystack is counted."""
        needle, sentences, question, answer = self._needle(cell.trial)
        haystack_length = self._haystack_length(cell.length, cell.trial)
        # Sentences other than the needle have the same positions for all lengths, if lengths are to share computation.
        spread = self._spread if self.nested else cell.length
        pieces = [
            (self._snap(min(int(fraction * spread), haystack_length), haystack_length), ids)
            for ids, fraction in self._distractor_ids
        ]
        span = self._haystack_length(spread, cell.trial)
        shares = [(cell.position / max(span, 1) + i / len(sentences)) % 1 for i in range(1, len(sentences))]
        positions = [cell.position, *(self._snap(int(share * span), haystack_length) for share in shares)]
        pieces += zip(sorted(positions) if needle.chain else positions, sentences, strict=True)
        haystack = (
            self._haystack_ids[:haystack_length]
            if haystack_length <= len(self._haystack_ids)
            else np.resize(self._haystack_ids, haystack_length)
        )
        ids = np.concatenate([self._prefix, *splice(haystack, pieces), question, answer]).astype(np.int64)
        assert self.haystack_only or len(ids) == cell.length
        return ids, len(answer)

    def max_new_tokens(self, answer: int) -> int:
        """See `NeedleTask.max_new_tokens`."""
        return answer + (2 if self.can_force else 16)

    def score_text(self, cell: Cell, generated: str) -> float:
        """See `NeedleTask.score_text`."""
        if self.can_force:
            return float(begins_with(generated, cell.answer))
        return share_listed(generated, cell.answer.split(", "))

    def score_chat(self, cell: Cell, generated: str) -> float:
        """The same for a chat's reply, which may say more than the answer."""
        return share_listed(generated, cell.answer.split(", "))

    def prompt(self) -> dict[str, Any]:
        """See `NeedleTask.prompt`."""
        facts = {"text": [PREFIX, NEEDLE, QUESTION], "distractors": self.distractors, "task": self.task}
        facts |= {} if self.task == "single" else {"count": self.count}
        facts |= {"city": self.city} if self.city else {}
        facts |= {"length_of": "haystack"} if self.haystack_only else {}
        return facts | self._shared()

    def _shared(self) -> dict[str, Any]:
        """Nested points are shares of the longest haystack, and the other sentences are placed in the shortest."""
        if not self.nested:
            return {}
        shared = {"spread": self._spread} if self._distractor_ids or self.task != "single" else {}
        return {"longest": self._longest, **shared}
