"""Score many sequences with common prefixes, computing each prefix once: a walk over the tree of their prefixes.

One KV cache holds the path from the root to the current node. For the next sequence the longest common prefix is kept,
the rest is cropped and only new tokens are computed; in depth-first order every edge of the tree is computed exactly
once. This covers a haystack before a needle that all needles share, and one after it that longer cells share.

A sequence is one int array over an extended vocabulary: below V a text token, from V on a row of a table of visual
embeddings.

Several continuations may be generated together: each prompt is computed alone, then their caches are joined into one.

Shapes: B samples, L tokens, A answer tokens, E width, V text vocabulary, R rows of visual embeddings.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lvctx.cost import CostMeter
from lvctx.errors import InputError
from lvctx.inference.continuation import CachedSequences, Continuation
from lvctx.inference.kv_cache import CachePlacement, empty_cache, join_caches
from lvctx.inference.prefill_chunk import choose_chunk
from lvctx.models.loading import device_of, refuse_changed_logits, stateful_layers
from lvctx.parallel.hf_attention import is_plain
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
    predicted: list[int]
    """The most likely token in place of each answer token, given those of the answer before it."""
    generated: list[int] | None
    """Greedy continuation of the prompt, of the requested length; None if not requested."""

    @classmethod
    def of(cls, logits_AV: Tensor, answer: Sequence[int] | np.ndarray, generated: list[int] | None = None) -> Self:
        """The score of an answer's ids from the logits of their positions, float32."""
        target_A = torch.as_tensor(answer, dtype=torch.long, device=logits_AV.device)
        picked_A = logits_AV.gather(1, target_A[:, None])[:, 0]
        return cls(
            forced=bool((logits_AV.argmax(1) == target_A).all()),
            log_prob=float((picked_A - logits_AV.logsumexp(1)).sum()),
            rank=int((logits_AV > picked_A[:, None]).sum(1).max()),
            predicted=logits_AV.argmax(1).tolist(),
            generated=generated,
        )


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
        chunk: int | None = None,
        reuse: bool = True,
        kv_cache: CachePlacement = "device",
        positions: Positions = sequential_positions,
        ring: Ring = ALONE,
        meter: CostMeter | None = None,
    ) -> None:
        """Score with a language model or VLM; `visual_RE` are the embeddings of the ids from V on.

        Further columns of a table wider than E are, E by E, added to the first layers' states.

        `chunk` limits the tokens per forward, and so the memory of activations (see `inference.prefill_chunk` for the
        default); `reuse=False` empties the cache before
        every sequence; `kv_cache` is the placement of the cache (see `inference.kv_cache`), `positions` the model's.
        The ranks of a `ring` process every sequence together, each with its share of the cache and all of the weights:
        they must make the same calls, and all get the same scores. `meter` gets the times of prompts and replies.
        Raises InputError for a model with layers that keep another state than keys and values, and for a text model
        that changes its head's logits.
        """
        if stateful := stateful_layers(model.config):
            what = f"layers of {', '.join(sorted(stateful))}: their state cannot be cut back to a shared prefix"
            raise InputError(what, where=model.name_or_path, fix="serve the model and give --endpoint")
        if model.config.get_text_config() is model.config:  # stock VLMs leave their language model's scale out
            refuse_changed_logits(model.config, model.name_or_path)
        self.lm = model.get_decoder()
        self.head, self.embedding = model.lm_head, model.get_input_embeddings()
        self.visual_RE, self.reuse, self.kv_cache = visual_RE, reuse, kv_cache
        self.positions, self.ring, self.meter = positions, ring, meter or CostMeter()
        self.device = device_of(self.embedding)
        # With a cache transformers passes torch's kernel a mask, which takes 1.4 to 1.9 times as long on a CPU.
        flash = needs_no_mask(self.lm, self.device)
        if ring.world > 1 or flash:
            prepare(self.lm)
        self.chunk = chunk or choose_chunk(self.lm, self.device, flash=flash, ring=ring)
        self.tokens_run = 0
        """Number of tokens computed so far, over all ranks."""
        self._empty()

    def _empty(self) -> None:
        self._prefix = CachedSequences(cache=empty_cache(self.kv_cache), ids_BL=np.empty((1, 0), dtype=np.int64))
        self._is_shared = False

    @property
    def vocabulary(self) -> int:
        """V: the first id that is a row of the visual table."""
        return int(self.embedding.weight.shape[0])

    @torch.inference_mode()
    def score(self, ids_L: np.ndarray, answer: int, *, generate: int = 0) -> Score:
        """Score the last `answer` ids given the others; also continue the prompt greedily by `generate` tokens."""
        prompt = len(ids_L) - answer
        try:
            with self.meter.phase("prefill"):
                hidden_AE = self._run_prompt(ids_L[:-1], keep=answer)
                logits_AV = self.head(hidden_AE).float().to(self.device)
            generated = None
            if generate:
                self._crop(prompt)
                (generated,) = self.decode([self._continuation(hidden_AE[:1], generate)])
        except RuntimeError:
            self._empty()  # an interrupted forward leaves the cache inconsistent
            raise
        if self.visual_RE is not None:
            self.meter.add(visual_tokens=int((ids_L >= self.vocabulary).sum()))
        return Score.of(logits_AV, ids_L[prompt:], generated)

    def hidden_states(self, ids_L: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """The final hidden states (C, E) of all tokens in chunks, each with the position of its first token."""
        self._empty()
        for first in range(0, len(ids_L), self.chunk):
            part = ids_L[first : first + self.chunk]
            yield first, self._run(self._prefix, part[None], keep=len(part))[0]

    @torch.inference_mode()
    def prefill(
        self,
        ids_L: np.ndarray,
        count: int,
        stop: Collection[int],
        on_token: Callable[[int], bool | None] = lambda token: None,
        choose: Callable[[Tensor], int] = greedy_token,
    ) -> Continuation:
        """Compute a prompt for `decode`, which then gives at most `count` ids, up to and without the first of `stop`.

        The cache keeps the prompt and what is generated, so a prompt that begins with both reuses them.
        For `on_token` and `choose` see `Continuation`.
        """
        try:
            with self.meter.phase("prefill"):
                hidden_1E = self._run_prompt(ids_L, keep=1)
        except RuntimeError:
            self._empty()  # an interrupted forward leaves the cache inconsistent
            raise
        return self._continuation(hidden_1E, count, stop, on_token, choose)

    def _continuation(
        self,
        hidden_1E: Tensor,
        count: int,
        stop: Collection[int] = (),
        on_token: Callable[[int], bool | None] = lambda token: None,
        choose: Callable[[Tensor], int] = greedy_token,
    ) -> Continuation:
        """Of the cached sequence, which the next prompt then leaves as it is."""
        # The position is computed once, as it takes a pass over all tokens.
        positions = self.positions(self._prefix.ids_BL[0], 0)
        self._is_shared = True
        return Continuation(
            count=count,
            stop=stop,
            on_token=on_token,
            choose=choose,
            prompt=self._prefix,
            hidden_1E=hidden_1E,
            position=torch.full_like(positions[..., :1], int(positions.max()) + 1),
        )

    @torch.inference_mode()
    def decode(self, continuations: Sequence[Continuation]) -> list[list[int]]:
        """The ids of continuations that are generated together, each as if alone; none may be decoded twice.

        One that ends leaves the batch.
        """
        assert len(continuations) == 1 or (self.ring.world == 1 and is_plain(self.lm.config))
        rows, self._is_shared = list(continuations), False
        try:
            with self.meter.phase("generate"):
                batch = CachedSequences.join([row.prompt for row in rows], spare=self._prefix)
                hidden_BE = torch.cat([row.hidden_1E for row in rows])
                positions = torch.cat([row.position for row in rows], -2)
                while True:
                    logits_BV = self.head(hidden_BE).float()
                    ended = [i for i, row in enumerate(rows) if row.add(logits_BV[i])]
                    order = list(range(len(rows)))
                    for i in reversed(ended):  # the last one takes its place
                        order[i] = order[-1]
                        order.pop()
                    if not order:
                        break
                    if ended:
                        rows, positions = [rows[i] for i in order], positions[..., order, :]
                        batch.keep(order)
                    new_B1 = np.array([row.ids[-1:] for row in rows], dtype=np.int64)
                    hidden_BE = self._run(batch, new_B1, keep=1, positions=positions)[:, 0]
                    positions = positions + 1
        except RuntimeError:
            self._empty()  # an interrupted forward leaves the cache inconsistent
            raise
        return [one.ids for one in continuations]

    def show(self, visual_RE: Tensor | None, positions: Positions) -> None:
        """Set another visual table, and the positions of sequences with its rows; empties the cache."""
        self.visual_RE, self.positions = visual_RE, positions
        self._empty()

    def _run_prompt(self, ids_L: np.ndarray, *, keep: int) -> Tensor:
        """Make a sequence the cached one; returns the final hidden states (keep, E) of its last tokens.

        These are computed again even if cached.
        """
        if not self.reuse:
            self._empty()
        self._crop(min(common_prefix(self._prefix.ids_BL[0], ids_L), len(ids_L) - keep))
        return self._run(self._prefix, ids_L[None, self._prefix.length :], keep=keep)[0]

    def _run(
        self, sequences: CachedSequences, ids_BL: np.ndarray, *, keep: int, positions: Tensor | None = None
    ) -> Tensor:
        """Append ids to the cache; returns the final hidden states (B, keep, E) of the last ones.

        `positions` are those of a single token of each sequence; without, there is one sequence.
        """
        last_states: list[Tensor] = []
        for start in range(0, ids_BL.shape[1], self.chunk):
            part_BL = ids_BL[:, start : start + self.chunk]
            stripe = Stripe(ring=self.ring, first=sequences.length, count=part_BL.shape[1])
            sequences.append(part_BL)
            embeds_BLE, deep = self._embed(part_BL[:, stripe.local_slice])
            placed = self.positions(sequences.ids_BL[0], stripe.first) if positions is None else positions
            states_BLE = self.lm(
                inputs_embeds=embeds_BLE,
                **deep,
                attention_mask=None if sequences.mask_BL is None else sequences.mask_BL[:, None, None],
                position_ids=placed[..., stripe.local_slice].to(self.device),
                past_key_values=sequences.cache,
                use_cache=True,
                **({"stripe": stripe} if self.ring.world > 1 else {}),
            ).last_hidden_state[:, : stripe.local_count]
            if not stripe.local_count:
                sequences.cache.crop(-1)
            self.tokens_run += part_BL.size
            last_states = [torch.cat([*last_states, states_BLE], 1)[:, -keep:]]
        if self.ring.world == 1:
            return last_states[0]
        return last_rows(last_states[0][0], end=sequences.length, count=keep, ring=self.ring)[None]

    def _embed(self, ids_BL: np.ndarray) -> tuple[Tensor, dict[str, Any]]:
        """Embeddings (B, L, E), and the visual additions to the first layers' states (Qwen3-VL)."""
        ids = torch.from_numpy(ids_BL.astype(np.int64)).to(self.device)
        if self.visual_RE is None:
            return self.embedding(ids), {}
        is_visual = ids >= self.vocabulary
        embeds_BLE = self.embedding(ids.masked_fill(is_visual, 0))
        rows = self.visual_RE[(ids[is_visual] - self.vocabulary).to(self.visual_RE.device)]
        first, *deep = rows.to(embeds_BLE.device, embeds_BLE.dtype).split(embeds_BLE.shape[-1], dim=1)
        embeds_BLE[is_visual] = first
        if not deep or not len(first):
            return embeds_BLE, {}
        return embeds_BLE, {"visual_pos_masks": is_visual, "deepstack_visual_embeds": deep}

    def _crop(self, length: int) -> None:
        """Cut the cached sequence; one that a `Continuation` needs is left whole, and its beginning copied."""
        kept, prefix = owned_count(length, self.ring), self._prefix
        if self._is_shared:
            cache = join_caches([list(prefix.cache.layers)], kept) if length else empty_cache(self.kv_cache)
            self._prefix = CachedSequences(cache=cache, ids_BL=prefix.ids_BL[:, :length])
            self._is_shared = False
        elif length < prefix.length:
            prefix.cache.crop(kept - owned_count(prefix.length, self.ring))
            prefix.ids_BL = prefix.ids_BL[:, :length]


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
