"""NTK-aware scaling (bloc97 2023), static: a larger base, so that the slowest channel is interpolated by the factor and
the fastest stays as it was: theta' = theta * factor^(d / (d - 2)).

A base is all it changes, so what is written is plain rope; stock `dynamic` would follow each sequence's own length.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from lvctx.rope import frequencies as rope
from lvctx.rope.spec import RopeSpec


def stretched(spec: RopeSpec) -> RopeSpec:
    """Unscaled RoPE with the base that scales `spec.theta` by `spec.factor`."""
    theta = spec.theta * spec.factor ** (spec.head_dim / (spec.head_dim - 2))
    return replace(spec, theta=theta, factor=1.0)


def inv_freq(spec: RopeSpec) -> Tensor:
    """Angular frequencies (head_dim / 2,) in radians per position, float64."""
    return rope.inv_freq(stretched(spec))


def to_hf(spec: RopeSpec) -> dict[str, Any]:
    """The `rope_parameters` of plain rope with the larger base."""
    return rope.to_hf(stretched(spec))
