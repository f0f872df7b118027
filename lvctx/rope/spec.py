"""What decides rotary frequencies, whatever the scheme."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding, unscaled or scaled."""

    head_dim: int
    """Channels of one attention head that rotate; even."""
    theta: float
    """The base: of the model as pretrained, or the one that replaces it (LongVA: 1e9)."""
    factor: float = 1.0
    """New length of pi, ntk and yarn over the pretrained length; rope does not use it."""
    original: int = 0
    """Pretrained length in tokens; yarn alone needs it."""
    attention_factor: float | None = None
    """What yarn multiplies cos and sin by; None: the paper's."""
