"""One sequence on several ranks: each has the keys and values of every W-th token, so the cache is divided too.

Token p belongs to rank p mod W (Brandon et al. 2023, Striped Attention), so after any append or crop all ranks have the
same number of tokens, or one fewer. The new tokens of a forward are divided the same way, so that projections and MLP
are not computed twice. In every layer the new queries are sent to all ranks, each attends to its keys, and the results
are returned and merged by their log-sum-exp (pass-Q of Yang et al. 2024, Context Parallelism for Scalable Million-Token
Inference): a chunk has fewer queries than there are keys before it, and the keys are never sent.
No mask is built. Cached tokens precede all new tokens. Of two ranks' new tokens, those of rank a attend to those of
rank b up to j = i if b's first is not later than a's, else up to j = i - 1 (i-th against j-th): a causal square.

Shapes: W ranks, B samples, H query heads, K key heads, L this rank's new tokens, M the most that any rank has, S this
rank's tokens so far, Q = W M queries, D channels, C rows, E width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lvctx.parallel.block_attention import Kernel, Plain, choose_kernel
from lvctx.parallel.hf_attention import check_config, is_plain
from lvctx.parallel.ring_attention import Ring, merge

STRIPED_ATTENTION = "lvctx_stripes"
"""The required `attn_implementation` of a model."""


@dataclass(frozen=True, kw_only=True)
class Stripe:
    """New tokens of a sequence that ranks process together, and which of them belong to one rank."""

    ring: Ring
    """The ranks."""
    first: int
    """Number of tokens before the new ones: their keys and values are cached."""
    count: int
    """Number of new tokens on all ranks."""

    @property
    def local_slice(self) -> slice:
        """This rank's new tokens; if it has none, the first one, since a model cannot run on no token."""
        return slice(self.lead(self.ring.rank), None, self.ring.world) if self.local_count else slice(0, 1)

    @property
    def local_count(self) -> int:
        """Number of new tokens of this rank; keys and values of a substitute token are not counted."""
        return owned_count(self.first + self.count, self.ring) - owned_count(self.first, self.ring)

    def lead(self, rank: int) -> int:
        """Index of a rank's first token among the new ones; it may be beyond their end."""
        return (rank - self.first) % self.ring.world


def owned_count(length: int, ring: Ring) -> int:
    """Number of a sequence's first `length` tokens that belong to this rank."""
    return len(range(ring.rank, length, ring.world))


def needs_no_mask(lm: Any, device: torch.device) -> bool:
    """Whether `prepare` is useful for a single rank too: if flash kernels support the model's attention."""
    head_dim = getattr(lm.config, "head_dim", None) or lm.config.hidden_size // lm.config.num_attention_heads
    kernel = choose_kernel(device.type, lm.dtype, head_dim)
    return is_plain(lm.config) and not isinstance(kernel, Plain)


def prepare(lm: Any) -> None:
    """Make a language model attend in stripes: its forwards then need `stripe=`, except on a single rank.

    Raises InputError for a model whose attention is not plain.
    """
    from transformers import AttentionInterface

    check_config(lm.config, where=lm.config.name_or_path or lm.config.model_type)
    AttentionInterface.register(STRIPED_ATTENTION, _attend)
    lm.set_attn_implementation(STRIPED_ATTENTION)


def last_rows(local_LE: Tensor, *, end: int, count: int, ring: Ring) -> Tensor:
    """Rows (count, E) of the last tokens of a sequence of `end`, on every rank; `local_LE` ends with this rank's."""
    lead = Stripe(ring=ring, first=end - count, count=count).lead(ring.rank)
    full_CE = torch.zeros(count, local_LE.shape[-1], dtype=torch.float32, device=local_LE.device)
    places_CE = full_CE[lead :: ring.world]
    places_CE.copy_(local_LE[len(local_LE) - len(places_CE) :])
    dist.all_reduce(full_CE, group=ring.group)  # every row is non-zero on one rank only, so the sum is exact
    return full_CE.to(local_LE.dtype)


