"""Score many sequences with common prefixes, computing each prefix once: a walk over the tree of their prefixes.

One KV cache holds the path from the root to the current node. For the next sequence the longest common prefix is kept,
the rest is cropped and only new tokens are computed; in depth-first order every edge of the tree is computed exactly
once. This covers a haystack before a needle that all needles share, and one after it that longer cells share.

A sequence is one int array over an extended vocabulary: below V a text token, from V on a row of a table of visual
embeddings. Shapes: L tokens, A answer tokens, E width, V text vocabulary, R rows of visual embeddings.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvctx.cost import CostMeter
from lvctx.errors import InputError
from lvctx.inference.kv_cache import CachePlacement, empty_cache
from lvctx.models.loading import device_of, stateful_layers
from lvctx.parallel.ring_attention import ALONE, Ring
from lvctx.parallel.striped_attention import Stripe, last_rows, needs_no_mask, owned_count, prepare
from lvctx.vlm.base import Positions, sequential_positions


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of an answer."""

    forced: bool
    """Teacher forcing: every answer token is the model's most likely token (V-NIAH's criterion)."""
    log_prob: float
    """Summed log-probability of the answer, in nats."""
    rank: int
    """Worst rank of an answer token among the vocabulary; 0 is the most likely."""
    generated: list[int] | None
    """Greedy continuation of the prompt, of the requested length; None if not requested."""


def greedy_token(logits_V: Tensor) -> int:
    """The most probable token's id."""
    return int(logits_V.argmax())


