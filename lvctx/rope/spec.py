"""Parameters of rotary frequencies, common to all schemes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding, unscaled or scaled."""

    head_dim: int
    """Channels of one attention head that rotate; even."""
    theta: float
    """The base: the pretrained model's, or its replacement (LongVA: 1e9)."""
    factor: float = 1.0
    """Ratio of new to pretrained length, for pi, ntk and yarn; plain RoPE does not use it."""
    original: int = 0
    """Pretrained length in tokens; only yarn needs it."""
    attention_factor: float | None = None
    """YaRN attention factor (multiplies cos and sin); None: the paper's."""
