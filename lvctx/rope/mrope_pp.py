"""M-RoPE++: temporal channels stay as trained, width is interpolated, height ramps between them (GIRAFFE 3.2).

M-RoPE gives the first `t` of a head's frequencies to time, the next `h` to height, the rest to width: 16, 24 and 24 in
Qwen2-VL. With scale s, 0-based channel j, theta_j = base^(-2j / head_dim) and r_j = L theta_j / 2 pi turns within the
pretrained length L (the paper's piecewise function, whose ramp has three readings):

- time    theta_j
- height  theta_j (1/s + (1 - 1/s) gamma_j), gamma 1 at the last channel of time and 0 at the last of height
- width   theta_j / s

`index`: gamma linear in j, as in YaRN: this is stock YaRN with its betas at the ends of the height section.
`wavelength`: gamma linear in r_j, the paper's literal text; this is stock `llama3`. `ntk`: the authors' released code,
which gives height and width the frequencies of a larger base; stock `longrope` can express it.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Ramp = Literal["index", "wavelength", "ntk"]


@dataclass(frozen=True, kw_only=True)
class MropeSpec:
    """Parameters of M-RoPE++ frequencies."""

    head_dim: int
    """Channels of one attention head; twice the sum of `sections`."""
    theta: float
    """The base; Qwen2-VL 1e6."""
    sections: tuple[int, int, int]
    """Frequencies of time, height and width, in this order; Qwen2-VL (16, 24, 24)."""
    factor: float
    """s: new length over pretrained length, at least 1."""
    original: int
    """L: pretrained length in tokens; Qwen2-VL 32,768."""
    ramp: Ramp = "index"
    """The ramp of the height section between time and width."""

    @property
    def last(self) -> tuple[int, int]:
        """The last channels of time and of height: 15 and 39."""
        return self.sections[0] - 1, self.sections[0] + self.sections[1] - 1


def inv_freq(spec: MropeSpec) -> Tensor:
    """Angular frequencies (head_dim / 2,) in radians per position, float64."""
    channel = torch.arange(spec.head_dim // 2, dtype=torch.float64)
    theta = spec.theta ** (-2 * channel / spec.head_dim)
    time, height = spec.last
    if spec.ramp == "ntk":
        return torch.where(channel <= time, theta, _ntk_theta(spec) ** (-2 * channel / spec.head_dim))
    along = theta if spec.ramp == "wavelength" else channel
    gamma = ((along - along[height]) / (along[time] - along[height])).clamp(0, 1)
    return theta * (1 / spec.factor + (1 - 1 / spec.factor) * gamma)


def _ntk_theta(spec: MropeSpec) -> float:
    """The base of height and width in the authors' code: lengths enter as last positions."""
    ratio = (spec.factor * spec.original - 1) / (spec.original - 1)
    return float(spec.theta * ratio ** (spec.head_dim / (spec.head_dim - 2)))


def betas(spec: MropeSpec) -> tuple[float, float]:
    """Turns of the last channels of time and height within the pretrained length: 204.6539 and 1.150854 for Qwen2-VL.

    Used as YaRN's beta_fast and beta_slow, they place its ramp between these channels.
    """
    time, height = (spec.original * spec.theta ** (-2 * j / spec.head_dim) / (2 * math.pi) for j in spec.last)
    return time, height


def to_hf(spec: MropeSpec) -> dict[str, Any]:
    """The `rope_parameters` that make stock transformers compute these frequencies, with attention left as it is."""
    common = {"rope_theta": spec.theta, "mrope_section": list(spec.sections)}
    fast, slow = betas(spec)
    scaling = {"factor": spec.factor, "original_max_position_embeddings": spec.original}
    if spec.ramp == "index":
        # Without truncate, YaRN rounds the ends of its ramp to whole channels: 14.9999... would become 14.
        extra = {"attention_factor": 1.0, "beta_fast": fast, "beta_slow": slow, "truncate": False}
        return {"rope_type": "yarn", **common, **scaling, **extra}
    if spec.ramp == "wavelength":
        return {"rope_type": "llama3", **common, **scaling, "low_freq_factor": slow, "high_freq_factor": fast}
    plain = spec.theta ** (-2 * torch.arange(spec.head_dim // 2, dtype=torch.float64) / spec.head_dim)
    factors = (plain / inv_freq(spec)).tolist()
    return {
        "rope_type": "longrope",
        **common,
        **scaling,
        "attention_factor": 1.0,
        "short_factor": factors,
        "long_factor": factors,
    }
