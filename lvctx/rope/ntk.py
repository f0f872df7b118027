"""NTK-aware scaling (bloc97 2023), static: a larger base, so that the slowest channel is interpolated by the factor and
the fastest stays as it was: theta' = theta * factor^(d / (d - 2)).

Only the base changes, so config.json gets plain RoPE; stock `dynamic` would depend on each sequence's own length.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from lvctx.rope import theta as rope
from lvctx.rope.spec import RopeSpec


def scale_base(spec: RopeSpec) -> RopeSpec:
    """Plain RoPE with the larger base for `spec.factor`."""
    theta = spec.theta * spec.factor ** (spec.head_dim / (spec.head_dim - 2))
    return replace(spec, theta=theta, factor=1.0)


def inv_freq(spec: RopeSpec) -> Tensor:
    """Angular frequencies (head_dim / 2,) in radians per position, float64."""
    return rope.inv_freq(scale_base(spec))


def to_hf(spec: RopeSpec) -> dict[str, Any]:
    """The `rope_parameters` of plain RoPE with the larger base."""
    return rope.to_hf(scale_base(spec))
