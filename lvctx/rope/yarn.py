"""YaRN (Peng et al. 2024, section 3): fast channels are kept, slow ones interpolated, with a linear ramp between.

A channel is fast if it turns more than `BETA_FAST` times within the pretrained length, slow if less than `BETA_SLOW`;
the ramp's ends are rounded outwards to whole channels, as the authors' code and stock runtimes do. Attention is
sharpened by multiplying cos and sin by 0.1 ln(factor) + 1 (equation 22: sqrt(1/t)).
"""

import math
from typing import Any

import torch
from torch import Tensor

from lvctx.rope import theta as rope
from lvctx.rope.spec import RopeSpec

BETA_FAST, BETA_SLOW = 32.0, 1.0
"""Turns within the pretrained length; the paper's values for Llama, and the defaults of every runtime."""


def inv_freq(spec: RopeSpec) -> Tensor:
    """Angular frequencies (head_dim / 2,) in radians per position, float64."""
    plain = rope.inv_freq(spec)
    low = max(math.floor(_channel(spec, BETA_FAST)), 0)
    high = min(math.ceil(_channel(spec, BETA_SLOW)), spec.head_dim - 1)
    ramp = (torch.arange(len(plain), dtype=torch.float64) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    return plain * (1 - slow) + plain / spec.factor * slow


def _channel(spec: RopeSpec, turns: float) -> float:
    """The (fractional) channel that turns this many times within the pretrained length."""
    return spec.head_dim * math.log(spec.original / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))


def attention_factor(spec: RopeSpec) -> float:
    """Factor for cos and sin: the given one, else the paper's."""
    return _published(spec) if spec.attention_factor is None else spec.attention_factor


def _published(spec: RopeSpec) -> float:
    return 0.1 * math.log(spec.factor) + 1 if spec.factor > 1 else 1.0


def to_hf(spec: RopeSpec) -> dict[str, Any]:
    """The `rope_parameters` of stock `yarn`.

    Without `attention_factor` every runtime computes the paper's. transformers, and vLLM from 0.31 on, read another one
    from it; other runtimes need side files (`lvctx/rope/runtimes.py`).
    """
    other = {} if spec.attention_factor is None else {"attention_factor": spec.attention_factor}
    return {
        "rope_type": "yarn",
        "rope_theta": spec.theta,
        "factor": spec.factor,
        "original_max_position_embeddings": spec.original,
        "beta_fast": BETA_FAST,
        "beta_slow": BETA_SLOW,
        **other,
    }
