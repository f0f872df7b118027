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
    Riddle,
    Task,
    draw_distractors,
    draw_riddle,
    question_and_answer,
    sentence_ends,
)


class TextNeedleTask:
    """A riddle in a book of a given number of tokens."""

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
    ) -> None:
        """Tokenize the haystack; `distractors` are inserted, `seed` draws cities, numbers and places.

        `count` keys, values, queries or hops of `task`; a haystack that `loop`s has no end.
        """
        self.tokenizer, self.distractors, self.seed = tokenizer, distractors, seed
        self.task, self.count, self.nested, self.loop = task, count, nested, loop
        self.can_force = task not in LISTS
        self.chance = 1 / 9_000_000 if self.can_force else None
        self.extra_tokens = 2 if self.can_force else 16
        self._prefix = tokenizer(PREFIX).input_ids  # with the bos of tokenizers that add one
        # A special token that a book writes is text.
        hay = tokenizer(haystack, add_special_tokens=False, split_special_tokens=True).input_ids
        self._haystack_ids = np.array(hay, dtype=np.int64)
        self._ends = sentence_ends(tokenizer, self._haystack_ids)
        self._others = [
            (self._ids(NEEDLE.format(city=c, number=n)), f) for c, n, f in draw_distractors(seed, distractors)
        ]
        self._riddle = functools.cache(self._draw)
        self._spread = self._longest = 0

    def cells(self, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
        """See `NeedleTask.cells`. Raises InputError for a length that no needle fits in or no haystack fills."""
        self._spread, self._longest = min(lengths), max(lengths)
        cells = []
        for length in lengths:
            for trial in range(trials):
                riddle = self._riddle(trial)[0]
                room, longest = self._room(length, trial), self._room(self._longest, trial)
                asked = {"needle": riddle.hidden[0].strip(), "question": riddle.question, "answer": riddle.answer}
                for depth, point, target in insertion_points(depths, room, longest, self.nested):
                    at = self._snap(target, room)
                    cells.append(Cell(length=length, depth=depth, point=point, trial=trial, position=at, **asked))
        return cells

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _draw(self, trial: int) -> tuple[Riddle, list[list[int]], list[int], list[int]]:
        """A trial's riddle, and the ids of its sentences, question and answer."""
        riddle = draw_riddle(self.task, self.seed, trial, distractors=self.distractors, count=self.count)
        return riddle, [self._ids(text) for text in riddle.hidden], *question_and_answer(self.tokenizer, riddle)

    def _snap(self, target: int, room: int) -> int:
        """Back to the last sentence's end, as the original does; the very end stays the end."""
        if target >= room:
            return room
        turns, rest = divmod(target, len(self._haystack_ids))
        return turns * len(self._haystack_ids) + int(self._ends[np.searchsorted(self._ends, rest, side="right") - 1])

    def _room(self, length: int, trial: int) -> int:
        """Haystack tokens in a sequence of `length`."""
        _, hidden, question, answer = self._riddle(trial)
        fixed = len(self._prefix) + sum(map(len, [*hidden, question, answer, *(ids for ids, _ in self._others)]))
        room = length - fixed
        if room < 0:
            raise InputError(f"{length} tokens cannot hold needle and question ({fixed})", fix="give larger --lengths")
        if room > len(self._haystack_ids) and not self.loop:
            raise InputError(
                f"{length} tokens are beyond the haystack (it has {len(self._haystack_ids)}, {room} are needed)",
                fix="give more --haystack, smaller --lengths, or --loop to repeat it",
            )
        return room

    def sequence(self, cell: Cell) -> tuple[np.ndarray, int]:
        """See `NeedleTask.sequence`; exactly `cell.length` ids."""
        riddle, hidden, question, answer = self._riddle(cell.trial)
        room = self._room(cell.length, cell.trial)
        # All but the needle is placed where all lengths have it if prefixes are to be shared.
        spread = self._spread if self.nested else cell.length
        pieces = [(self._snap(min(int(place * spread), room), room), ids) for ids, place in self._others]
        span = self._room(spread, cell.trial)
        shares = [(cell.position / max(span, 1) + i / len(hidden)) % 1 for i in range(1, len(hidden))]
        places = [cell.position, *(self._snap(int(share * span), room) for share in shares)]
        pieces += zip(sorted(places) if riddle.chain else places, hidden, strict=True)
        hay = self._haystack_ids[:room] if room <= len(self._haystack_ids) else np.resize(self._haystack_ids, room)
        ids = np.concatenate([self._prefix, *splice(hay, pieces), question, answer]).astype(np.int64)
        assert len(ids) == cell.length
        return ids, len(answer)

    def score_text(self, cell: Cell, generated: str) -> float:
        """See `NeedleTask.score_text`."""
        if self.can_force:
            return float(begins_with(generated, cell.answer))
        return share_listed(generated, cell.answer.split(", "))

    def prompt(self) -> dict[str, Any]:
        """See `NeedleTask.prompt`."""
        facts = {"text": [PREFIX, NEEDLE, QUESTION], "distractors": self.distractors, "task": self.task}
        return facts | ({} if self.task == "single" else {"count": self.count}) | self._shared()

    def _shared(self) -> dict[str, Any]:
        """Nested points are shares of the longest haystack, and the other sentences are in the shortest."""
        if not self.nested:
            return {}
        others = {"spread": self._spread} if self._others or self.task != "single" else {}
        return {"longest": self._longest, **others}
