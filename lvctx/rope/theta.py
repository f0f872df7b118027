"""Rotary position embedding with a chosen base (Su et al. 2021; Xiong et al. 2023 extend by raising the base).

LongVA raises Qwen2's base from 1e6 to 1e9 and trains at the new length (TMLR 2025, section 3.1).
"""

from typing import Any

import torch
from torch import Tensor

from lvctx.rope.spec import RopeSpec


def inv_freq(spec: RopeSpec) -> Tensor:
    """Angular frequencies (head_dim / 2,) in radians per position: theta^(-2i / head_dim), float64."""
    exponent = torch.arange(0, spec.head_dim, 2, dtype=torch.float64) / spec.head_dim
    return spec.theta**-exponent


def to_hf(spec: RopeSpec) -> dict[str, Any]:
    """The `rope_parameters` that make stock transformers and vLLM compute these frequencies."""
    return {"rope_type": "default", "rope_theta": spec.theta}
