"""Greedy replies to prompts that begin alike: the frames of a video are read once for all questions about it."""

from collections.abc import Callable, Collection

import numpy as np
import torch

from lvctx.bench.prefix import PrefixScorer, common_prefix


class Reader(PrefixScorer):
    """A model and a KV cache that writes. Sequences are those of `prefix`: ids below V are text, from V on visual."""

    @torch.inference_mode()
    def write(
        self,
        ids_L: np.ndarray,
        count: int,
        stop: Collection[int],
        tell: Callable[[int], None] = lambda token: None,
    ) -> list[int]:
        """The greedy continuation of a prompt: at most `count` ids, up to and without the first of `stop`.

        The cache keeps the prompt and what was written, so a prompt that begins with both runs only what is new. `tell`
        gets each id as it is written.
        """
        if not self.reuse:
            self._empty()
        # The last token is run again even if it is held: its hidden state is what chooses the first word.
        self._crop(min(common_prefix(self._held, ids_L), len(ids_L) - 1))
        written: list[int] = []
        try:
            hidden_1E = self._run(ids_L[len(self._held) :], keep=1)
            while len(written) < count:
                token = int(self.head(hidden_1E).float().argmax())
                if token in stop:
                    break
                written.append(token)
                tell(token)
                if len(written) < count:
                    hidden_1E = self._run(np.array([token], dtype=np.int64), keep=1)
        except RuntimeError:
            self._empty()  # what an interrupted forward left in the cache belongs to no sequence
            raise
        return written
