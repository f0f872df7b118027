"""What other runtimes have to be told to compute the frequencies that config.json tells transformers.

All three know YaRN, and each reads it a little differently (vLLM 0.33, SGLang and llama.cpp, read in their sources):

- vLLM takes an M-RoPE model for four times as long as it is when it places YaRN's ramp, so betas are times 4.
- vLLM and SGLang ignore `attention_factor` and multiply cos and sin by attn_factor (0.1 ln s + 1); llama.cpp likewise
  by the `attn_factor` of the model file (newer builds overwrite the flag of that name).
- llama.cpp always rounds the ends of the ramp outwards to whole channels, older releases of the others too. Betas a
  ten-thousandth inwards land on the very channels, so rounding is asked for.

For `linear` (pi), `llama3` and `longrope` (ramps wavelength and ntk) vLLM and SGLang forget the sections.
"""

import math
from typing import Any

NUDGE = 1e-4
"""Relative; a two-thousandth of a channel at base 1e6, far above float32's rounding and far below a channel."""


def vllm(rope: dict[str, Any], *, context: int) -> dict[str, Any] | None:
    """`--hf-overrides` for these rope_parameters: {} where config.json is enough, None where vLLM cannot do them."""
    if rope["rope_type"] == "default":
        return {}
    if rope["rope_type"] != "yarn":
        return None
    fast, slow = _whole_channels(rope)
    changed = {**rope, "beta_fast": 4 * fast, "beta_slow": 4 * slow, "truncate": True, "attn_factor": _undo(rope)}
    return {"text_config": {"rope_parameters": changed, "max_position_embeddings": context}}


def sglang(rope: dict[str, Any]) -> dict[str, Any] | None:
    """The rope_parameters for SGLang's config.json: unchanged where they need no change, None where it cannot."""
    if rope["rope_type"] == "default":
        return rope
    if rope["rope_type"] != "yarn":
        return None
    fast, slow = _whole_channels(rope)
    return {**rope, "beta_fast": fast, "beta_slow": slow, "truncate": True, "attn_factor": _undo(rope)}


def llama_cpp(rope: dict[str, Any], *, architecture: str) -> list[str] | None:
    """Flags for llama.cpp's programs, on a GGUF of the model before it was stretched; None where it cannot."""
    if rope["rope_type"] == "default":
        return ["--rope-freq-base", f"{rope['rope_theta']:.9g}"]
    if rope["rope_type"] == "linear":
        return ["--rope-scaling", "linear", "--rope-scale", f"{rope['factor']:g}"]
    if rope["rope_type"] != "yarn":
        return None
    fast, slow = _whole_channels(rope)
    flags = {
        "--rope-scaling": "yarn",
        "--rope-scale": f"{rope['factor']:g}",
        "--yarn-orig-ctx": str(rope["original_max_position_embeddings"]),
        "--yarn-ext-factor": "1",
        "--yarn-beta-fast": f"{fast:.9g}",
        "--yarn-beta-slow": f"{slow:.9g}",
        "--override-kv": f"{architecture}.rope.scaling.attn_factor=float:{_undo(rope):.9g}",
    }
    return [word for flag in flags.items() for word in flag]


def _whole_channels(rope: dict[str, Any]) -> tuple[float, float]:
    """beta_fast and beta_slow of which rounding outwards gives the ramp that the exact ones give without rounding."""
    fast, slow = rope["beta_fast"], rope["beta_slow"]
    return (fast, slow) if rope.get("truncate", True) else (fast * (1 - NUDGE), slow * (1 + NUDGE))


def _undo(rope: dict[str, Any]) -> float:
    """The attn_factor that turns a runtime's own 0.1 ln s + 1 into the attention factor that is wanted."""
    own = 0.1 * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0
    return float(rope.get("attention_factor", own)) / own
