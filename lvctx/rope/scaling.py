"""Scaled RoPE: from a model's configuration and the user's options to the rope_parameters of the new config.json."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lvctx.errors import InputError, UsageError
from lvctx.rope import mrope_pp, ntk, pi, yarn
from lvctx.rope import theta as rope
from lvctx.rope.mrope_pp import MropeSpec
from lvctx.rope.spec import RopeSpec

log = logging.getLogger(__name__)
Scheme = Literal["theta", "pi", "ntk", "yarn", "mrope++", "none"]

LONGVA_THETA = 1e9
"""The base of `theta` if none is given (LongVA section 3.1)."""

FULL_ATTENTION = "full_attention"
"""Key of the parameters of the layers that see the whole context, where layers differ (Gemma 3, Olmo 3)."""

KEPT = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""Keys that state which channels rotate, and by which axis: no scheme changes them."""

SCHEMES: dict[str, tuple[Any, str]] = {
    "theta": (rope, "default"),
    "pi": (pi, "linear"),
    "ntk": (ntk, "default"),
    "yarn": (yarn, "yarn"),
    "mrope++": (mrope_pp, "yarn"),
}
"""Name -> its module, and the `rope_type` of a model that already has it."""


@dataclass(frozen=True, kw_only=True)
class ScaledRope:
    """The part of a configuration that changes."""

    rope_parameters: dict[str, Any]
    """In the format of transformers 5 and vLLM; where layers differ, with the unchanged ones of the other layers."""
    factor: float
    """Multiple of the pretrained length; 1 if only the base changes."""
    context: int
    """Context length of the new configuration, in tokens."""
    original: int | None = None
    """Pretrained length in tokens that `factor` multiplies; None for `theta` and `none`."""


def check_rope(config: Any, where: object) -> None:
    """Raise InputError for a RoPE type that this transformers does not compute. `config` is a model's or a VLM's."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    by_layer = [value for value in rope.values() if isinstance(value, dict)] if isinstance(rope, dict) else []
    for one in by_layer or [rope]:
        kind = one.get("rope_type", "default") if isinstance(one, dict) else one
        known = {*ROPE_INIT_FUNCTIONS, "default", getattr(config.get_text_config(), "default_rope_type", "default")}
        if not isinstance(kind, str) or kind not in known:
            raise InputError(
                f"its positions are of type {kind!r}, which transformers does not compute",
                where=where,
                fix="--rope theta removes the scaling",
            )


def full_attention_rope(rope_parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rope_parameters of the layers that see the whole context: all of them unless layers differ."""
    own = rope_parameters.get(FULL_ATTENTION)
    return own if isinstance(own, dict) else rope_parameters


def resolve_scaling(
    config: Any,
    *,
    scheme: Scheme,
    theta: float | None,
    factor: float | None,
    context: int | None,
    seq_len: int,
    attention_factor: float | None = None,
    original: int | None = None,
) -> ScaledRope:
    """Positions of `scheme` for a model with this transformers configuration, trained on rows of `seq_len` (0: none).

    `none` keeps the model's positions (direct extrapolation). `theta` removes scaling and sets the base `theta`. The
    others scale: `factor` is relative to the length the model was pretrained on, so on a model that already has the
    same scheme (pi, yarn) the new factor replaces the old one; ntk changes only the base and starts from it.
    Without a factor, `context` or the rows decide it. `original` is the pretrained length, needed if the configuration
    does not have it: with `linear` positions it does not, since some models write the scaled length into
    max_position_embeddings and some the original one. `attention_factor` is for yarn only, and one from an earlier
    scaling is not kept; mrope++ has the ramp `index`. Where layers differ, those with full attention are scaled:
    distances inside a sliding window do not grow with the context (Gemma 3, section 2, scales the same layers).
    Raises UsageError for contradicting flags and for mrope++ without its axes, InputError for a model with positions of
    another kind.
    """
    old, stored_context = _read(config, scheme)
    kind = old.get("rope_type", "default")
    if scheme in ("none", "theta") and original is not None:
        raise UsageError(f"--original-length has no meaning with --rope {scheme}", fix="choose --rope pi, ntk or yarn")
    if scheme in ("none", "theta") and factor is not None:
        raise UsageError(f"--factor has no meaning with --rope {scheme}", fix="choose --rope pi, ntk or yarn")
    if scheme != "yarn" and attention_factor is not None:
        raise UsageError(f"--attention-factor has no meaning with --rope {scheme}", fix="choose --rope yarn")
    if scheme == "none":
        if theta is not None:
            raise UsageError("--rope none keeps the base", fix="drop --rope-theta, or use --rope theta")
        return ScaledRope(
            rope_parameters=_all_layers(config, old), factor=1.0, context=context or max(stored_context, seq_len)
        )
    module, scheme_rope_type = SCHEMES[scheme]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = {key: old[key] for key in KEPT if key in old}
    rotating = int(head_dim * rope_number(kept, "partial_rotary_factor", above=0.0, default=1.0))
    if rotating < 4 or rotating % 2:
        raise InputError(f"{rotating} channels of a head rotate; it has to be an even number of at least 4")
    if scheme == "theta":
        stored = old.get("rope_theta")
        if isinstance(stored, int | float) and (theta or LONGVA_THETA) < stored:
            log.warning(
                "base %g is lower than the model's own %g: its context is shorter", theta or LONGVA_THETA, stored
            )
        if kind != "default":
            log.warning("the model's %s positions (factor %s) lose their scaling", kind, old.get("factor"))
        unscaled = RopeSpec(head_dim=rotating, theta=theta or LONGVA_THETA)
        return ScaledRope(
            rope_parameters=_all_layers(config, module.to_hf(unscaled) | kept),
            factor=1.0,
            context=context or max(stored_context, seq_len),
        )
    if kind not in ("default", scheme_rope_type):
        raise InputError(
            f"the model's positions are {kind} already", fix="--rope none keeps them, --rope theta removes the scaling"
        )
    original = original or _original(old, stored_context, known=bool(factor and context))
    factor = factor or (context or seq_len) / original
    if factor < 1:
        raise UsageError(f"--rope {scheme} would scale by {factor:g}", fix="give --factor, at least 1, or --context")
    scaled = RopeSpec(
        head_dim=rotating,
        theta=theta or rope_number(old, "rope_theta", above=1.0),
        factor=factor,
        original=original,
        attention_factor=attention_factor,
    )
    spec = _mrope_spec(scaled, kept) if scheme == "mrope++" else scaled
    return ScaledRope(
        rope_parameters=_all_layers(config, module.to_hf(spec) | kept),
        factor=factor,
        context=context or round(factor * original),
        original=original,
    )


