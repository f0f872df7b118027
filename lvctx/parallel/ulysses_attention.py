"""Ulysses attention (Jacobs et al. 2023, DeepSpeed-Ulysses, sec. 3): contiguous parts of a row, and two all-to-alls.

The first turns a part of the row with all heads into the whole row with a part of the heads, which torch's own
attention computes; the second turns the result back. So what needs the whole row works as on one process: documents,
and sliding windows, which ring attention does not support. Key heads are repeated where a rank would have a fraction.

No mask of the whole row is built. A document is a causal square; under a sliding window, as many queries as the window
is long attend to that many keys before theirs and to theirs, with the same mask each time.

`unified_attention` is Ulysses among neighbours and the ring around them (Fang and Zhao 2024, USP).

Shapes: W ranks, B samples, H query heads, K key heads, L local tokens, S tokens of the row, D channels.
"""

from functools import partial
from itertools import pairwise
from math import gcd

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lvctx.parallel.block_attention import Kernel
from lvctx.parallel.ring_attention import Ring, ring_attention
from lvctx.parallel.zigzag import shard, unshard

_ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels for documents and windows: cuDNN's are compiled for every new length."""


def ulysses_attention(
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    v_BKLD: Tensor,
    *,
    ring: Ring,
    scale: float,
    starts: tuple[int, ...] | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention of this rank's queries over the whole sequence: (B, H, L, D), differentiable.

    Every rank must call it, with contiguous parts of one length; W divides H. `starts` are the ascending positions
    where documents begin, the first 0. With `window` a token attends to itself and the `window` - 1 tokens before it.
    """
    if ring.world == 1:
        return masked_attention(q_BHLD, k_BKLD, v_BKLD, scale=scale, starts=starts, window=window)
    repeats = ring.world // gcd(ring.world, k_BKLD.shape[1])  # a divisor of H / K, since W divides H
    q, k, v = (
        _all_to_all(x, ring, split=1, join=2)
        for x in (q_BHLD, k_BKLD.repeat_interleave(repeats, 1), v_BKLD.repeat_interleave(repeats, 1))
    )
    out = masked_attention(q, k, v, scale=scale, starts=starts, window=window)
    return _all_to_all(out, ring, split=2, join=1)


def _all_to_all(x: Tensor, ring: Ring, *, split: int, join: int) -> Tensor:
    """Send the r-th of W pieces along `split` to rank r, and concatenate what arrives along `join`."""
    pieces = x.unflatten(split, (ring.world, -1)).movedim(split, 0).contiguous()
    return all_to_all_single_autograd(pieces, None, None, ring.group).movedim(0, join).flatten(join, join + 1)


def unified_attention(
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    v_BKLD: Tensor,
    *,
    ring: Ring,
    kernel: Kernel,
    scale: float,
    starts: tuple[int, ...] | None = None,
    window: int | None = None,
) -> Tensor:
    """As `ulysses_attention`, with zigzag shards and any number of heads; see `Ring.split` for the two dimensions.

    Neighbours have one member's zigzag share in the ring around them. A window needs a ring of one.
    """
    neighbours, around = ring.split(k_BKLD.shape[1])
    assert window is None or around.world == 1, "the ring supports no sliding window"
    count, divided = neighbours.world, neighbours.world > 1
    # The others of the group get nothing: one process group serves every division.
    splits = [int(r in (neighbours.members or ())) for r in range(ring.world)]

    def exchange(pieces: Tensor) -> Tensor:
        return all_to_all_single_autograd(pieces, splits, splits, ring.group)

    def gather_tokens(x: Tensor) -> Tensor:
        pieces = x.unflatten(1, (count, -1)).movedim(1, 0).contiguous()
        return unshard(exchange(pieces).unbind(), dim=2)

    q, k, v = (gather_tokens(x) if divided else x for x in (q_BHLD, k_BKLD, v_BKLD))
    if around.world == 1:
        out = masked_attention(q, k, v, scale=scale, starts=starts, window=window)
    else:
        out = ring_attention(q, k, v, ring=around, kernel=kernel, scale=scale, starts=starts)
    if not divided:
        return out
    pieces = torch.stack([shard(out, rank=r, world=count, fill=0, dim=2) for r in range(count)])
    return exchange(pieces).movedim(0, 1).flatten(1, 2)


def masked_attention(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    scale: float,
    starts: tuple[int, ...] | None = None,
    window: int | None = None,
) -> Tensor:
    """torch's causal attention (B, H, S, D) of a whole row, within documents and a window; see `ulysses_attention`."""
    length, groups = q_BHSD.shape[2], q_BHSD.shape[1] // k_BKSD.shape[1]
    attend = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=groups > 1)
    window = window or length
    if starts is None and window >= length:
        return attend(q_BHSD, k_BKSD, v_BKSD, is_causal=True)
    if window < length and groups > 1:  # torch's fast kernels support grouped queries only without a mask
        k_BKSD, v_BKSD = (x.repeat_interleave(groups, 1) for x in (k_BKSD, v_BKSD))
        attend = partial(F.scaled_dot_product_attention, scale=scale)
    parts = []
    with sdpa_kernel(_ANY_LENGTH):
        for begin, end in pairwise([*(starts or (0,)), length]):
            for first in range(begin, end, window):
                last = min(first + window, end)
                query = q_BHSD[:, :, first:last]
                before = window if first > begin else 0
                key, value = (x[:, :, first - before : last] for x in (k_BKSD, v_BKSD))
                if not before:
                    parts.append(attend(query, key, value, is_causal=True))
                    continue
                band = torch.ones(last - first, before + last - first, dtype=torch.bool, device=query.device)
                parts.append(attend(query, key, value, attn_mask=band.triu(1).tril(window)))
    return torch.cat(parts, 2)
