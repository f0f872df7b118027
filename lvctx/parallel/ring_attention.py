"""Ring attention with exact gradients (Liu et al. 2023) on zigzag shards, with or without document masks.

Keys and values are passed around the ring; each rank attends to those it has and merges the pieces by their
log-sum-exp, in float32 and through sigmoid and logsigmoid, which cannot overflow. In the backward pass their float32
gradients travel with them and return to their rank after a full turn.

The pairs of tokens that attend are a list of rectangles, so no mask is ever built. Without documents a step is one
rectangle. With documents, each is contiguous, so two different chunks have at most one document in common, and its part
in the later chunk attends to all of its part in the earlier one; inside a chunk each document is a causal square.

Shapes: B samples, H query heads, K key heads, L local tokens, D channels.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lvctx.device import CpKind
from lvctx.parallel.block_attention import Kernel
from lvctx.parallel.zigzag import chunks_of, shard


@dataclass(frozen=True, kw_only=True)
class Ring:
    """A rank's index among those that share a sequence."""

    rank: int = 0
    """0-based index in the ring."""
    world: int = 1
    """Number of ranks that share the sequence."""
    group: Any = None
    """A torch.distributed process group that they are in; None for a ring of one."""
    members: range | None = None
    """Their ranks in that group; None for all of it."""
    kind: CpKind = "ring"
    """How a training's row is cut and attention computed: contiguous for Ulysses, otherwise zigzag."""

    def shard(self, full: Tensor, *, fill: int, dim: int = -1) -> Tensor:
        """This rank's part of a training's row with its tokens along `dim`; see `zigzag.shard`."""
        contiguous = self.kind == "ulysses"
        return shard(full, rank=self.rank, world=self.world, fill=fill, dim=dim, contiguous=contiguous)

    def split(self, key_heads: int) -> tuple["Ring", "Ring"]:
        """The neighbours U that divide attention heads, and the ring of which they are one member; `both` has both.

        U is the largest divisor of `world` that divides the key heads, so `both` repeats none.
        """
        if self.kind == "ulysses":
            return self, ALONE
        if self.kind == "ring":
            return ALONE, self
        heads = gcd(self.world, key_heads)
        first, index = self.rank - self.rank % heads, self.rank % heads
        neighbours, column = range(first, first + heads), range(index, self.world, heads)
        return (
            Ring(rank=index, world=heads, group=self.group, members=neighbours),
            Ring(rank=self.rank // heads, world=self.world // heads, group=self.group, members=column),
        )


ALONE = Ring()
"""One rank with the whole sequence."""


@dataclass(frozen=True, kw_only=True)
class AttentionBlock:
    """Queries and the keys they attend to, as half-open ranges of local positions."""

    queries: tuple[int, int]
    """In this rank's shard."""
    keys: tuple[int, int]
    """In the shard of the rank the keys come from."""
    causal: bool
    """Both ranges are the same tokens, and each attends to itself and those before it."""


@lru_cache(maxsize=64)  # every layer calls it again
def blocks(rank: int, source: int, world: int, length: int, starts: tuple[int, ...] | None) -> list[AttentionBlock]:
    """The blocks that `rank` computes with the keys of rank `source`; `length` is that of a shard.

    `starts` are the ascending positions where documents begin, the first 0; None is causal attention without documents.
    """
    half = length // 2
    if starts is None:
        if source == rank:
            return [AttentionBlock(queries=(0, length), keys=(0, length), causal=True)]
        if source < rank:
            return [AttentionBlock(queries=(0, length), keys=(0, half), causal=False)]
        return [AttentionBlock(queries=(half, length), keys=(0, length), causal=False)]
    size = length if world == 1 else half
    attention_blocks = []
    for i, mine in enumerate(chunks_of(rank, world)):
        for j, theirs in enumerate(chunks_of(source, world)):
            if theirs <= mine:
                attention_blocks += _chunk_blocks(mine, theirs, size, i * size, j * size, starts)
    return attention_blocks


def _chunk_blocks(
    mine: int, theirs: int, size: int, at: int, key_at: int, starts: Sequence[int]
) -> list[AttentionBlock]:
    """Blocks between two chunks of `size` tokens at local positions `at` and `key_at`; theirs is not after mine."""
    begin, key_begin = mine * size, theirs * size
    if mine == theirs:
        edges = [begin, *(s for s in starts if begin < s < begin + size), begin + size]
        spans = [(at + a - begin, at + b - begin) for a, b in pairwise(edges)]
        return [AttentionBlock(queries=span, keys=span, causal=True) for span in spans]
    following = bisect_right(starts, begin)
    first = max(starts[following - 1], key_begin)
    last = min([*starts[following : following + 1], begin + size])
    if first >= key_begin + size:
        return []
    return [
        AttentionBlock(queries=(at, at + last - begin), keys=(key_at + first - key_begin, key_at + size), causal=False)
    ]


def ring_attention(
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    v_BKLD: Tensor,
    *,
    ring: Ring,
    kernel: Kernel,
    scale: float,
    starts: tuple[int, ...] | None = None,
) -> Tensor:
    """Causal attention of this rank's queries over the whole sequence: (B, H, L, D), differentiable.

    Every rank of the ring must call it, with shards of one length; see `blocks` for `starts`.
    """
    return _RingAttention.apply(q_BHLD, k_BKLD, v_BKLD, ring, kernel, scale, starts)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ring: Ring,
        kernel: Kernel,
        scale: float,
        starts: tuple[int, ...] | None,
    ) -> Tensor:
        length = q.shape[2]
        local_kv = kv = torch.stack([k, v])
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
        for step in range(ring.world):
            coming = _Exchange(kv, ring) if step + 1 < ring.world else None
            source = (ring.rank - step) % ring.world
            for b in blocks(ring.rank, source, ring.world, length, starts):
                (i, j), keys = b.queries, slice(*b.keys)
                part, part_lse = kernel.forward(
                    q[:, :, i:j], kv[0, :, :, keys], kv[1, :, :, keys], causal=b.causal, scale=scale
                )
                merge(out[:, :, i:j], lse[:, :, i:j], part, part_lse)
            if coming:
                kv = coming.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, local_kv, out, lse)
        ctx.settings = ring, kernel, scale, starts
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        ring, kernel, scale, starts = ctx.settings
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        coming_grad = None
        for step in range(ring.world):
            coming = _Exchange(kv, ring) if step + 1 < ring.world else None
            source = (ring.rank - step) % ring.world
            key_value_grads = []
            for b in blocks(ring.rank, source, ring.world, q.shape[2], starts):
                (i, j), keys = b.queries, slice(*b.keys)
                rows = [x[:, :, i:j] for x in (grad, q)]
                part_q, part_k, part_v = kernel.backward(
                    *rows,
                    kv[0, :, :, keys],
                    kv[1, :, :, keys],
                    out[:, :, i:j],
                    lse[:, :, i:j].contiguous(),
                    causal=b.causal,
                    scale=scale,
                )
                dq[:, :, i:j] += part_q
                key_value_grads.append((keys, part_k, part_v))
            dkv = coming_grad.wait() if coming_grad else torch.zeros(kv.shape, dtype=torch.float32, device=q.device)
            for keys, part_k, part_v in key_value_grads:
                dkv[0, :, :, keys] += part_k
                dkv[1, :, :, keys] += part_v
            # After the last step a gradient has to be passed on once more to reach its rank.
            coming_grad = _Exchange(dkv, ring) if ring.world > 1 else None
            if coming:
                kv = coming.wait()
        if coming_grad:
            dkv = coming_grad.wait()
        dkv = dkv.to(kv.dtype)
        return dq.to(q.dtype), dkv[0], dkv[1], None, None, None, None


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a block into the running output and log-sum-exp, in place and in float32."""
    out.sub_(torch.sigmoid(part_lse - lse)[..., None] * (out - part.float()))
    fresh = lse == -torch.inf  # no key so far, and infinity minus infinity is not a number
    merged = lse - torch.nn.functional.logsigmoid(lse - part_lse)
    lse.copy_(torch.where(fresh, part_lse, merged))


class _Exchange:
    """Sends a tensor to the next rank while receiving one from the previous rank."""

    def __init__(self, send: Tensor, ring: Ring) -> None:
        self.sent, self.received = send.contiguous(), torch.empty_like(send, memory_format=torch.contiguous_format)
        members = ring.members or range(ring.world)
        to, by = (members[(ring.rank + d) % ring.world] for d in (1, -1))
        if ring.group is not None:
            to, by = (dist.get_global_rank(ring.group, r) for r in (to, by))
        operations = [
            dist.P2POp(dist.isend, self.sent, to, group=ring.group),
            dist.P2POp(dist.irecv, self.received, by, group=ring.group),
        ]
        self.requests = dist.batch_isend_irecv(operations)

    def wait(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.received
