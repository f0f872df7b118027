"""The tokens of a forward pass while a prompt is computed, chosen from a GPU's free memory.

Python takes the same time for a pass of any number of tokens, and a GPU waits for it where model and number are small.

Symbols: E hidden width, I inner width, H query heads, D channels of a head, W ranks that share a sequence, c bytes of a
value. Bytes of temporary tensors per token of a chunk; layers are computed one after another:
    throughout: embeddings, a layer's input, its norm, and the last states of the chunk before with a copy, 5 c E
    the largest of
        attention: the output over the new tokens in float32 and two more such tensors, while the output over the older
        ones is merged with it, 12 H D; queries and both outputs, 3 c H D. With W > 1 two more copies of the queries,
        2 c H D: these are of all ranks' tokens, while everything else is divided by W.
        after it the states are another tensor, c E, and there are the float32 input and product of a norm, 8 E, or
        gate, up and product of the MLP, 3 c I, or those of k experts for each token, k c (E + 4 I), later k (2 c + 8) E
Logits exist for an answer's tokens only, or for 256 tokens at a time.
"""

from typing import Any

import torch

from lvctx.device import free_memory
from lvctx.parallel.ring_attention import Ring
from lvctx.parallel.striped_attention import least

SMALLEST = 2048
"""Tokens on a CPU, which gains nothing from more, and wherever attention needs a mask of a chunk times the prompt."""
LARGEST = 32_768
"""Sixteen times the tokens with which SmolLM2-135M's shape reached 6 % of an H100's peak (benchmarks/README.md): if a
pass of more took no longer, it would be at the peak."""
SHARE = 8
"""One part in so many of the free memory is for temporary tensors; the others are for KV caches."""


def token_bytes(config: Any, value: int, ranks: int = 1) -> int | None:
    """Bytes of temporary tensors per token for a decoder's configuration and `value` bytes of each number.

    None for a configuration that does not name its widths as transformers' classes with a gated MLP do.
    """
    sizes = [getattr(config, name, None) for name in ("hidden_size", "intermediate_size", "num_attention_heads")]
    if not all(isinstance(size, int) for size in sizes):
        return None
    wide, inner, heads = map(int, sizes)  # type: ignore[arg-type]
    channels = getattr(config, "head_dim", None) or wide // heads
    active = getattr(config, "num_experts_per_tok", None) or 0
    expert = getattr(config, "moe_intermediate_size", None) or inner
    attention = (12 + (3 if ranks == 1 else 5) * value) * heads * channels
    experts = active * max(value * (wide + 4 * expert), (2 * value + 8) * wide)
    after = value * wide + max(8 * wide, 3 * value * inner, experts)
    return -(-(5 * value * wide + max(ranks * attention, after)) // ranks)


def prefill_chunk(config: Any, free: int, *, value: int, ranks: int = 1) -> int:
    """The largest power of two of tokens, within the limits, whose temporary tensors fit into their share of `free`."""
    each = token_bytes(config, value, ranks)
    fitting = free // SHARE // each if each else 0
    return min(max(1 << max(fitting, 1).bit_length() - 1, SMALLEST), LARGEST)


def choose_chunk(lm: Any, device: torch.device, *, flash: bool, ring: Ring) -> int:
    """`prefill_chunk` of a decoder loaded on a device, the same on all ranks; `flash` attention needs no mask."""
    if device.type != "cuda" or not flash:
        return SMALLEST
    return least(prefill_chunk(lm.config, free_memory(), value=lm.dtype.itemsize, ranks=ring.world), ring, device)
