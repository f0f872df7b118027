"""Zigzag sharding of a sequence: 2W chunks, rank r holds chunks r and 2W-1-r, so causal attention costs each the same.

Where U divides W, the shards of U neighbouring ranks are zigzag shards of a shard of W / U ranks.

Brandon et al. 2023 (Striped Attention) name the imbalance; this layout is ring-flash-attention's and EasyContext's.
A length that 2W does not divide is padded at its end, where no real token attends to the padding.

Shapes: L tokens of the whole sequence, W ranks, C = ceil(L / 2W) tokens of a chunk; a shard has 2C.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def chunks_of(rank: int, world: int) -> tuple[int, ...]:
    """Numbers of the chunks a rank holds, ascending. A single rank holds the only chunk."""
    return (0,) if world == 1 else (rank, 2 * world - 1 - rank)


def shard(full: Tensor, *, rank: int, world: int, fill: int, dim: int = -1, contiguous: bool = False) -> Tensor:
    """A rank's part of a tensor with L entries along `dim`, padded with `fill` where 2W does not divide L.

    With `contiguous` it is the rank's one of W chunks.
    """
    if world == 1:
        return full
    dim %= full.ndim
    count = world if contiguous else 2 * world
    size = -(-full.shape[dim] // count)
    missing = count * size - full.shape[dim]
    padded = F.pad(full, [0, 0] * (full.ndim - 1 - dim) + [0, missing], value=fill) if missing else full
    chunks = (rank,) if contiguous else chunks_of(rank, world)
    return torch.cat([padded.narrow(dim, c * size, size) for c in chunks], dim)


def unshard(parts: Sequence[Tensor], *, dim: int) -> Tensor:
    """The padded tensor whose shards are `parts`, in the order of more than one rank."""
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([*(first for first, _ in halves), *(second for _, second in reversed(halves))], dim)
