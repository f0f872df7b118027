"""Position interpolation (Chen et al. 2023): positions are divided by the factor, so none exceeds the trained range."""

from typing import Any

from torch import Tensor

from lvctx.rope import theta as rope
from lvctx.rope.spec import RopeSpec


def inv_freq(spec: RopeSpec) -> Tensor:
    """Angular frequencies (head_dim / 2,) in radians per position: those of RoPE divided by the factor, float64."""
    return rope.inv_freq(spec) / spec.factor


def to_hf(spec: RopeSpec) -> dict[str, Any]:
    """The `rope_parameters` of stock `linear`.

    vLLM allows sequences up to max_position_embeddings times the factor; the frequencies are the same.
    """
    return {"rope_type": "linear", "rope_theta": spec.theta, "factor": spec.factor}
