"""Video needles (V-NIAH, LongVA section 4): an image among a video's frames, and distractors (V-NIAH-D)."""

import functools
from typing import Any

import numpy as np

from lvctx.errors import InputError
from lvctx.eval.niah.frame_needles import TEMPLATES, FrameNeedles
from lvctx.eval.niah.image_needles import NeedleSet
from lvctx.eval.niah.needle_task import Cell
from lvctx.models.vlm_assembly import answer_ids, chat_ids
from lvctx.vlm.base import VisualTokens, prompt_tail


class VideoNeedleTask(FrameNeedles):
    """The cells of `FrameNeedles` as sequences of a model's tokens."""

    def __init__(self, tokenizer: Any, needles: NeedleSet, tokens: VisualTokens, **options: Any) -> None:
        """`options` are those of `FrameNeedles`. Raises InputError for an answer that is not a token."""
        super().__init__(needles, unit=tokens.frames_per_grid, **options)
        self.tokenizer, self.tokens = tokenizer, tokens
        self._chat, self._prompt_ids = functools.cache(self._question_ids), functools.cache(self._answer_ids)
        for needle in self.needles:
            if not self._ids(needle.answer):
                raise InputError(f"the answer {needle.answer!r} is not a token of this model", fix="change the needle")

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

    def sequence(self, cell: Cell) -> tuple[np.ndarray, int]:
        """See `NeedleTask.sequence`."""
        prefix, suffix, answer = self._prompt_ids(cell.question, cell.answer)
        ids = np.concatenate([prefix, self.tokens.ids(self.order(cell)), suffix, answer]).astype(np.int64)
        return ids, len(answer)

    def max_new_tokens(self, answer: int) -> int:
        """See `NeedleTask.max_new_tokens`."""
        return answer + (2 if self.question in ("what", "hops") else 16)

    def prompt(self) -> dict[str, Any]:
        """See `NeedleTask.prompt`."""
        prefix, suffix = self._chat(TEMPLATES[self.question])
        return {"chat": [*prefix, *suffix], **self.tokens.facts, **self.facts()}
