"""The tokens of a forward pass while a prompt is computed, chosen from a GPU's free memory.

The Python code of a forward pass takes the same time for any number of tokens. With a small model and few tokens the
GPU waits for it.

Symbols: E hidden width, I width inside the MLP, H query heads, D channels of a head, W ranks that share a sequence, c
bytes of a number. Layers are computed one after another, so these temporary tensors exist at a time, in bytes per token
of a chunk:
    always: the embeddings, a layer's input and its norm, the last states of the previous chunk and a copy, 5 c E
    and the largest of
        in attention: the output over the new tokens in float32 and two more tensors of that size, while the output over
        the older tokens is merged with it, 12 H D; queries and both outputs, 3 c H D. With W > 1 also two copies of the
        queries, 2 c H D. Attention has the tokens of all ranks, everything else one rank's, a part of W.
        after attention: the states after it, c E, and the larger of a norm's float32 input and product, 8 E, the MLP's
        gate, up and product, 3 c I, and, with k experts for each token, k c (E + 4 I) or k (2 c + 8) E
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
"""Sixteen times the chunk with which SmolLM2-135M's shape reached 6 % of an H100's peak (benchmarks/README.md). If it
takes no longer, it reaches 96 %, so a larger chunk can gain next to nothing."""
SHARE = 8
"""Temporary tensors may take one part in `SHARE` of the free memory; the rest is for KV caches."""


def token_bytes(config: Any, itemsize: int, ranks: int = 1) -> int | None:
    """Bytes of temporary tensors per token for a decoder's configuration and `itemsize` bytes of a number.

    None for a configuration that does not name its widths as transformers' classes with a gated MLP do.
    """
    sizes = [getattr(config, name, None) for name in ("hidden_size", "intermediate_size", "num_attention_heads")]
    if not all(isinstance(size, int) for size in sizes):
        return None
    wide, inner, heads = map(int, sizes)  # type: ignore[arg-type]
    channels = getattr(config, "head_dim", None) or wide // heads
    active = getattr(config, "num_experts_per_tok", None) or 0
    expert = getattr(config, "moe_intermediate_size", None) or inner
    attention = (12 + (3 if ranks == 1 else 5) * itemsize) * heads * channels
    experts = active * max(itemsize * (wide + 4 * expert), (2 * itemsize + 8) * wide)
    after = itemsize * wide + max(8 * wide, 3 * itemsize * inner, experts)
    return -(-(5 * itemsize * wide + max(ranks * attention, after)) // ranks)


def prefill_chunk(config: Any, free: int, *, itemsize: int, ranks: int = 1) -> int:
    """The largest power of two of tokens, within the limits, whose temporary tensors fit into their share of `free`."""
    each = token_bytes(config, itemsize, ranks)
    fitting = free // SHARE // each if each else 0
    return min(max(1 << max(fitting, 1).bit_length() - 1, SMALLEST), LARGEST)


def choose_chunk(lm: Any, device: torch.device, *, flash: bool, ring: Ring) -> int:
    """`prefill_chunk` of a decoder loaded on a device, the same on all ranks; `flash` attention needs no mask."""
    if device.type != "cuda" or not flash:
        return SMALLEST
    return least(prefill_chunk(lm.config, free_memory(), itemsize=lm.dtype.itemsize, ranks=ring.world), ring, device)
