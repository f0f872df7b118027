"""Every RoPE scaling of an M-RoPE model: M-RoPE++ and the methods it is compared with (GIRAFFE table 1)."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lvctx.rope import mrope_pp, ntk, pi, yarn
from lvctx.rope import theta as rope
from lvctx.rope.mrope_pp import MropeSpec, Ramp
from lvctx.rope.spec import RopeSpec

Method = Literal["mrope++", "pi", "ntk", "yarn", "none"]
METHODS: tuple[Method, ...] = ("mrope++", "pi", "ntk", "yarn", "none")
MROPE_SCHEMES = {"pi": pi, "ntk": ntk, "yarn": yarn, "none": rope}


@dataclass(frozen=True, kw_only=True)
class Mrope:
    """The positions of an M-RoPE model before scaling."""

    head_dim: int
    """Channels of one attention head."""
    theta: float
    """The base."""
    sections: tuple[int, int, int]
    """Numbers of frequencies of time, height and width."""
    interleaved: bool
    """Qwen3-VL: t h w t h w ... with t for the remaining channels, instead of one block after another."""

    @property
    def axes(self) -> str:
        """One letter per channel, fastest first: the axis (t, h, w) whose position it rotates by."""
        time, height, width = self.sections
        if not self.interleaved:
            return "t" * time + "h" * height + "w" * width
        ends = {1: ("h", 3 * height), 2: ("w", 3 * width)}
        return "".join(
            ends[j % 3][0] if j % 3 in ends and j < ends[j % 3][1] else "t" for j in range(self.head_dim // 2)
        )


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling method and factor."""

    method: Method
    """`none` keeps every frequency: direct extrapolation."""
    ramp: Ramp
    """M-RoPE++ only: the ramp of the height section between time and width."""
    factor: float
    """Ratio of new to pretrained length, at least 1."""
    original: int
    """Pretrained length in tokens."""


def _specs(model: Mrope, scaling: RopeScaling) -> tuple[Any, Any]:
    if scaling.method == "mrope++":
        assert not model.interleaved
        return mrope_pp, MropeSpec(
            head_dim=model.head_dim,
            theta=model.theta,
            sections=model.sections,
            factor=scaling.factor,
            original=scaling.original,
            ramp=scaling.ramp,
        )
    return MROPE_SCHEMES[scaling.method], RopeSpec(
        head_dim=model.head_dim, theta=model.theta, factor=scaling.factor, original=scaling.original
    )


def inv_freq(model: Mrope, scaling: RopeScaling) -> Tensor:
    """Angular frequencies (head_dim / 2,) in radians per position, float64."""
    scheme, spec = _specs(model, scaling)
    frequencies: Tensor = scheme.inv_freq(spec)
    return frequencies


def mrope_attention_factor(model: Mrope, scaling: RopeScaling) -> float:
    """Factor for cos and sin: YaRN's attention factor, 1 for the other methods."""
    scheme, spec = _specs(model, scaling)
    return float(scheme.attention_factor(spec)) if scheme is yarn else 1.0


def to_hf(model: Mrope, scaling: RopeScaling) -> dict[str, Any]:
    """The `rope_parameters` that make stock transformers compute these frequencies."""
    scheme, spec = _specs(model, scaling)
    extra = {"mrope_interleaved": True} if model.interleaved else {}
    return {**scheme.to_hf(spec), "mrope_section": list(model.sections), **extra}