class PrefixScorer:
    """A model, a KV cache, and the sequence in the cache."""

    def __init__(
        self,
        model: Any,
        visual_RE: Tensor | None = None,
        *,
        chunk: int = 2048,
        reuse: bool = True,
        kv_cache: CachePlacement = "device",
        positions: Positions = sequential_positions,
        ring: Ring = ALONE,
        meter: CostMeter | None = None,
    ) -> None:
        """Score with a language model or VLM; `visual_RE` are the embeddings of the ids from V on.

        Further columns of a table wider than E are, E by E, added to the first layers' states.

        `chunk` limits the tokens per forward, and so the memory of activations; `reuse=False` empties the cache before
        every sequence; `kv_cache` is the placement of the cache (see `inference.kv_cache`), `positions` the model's.
        The ranks of a `ring` process every sequence together, each with its share of the cache and all of the weights:
        they must make the same calls, and all get the same scores. `meter` is told how long prompts and replies take.
        Raises InputError for a model with layers that keep another state than keys and values.
        """
        if stateful := stateful_layers(model.config):
            what = f"layers of {', '.join(sorted(stateful))}: their state cannot be cut back to a shared prefix"
            raise InputError(what, where=model.name_or_path, fix="serve the model and give --endpoint")
        self.lm = model.get_decoder()
        self.head, self.embedding = model.lm_head, model.get_input_embeddings()
        self.visual_RE, self.chunk, self.reuse, self.kv_cache = visual_RE, chunk, reuse, kv_cache
        self.positions, self.ring, self.meter = positions, ring, meter or CostMeter()
        self.device = device_of(self.embedding)
        # With a cache transformers passes torch's kernel a mask, which takes 1.4 to 1.9 times as long on a CPU.
        if ring.world > 1 or needs_no_mask(self.lm, self.device):
            prepare(self.lm)
        self.tokens_run = 0
        """Number of tokens computed so far, over all ranks."""
        self._empty()

    def _empty(self) -> None:
        self._cache = empty_cache(self.kv_cache)
        self._cached_ids = np.empty(0, dtype=np.int64)

    @property
    def vocabulary(self) -> int:
        """V: the first id that is a row of the visual table."""
        return int(self.embedding.weight.shape[0])

    @torch.inference_mode()
    def score(self, ids_L: np.ndarray, answer: int, *, generate: int = 0) -> Score:
        """Score the last `answer` ids given the others; also continue the prompt greedily by `generate` tokens."""
        prompt = len(ids_L) - answer
        if not self.reuse:
            self._empty()
        # The hidden state of the last prompt token is needed, so at least that token is run.
        self._crop(min(common_prefix(self._cached_ids, ids_L), prompt - 1))
        try:
            with self.meter.phase("prefill"):
                hidden_AE = self._run(ids_L[len(self._cached_ids) : -1], keep=answer)
                logits_AV = self.head(hidden_AE).float().to(self.device)
            target_A = torch.from_numpy(ids_L[prompt:].astype(np.int64)).to(self.device)
            picked_A = logits_AV.gather(1, target_A[:, None])[:, 0]
            with self.meter.phase("generate"):
                generated = self._continue(prompt, logits_AV[0], generate) if generate else None
        except RuntimeError:
            self._empty()  # an interrupted forward leaves the cache inconsistent
            raise
        if self.visual_RE is not None:
            self.meter.add(visual_tokens=int((ids_L >= self.vocabulary).sum()))
        return Score(
            forced=bool((logits_AV.argmax(1) == target_A).all()),
            log_prob=float((picked_A - logits_AV.logsumexp(1)).sum()),
            rank=int((logits_AV > picked_A[:, None]).sum(1).max()),
            generated=generated,
        )

    def hidden_states(self, ids_L: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """The final hidden states (C, E) of all tokens in chunks, each with the position of its first token."""
        self._empty()
        for first in range(0, len(ids_L), self.chunk):
            part = ids_L[first : first + self.chunk]
            yield first, self._run(part, keep=len(part))

    @torch.inference_mode()
    def generate(
        self,
        ids_L: np.ndarray,
        count: int,
        stop: Collection[int],
        on_token: Callable[[int], bool | None] = lambda token: None,
        choose: Callable[[Tensor], int] = greedy_token,
    ) -> list[int]:
        """The continuation of a prompt: at most `count` ids, up to and without the first of `stop`.

        The cache keeps the prompt and the continuation, so a prompt that begins with both reuses them.
        `on_token` gets each id as soon as it is chosen, and ends the continuation by returning True; `choose` makes an
        id of logits (V,).
        """
        if not self.reuse:
            self._empty()
        # The last token is computed again even if cached: its hidden state selects the first new token.
        self._crop(min(common_prefix(self._cached_ids, ids_L), len(ids_L) - 1))
        generated: list[int] = []
        try:
            with self.meter.phase("prefill"):
                hidden_1E = self._run(ids_L[len(self._cached_ids) :], keep=1)
            with self.meter.phase("generate"):
                position = self._next_position()
                while len(generated) < count:
                    token = choose(self.head(hidden_1E)[0].float())
                    if token in stop:
                        break
                    generated.append(token)
                    if on_token(token):
                        break
                    if len(generated) < count:
                        hidden_1E = self._run(np.array([token], dtype=np.int64), keep=1, positions=position)
                        position = position + 1
        except RuntimeError:
            self._empty()  # an interrupted forward leaves the cache inconsistent
            raise
        return generated

    def show(self, visual_RE: Tensor | None, positions: Positions) -> None:
        """Set another visual table, and the positions of sequences with its rows; empties the cache."""
        self.visual_RE, self.positions = visual_RE, positions
        self._empty()

    def _continue(self, prompt: int, logits_V: Tensor, count: int) -> list[int]:
        self._crop(prompt)
        generated, position = [int(logits_V.argmax())], self._next_position()
        while len(generated) < count:
            hidden_1E = self._run(np.array(generated[-1:], dtype=np.int64), keep=1, positions=position)
            position = position + 1
            generated.append(int(self.head(hidden_1E).float().argmax()))
        return generated

    def _next_position(self) -> Tensor:
        """Position of a text token after the cached ones: computed once, as it takes a pass over all of them."""
        positions = self.positions(self._cached_ids, 0)
        return torch.full_like(positions[..., :1], int(positions.max()) + 1)

    def _run(self, ids_L: np.ndarray, *, keep: int, positions: Tensor | None = None) -> Tensor:
        """Append ids to the cache; returns the final hidden states (keep, E) of the last ones.

        `positions` are those of a single token.
        """
        last_states: list[Tensor] = []
        for start in range(0, len(ids_L), self.chunk):
            part = ids_L[start : start + self.chunk]
            stripe = Stripe(ring=self.ring, first=len(self._cached_ids), count=len(part))
            self._cached_ids = np.concatenate([self._cached_ids, part])
            embeds_LE, deep = self._embed(part[stripe.local_slice])
            placed = self.positions(self._cached_ids, stripe.first) if positions is None else positions
            states = self.lm(
                inputs_embeds=embeds_LE[None],
                **deep,
                position_ids=placed[..., stripe.local_slice].to(self.device),
                past_key_values=self._cache,
                use_cache=True,
                **({"stripe": stripe} if self.ring.world > 1 else {}),
            ).last_hidden_state[0, : stripe.local_count]
            if not stripe.local_count:
                self._cache.crop(-1)
            self.tokens_run += len(part)
            last_states = [torch.cat([*last_states, states])[-keep:]]
        return last_rows(last_states[0], end=len(self._cached_ids), count=keep, ring=self.ring)

    def _embed(self, ids_L: np.ndarray) -> tuple[Tensor, dict[str, Any]]:
        """Embeddings (L, E), and the visual additions to the first layers' states (Qwen3-VL)."""
        ids = torch.from_numpy(ids_L.astype(np.int64)).to(self.device)
        if self.visual_RE is None:
            return self.embedding(ids), {}
        is_visual = ids >= self.vocabulary
        embeds_LE = self.embedding(ids.masked_fill(is_visual, 0))
        rows = self.visual_RE[(ids[is_visual] - self.vocabulary).to(self.visual_RE.device)]
        first, *deep = rows.to(embeds_LE.device, embeds_LE.dtype).split(embeds_LE.shape[1], dim=1)
        embeds_LE[is_visual] = first
        if not deep or not len(first):
            return embeds_LE, {}
        return embeds_LE, {"visual_pos_masks": is_visual[None], "deepstack_visual_embeds": deep}

    def _crop(self, length: int) -> None:
        if length < len(self._cached_ids):
            self._cache.crop(owned_count(length, self.ring) - owned_count(len(self._cached_ids), self.ring))
            self._cached_ids = self._cached_ids[:length]


def walk_order(sequences: Iterable[np.ndarray]) -> list[int]:
    """Indices of the sequences depth-first (lexicographically): so that every edge of their tree is computed once."""
    # Big-endian bytes have the order of the ids, and compare as fast as memory is read.
    keys = [ids.astype(">i4").tobytes() for ids in sequences]
    return sorted(range(len(keys)), key=keys.__getitem__)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two id arrays."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