def _mrope_spec(spec: RopeSpec, kept: Mapping[str, Any]) -> MropeSpec:
    """The same for M-RoPE++. Raises UsageError for one axis, and for Qwen3-VL, whose axes alternate."""
    if "mrope_section" not in kept or kept.get("mrope_interleaved"):
        raise UsageError("--rope mrope++ is for Qwen2-VL and Qwen2.5-VL", fix="choose --rope pi, ntk or yarn")
    time, height, width = kept["mrope_section"]
    sections = (time, height, width)
    return MropeSpec(
        head_dim=spec.head_dim, theta=spec.theta, sections=sections, factor=spec.factor, original=spec.original
    )


def _read(config: Any, scheme: Scheme) -> tuple[dict[str, Any], int]:
    """Rope parameters of the layers with full attention, and max_position_embeddings. Raises InputError."""
    old, stored_context = getattr(config, "rope_parameters", None), getattr(config, "max_position_embeddings", None)
    if not isinstance(old, dict) or not old:
        raise InputError(
            f"a {getattr(config, 'model_type', '')} model has no rotary positions, so they cannot be extended"
        )
    own = full_attention_rope(old)
    if any(isinstance(value, dict) for value in own.values()):
        raise InputError(f"positions differ from layer to layer, and none are for {FULL_ATTENTION}")
    if scheme != "none" and own.get("rope_type") == "proportional":
        raise InputError("proportional positions (Gemma 4) cannot be scaled", fix="--rope none keeps them")
    if not isinstance(stored_context, int):
        raise InputError("config.json has no max_position_embeddings")
    return dict(own), stored_context


def _all_layers(config: Any, rope: dict[str, Any]) -> dict[str, Any]:
    """`rope` as the rope_parameters of the layers with full attention, and those of the others unchanged."""
    old = config.rope_parameters
    return rope if full_attention_rope(old) is old else {**old, FULL_ATTENTION: rope}


def _original(old: Mapping[str, Any], stored_context: int, *, known: bool) -> int:
    """The pretrained length. Raises InputError if the configuration leaves it open, unless nothing depends on it."""
    stored = old.get("original_max_position_embeddings")
    if isinstance(stored, int) and stored > 0:
        return stored
    if old.get("rope_type", "default") == "default" or known:
        return stored_context
    factor = rope_number(old, "factor", above=0.0)
    raise InputError(
        f"its {old['rope_type']} positions are scaled by {factor:g}, and config.json does not state whether "
        f"{stored_context} positions are the length before or after",
        fix=f"give --original-length, {stored_context} or {round(stored_context / factor)}",
    )


def rope_number(parameters: Mapping[str, Any], key: str, *, above: float, default: float | None = None) -> float:
    """A number of the rope parameters. Raises InputError for anything else."""
    value = parameters.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < math.inf:
        raise InputError(f"config.json has {key} {value!r} among its rope parameters", fix="correct it")
    return float(value)