def least(number: int, ring: Ring, device: torch.device) -> int:
    """The smallest `number` of a ring's ranks."""
    if ring.world == 1:
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=ring.group)
    return int(found)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    stripe: Stripe | None = None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention: q (B, H, L, D) of this rank's new tokens, k and v (B, K, S, D) of all it has.

    Returns (B, L, H, D). Every rank must call it; without `stripe` there is a single rank. A mask is that of generated
    tokens of several samples.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None:
        assert stripe is None, "stripes support positions, not masks"
        return attend_padded(query, key, value, attention_mask, scale).transpose(1, 2), None
    kernel = choose_kernel(query.device.type, query.dtype, query.shape[-1])
    if stripe is None:
        return attend_alone(query, key, value, kernel, scale).transpose(1, 2), None
    ring, local_count, rows = stripe.ring, stripe.local_count, query.shape[2]
    before = owned_count(stripe.first, ring)
    assert rows == max(local_count, 1)
    assert key.shape[2] == before + rows
    most = -(-stripe.count // ring.world)
    padded = F.pad(query, (0, 0, 0, most - rows)).contiguous()
    q_WBHMD = padded.new_empty(ring.world, *padded.shape)
    dist.all_gather(list(q_WBHMD), padded, group=ring.group)

    # The log-sum-exp is sent as one more channel of the output.
    parts = torch.zeros(*q_WBHMD.shape[:-1], query.shape[-1] + 1, dtype=torch.float32, device=query.device)
    out, lse = parts[..., :-1], parts[..., -1].fill_(-torch.inf)
    if before:
        q_BHQD = q_WBHMD.permute(1, 2, 0, 3, 4).flatten(2, 3)
        block_output = kernel.forward(q_BHQD, key[:, :, :before], value[:, :, :before], causal=False, scale=scale)
        merge(out, lse, *(x.unflatten(2, (ring.world, most)).movedim(2, 0) for x in block_output))
    for source in range(ring.world):
        skipped = int(stripe.lead(source) < stripe.lead(ring.rank))
        square = min(most - skipped, local_count)
        if square:
            queries, keys = slice(skipped, skipped + square), slice(before, before + square)
            block_output = kernel.forward(
                q_WBHMD[source, :, :, queries], key[:, :, keys], value[:, :, keys], causal=True, scale=scale
            )
            merge(out[source, :, :, queries], lse[source, :, :, queries], *block_output)
    local_parts = torch.empty_like(parts)
    dist.all_to_all_single(local_parts, parts, group=ring.group)
    weights_WBHM = local_parts[..., -1].softmax(0)
    out_BHMD = (weights_WBHM[..., None] * local_parts[..., :-1]).sum(0)
    return out_BHMD[:, :, :rows].transpose(1, 2).to(query.dtype), None


def attend_padded(query: Tensor, key: Tensor, value: Tensor, mask_B11S: Tensor, scale: float) -> Tensor:
    """One new token (B, H, 1, D) of each sample over those tokens of it that are no padding.

    The query heads of a key head are rows of queries, so that keys and values are not repeated.
    """
    q_BKGD = query.view(query.shape[0], key.shape[1], -1, query.shape[-1])
    return F.scaled_dot_product_attention(q_BKGD, key, value, attn_mask=mask_B11S, scale=scale).view_as(query)


def attend_alone(query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, scale: float) -> Tensor:
    """One rank's (B, H, L, D): a causal square over the new tokens, and all tokens before them."""
    before = key.shape[2] - query.shape[2]
    if query.shape[2] == 1:  # a generated token attends to all: one kernel call, not two that are merged
        return kernel.forward(query, key, value, causal=False, scale=scale)[0]
    new, lse = kernel.forward(query, key[:, :, before:], value[:, :, before:], causal=True, scale=scale)
    if not before:
        return new
    out = new.float()
    merge(out, lse, *kernel.forward(query, key[:, :, :before], value[:, :, :before], causal=False, scale=scale))
    return out.to(query.dtype)
