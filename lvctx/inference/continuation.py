"""Prompts that are computed and the replies that are generated after them, several at once.

Shapes: B samples, L tokens, E width, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from lvctx.inference.kv_cache import join_caches, keep_samples


@dataclass(kw_only=True)
class CachedSequences:
    """Sequences of a batch and their keys and values; shorter ones are padded before their first token."""

    cache: Cache
    """Of this rank's tokens."""
    ids_BL: np.ndarray
    """Ids; 0 where padded."""
    mask_BL: Tensor | None = None
    """False where padded; None without padding."""

    @classmethod
    def join(cls, parts: "Sequence[CachedSequences]", *, spare: "CachedSequences") -> "CachedSequences":
        """One batch of sequences that were computed alone; a single one is not copied.

        What is copied is emptied, unless it is `spare`.
        """
        if len(parts) == 1:
            return parts[0]
        lengths = [part.length for part in parts]
        mask_BL = np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]
        ids_BL = np.zeros(mask_BL.shape, dtype=np.int64)
        ids_BL[mask_BL] = np.concatenate([part.ids_BL[0] for part in parts])
        cache = join_caches([list(one.cache.layers) if one is spare else one.cache.layers for one in parts])
        device = cache.layers[0].device
        return cls(cache=cache, ids_BL=ids_BL, mask_BL=torch.from_numpy(mask_BL).to(device))

    @property
    def length(self) -> int:
        """L, padding included."""
        return self.ids_BL.shape[1]

    def append(self, ids_BL: np.ndarray) -> None:
        """Note new tokens, which a forward then adds to the cache."""
        self.ids_BL = np.concatenate([self.ids_BL, ids_BL], 1)
        if self.mask_BL is not None:
            self.mask_BL = F.pad(self.mask_BL, (0, ids_BL.shape[1]), value=True)

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these sequences, see `keep_samples`."""
        keep_samples(self.cache, order)
        self.ids_BL = self.ids_BL[order]
        self.mask_BL = None if self.mask_BL is None else self.mask_BL[order]


@dataclass(kw_only=True)
class Continuation:
    """A prompt that is computed, and what is generated after it."""

    count: int
    """The largest number of ids."""
    stop: Collection[int]
    """Ids that end it."""
    on_token: Callable[[int], bool | None]
    """Gets each id as soon as it is chosen, and ends the continuation by returning True."""
    choose: Callable[[Tensor], int]
    """Makes an id of logits (V,)."""
    prompt: CachedSequences
    """The prompt alone."""
    hidden_1E: Tensor
    """The final hidden state of its last token."""
    position: Tensor
    """Position of the next token: (1, 1), or (3, 1, 1) for M-RoPE."""
    ids: list[int] = field(default_factory=list)
    """Generated, without the one that ended it."""
    steps: int = 0
    """Ids that were chosen, with the one that ended it."""

    def add(self, logits_V: Tensor) -> bool:
        """Choose the next id; whether it is the end."""
        token = self.choose(logits_V)
        self.steps += 1
        if token in self.stop:
            return True
        self.ids.append(token)
        return bool(self.on_token(token)) or len(self.ids) >= self.count
