"""From a model's configuration and what the user asks for to the positions its config.json will describe."""

import logging
from dataclasses import dataclass
from typing import Any, Literal

from lvctx.errors import InputError, UsageError
from lvctx.positions import ntk, pi, rope, yarn
from lvctx.positions.spec import RopeSpec

log = logging.getLogger(__name__)
Scheme = Literal["theta", "pi", "ntk", "yarn", "none"]

LONGVA_THETA = 1e9
"""The base of `theta` where none is given (LongVA section 3.1)."""

KEPT = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""Which channels turn, and with which axis: no scheme changes that."""

SCHEMES = {"theta": (rope, "default"), "pi": (pi, "linear"), "ntk": (ntk, "default"), "yarn": (yarn, "yarn")}
"""Name -> its file, and the `rope_type` of a model that has it already."""


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What of a configuration changes."""

    rope_parameters: dict[str, Any]
    """As transformers 5 and vLLM read it."""
    factor: float
    """Times the pretrained length; 1 where only the base changes."""
    context: int
    """Positions the new configuration promises, in tokens."""


def choose(
    config: Any,
    *,
    scheme: Scheme,
    theta: float | None,
    factor: float | None,
    context: int | None,
    seq_len: int,
    attention_factor: float | None = None,
) -> Positions:
    """Positions of `scheme` for a model with this transformers configuration, trained on rows of `seq_len` (0: none).

    `none` keeps what the model has (direct extrapolation). `theta` makes them plain, with base `theta`. The others
    stretch: `factor` is relative to the length the model was pretrained on, so on a model that has the same scheme
    already (pi, yarn) the new factor replaces the old one; ntk leaves no trace but its base and starts from that.
    Without a factor, `context` or the rows say how far. `attention_factor` is yarn's alone, and not kept from a former
    stretch. Raises UsageError for contradicting flags, InputError for a model whose positions are of another kind.
    """
    old = dict(config.rope_parameters or {})
    if any(isinstance(value, dict) for value in old.values()):
        raise InputError("positions differ from layer to layer; only models with one RoPE can be extended")
    kind, promised = old.get("rope_type", "default"), int(config.max_position_embeddings)
    if scheme in ("none", "theta") and factor is not None:
        raise UsageError(f"--factor has no meaning with --rope {scheme}", fix="choose --rope pi, ntk or yarn")
    if scheme != "yarn" and attention_factor is not None:
        raise UsageError(f"--attention-factor has no meaning with --rope {scheme}", fix="choose --rope yarn")
    if scheme == "none":
        if theta is not None:
            raise UsageError("--rope none keeps the base", fix="drop --rope-theta, or --rope theta")
        return Positions(rope_parameters=old, factor=1.0, context=context or max(promised, seq_len))
    module, own = SCHEMES[scheme]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = {key: old[key] for key in KEPT if key in old}
    rotating = int(head_dim * kept.get("partial_rotary_factor", 1.0))
    if scheme == "theta":
        if kind != "default":
            log.warning("the model's %s positions (factor %s) become plain ones", kind, old.get("factor"))
        spec = RopeSpec(head_dim=rotating, theta=theta or LONGVA_THETA)
        return Positions(
            rope_parameters=module.to_hf(spec) | kept, factor=1.0, context=context or max(promised, seq_len)
        )
    if kind not in ("default", own):
        raise InputError(
            f"the model's positions are {kind} already", fix="--rope none keeps them, --rope theta makes them plain"
        )
    stretched = kind != "default"
    original = int(old.get("original_max_position_embeddings") or promised / old["factor"]) if stretched else promised
    factor = factor or (context or seq_len) / original
    if factor < 1:
        raise UsageError(f"--rope {scheme} stretches by {factor:g}", fix="give --factor, at least 1, or --context")
    spec = RopeSpec(
        head_dim=rotating,
        theta=theta or old["rope_theta"],
        factor=factor,
        original=original,
        attention_factor=attention_factor,
    )
    return Positions(
        rope_parameters=module.to_hf(spec) | kept, factor=factor, context=context or round(factor * original)
    )
