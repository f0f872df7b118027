"""What other runtimes need in order to compute the positions that config.json describes.

transformers reads config.json. Other runtimes differ for YaRN:

- vLLM multiplies the pretrained length of a Qwen2-VL or Qwen2.5-VL model by 4 before it places YaRN's ramp, so betas
  times 4 give the same ramp. For Qwen3-VL it does so up to 0.31 but not from 0.32 on, so no file can serve both.
  It reads `attention_factor` from 0.31 on; before, it reads `attn_factor`, which multiplies 0.1 ln s + 1.
- SGLang reads `attn_factor`.
- llama.cpp reads `attn_factor` from the metadata of the model file, which its converter does not write.
- llama.cpp always rounds the ends of the ramp outwards to whole channels, and so do older releases of the others. Betas
  a ten-thousandth further inwards round to exactly the intended channels.

For M-RoPE with `linear` (pi), `llama3` and `longrope` (ramps wavelength and ntk) vLLM and SGLang drop the sections.
`make test-runtimes` runs vLLM and llama.cpp on the files written here.
"""

import math
from typing import Any

NUDGE = 1e-4
"""Relative; a two-thousandth of a channel at base 1e6, far above float32's rounding and far below a channel."""

GGUF = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_vl": "qwen2vl",
    "qwen2_5_vl": "qwen2vl",
    "qwen3_vl": "qwen3vl",
}
"""Model types, and llama.cpp's names of their architectures."""


def vllm(rope: dict[str, Any], *, model_type: str, context: int) -> dict[str, Any] | None:
    """`--hf-overrides` for these rope_parameters: {} where config.json is enough, None if vLLM cannot compute them."""
    sections = "mrope_section" in rope
    if sections and rope["rope_type"] not in ("default", "yarn"):
        return None
    if rope["rope_type"] != "yarn":
        return {}
    if sections and model_type != "qwen3_vl":
        fast, slow = _rounded_betas(rope)
        changed = {**rope, "beta_fast": 4 * fast, "beta_slow": 4 * slow, "truncate": True, "attn_factor": _undo(rope)}
        return {"text_config": {"rope_parameters": changed, "max_position_embeddings": context}}
    if sections or "attention_factor" not in rope:
        return {}
    return {"rope_parameters": {**rope, "attn_factor": _undo(rope)}}


def sglang(rope: dict[str, Any]) -> dict[str, Any] | None:
    """The rope_parameters for SGLang's config.json: unchanged where possible, None if it cannot compute them."""
    if "mrope_section" in rope and rope["rope_type"] not in ("default", "yarn"):
        return None
    if rope["rope_type"] != "yarn" or "attention_factor" not in rope:
        return rope
    fast, slow = _rounded_betas(rope)
    return {**rope, "beta_fast": fast, "beta_slow": slow, "truncate": True, "attn_factor": _undo(rope)}


def llama_cpp(rope: dict[str, Any], *, model_type: str, context: int) -> list[str] | None:
    """Flags for llama.cpp's programs; None if it cannot compute these positions.

    The flags for a Qwen-VL model are for a GGUF of the model before it was extended, since the converter does not know
    scaled M-RoPE; those for a language model are for a GGUF of the extended model.
    """
    architecture = GGUF.get(model_type)
    if architecture is None:
        return None
    if "mrope_section" not in rope:
        changed = rope["rope_type"] == "yarn" and "attention_factor" in rope
        return ["--override-kv", _attn_factor(architecture, rope)] if changed else []
    # The server limits its context to the length in the file, unless YaRN's flags extend it.
    length = ["--override-kv", f"{architecture}.context_length=int:{context}"]
    if rope["rope_type"] == "default":
        return ["--rope-freq-base", f"{rope['rope_theta']:.9g}", *length]
    if rope["rope_type"] == "linear":
        return ["--rope-scaling", "linear", "--rope-scale", f"{rope['factor']:g}", *length]
    if rope["rope_type"] != "yarn":
        return None
    fast, slow = _rounded_betas(rope)
    flags = {
        "--rope-scaling": "yarn",
        "--rope-scale": f"{rope['factor']:g}",
        "--yarn-orig-ctx": str(rope["original_max_position_embeddings"]),
        "--yarn-ext-factor": "1",
        "--yarn-beta-fast": f"{fast:.9g}",
        "--yarn-beta-slow": f"{slow:.9g}",
        "--override-kv": _attn_factor(architecture, rope),
    }
    return [word for flag in flags.items() for word in flag]


def _attn_factor(architecture: str, rope: dict[str, Any]) -> str:
    return f"{architecture}.rope.scaling.attn_factor=float:{_undo(rope):.9g}"


def _rounded_betas(rope: dict[str, Any]) -> tuple[float, float]:
    """beta_fast and beta_slow that, with rounding outwards, give the ramp of the exact ones without rounding."""
    fast, slow = rope["beta_fast"], rope["beta_slow"]
    return (fast, slow) if rope.get("truncate", True) else (fast * (1 - NUDGE), slow * (1 + NUDGE))


def _undo(rope: dict[str, Any]) -> float:
    """The attn_factor that turns a runtime's built-in 0.1 ln s + 1 into the required attention factor."""
    default_factor = 0.1 * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0
    return float(rope.get("attention_factor", default_factor)) / default_factor
