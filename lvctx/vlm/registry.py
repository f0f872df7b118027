"""The families, and the one place that looks at a checkpoint's `model_type`."""

from importlib import import_module
from pathlib import Path

from lvctx.errors import UsageError
from lvctx.models.loading import load_config, resolve_model
from lvctx.vlm.base import VLM

FAMILIES = {
    "llava_onevision": "lvctx.vlm.llava_onevision:LlavaOnevision",
    "qwen2_vl": "lvctx.vlm.qwen_vl:QwenVL",
    "qwen2_5_vl": "lvctx.vlm.qwen_vl:QwenVL",
    "qwen3_vl": "lvctx.vlm.qwen_vl:Qwen3VL",
    "qwen3_vl_moe": "lvctx.vlm.qwen_vl:Qwen3VL",
}
"""Model type to module and class."""
GENERIC = (
    "llava",
    "llava_next",
    "llava_next_video",
    "vipllava",
    "video_llava",
    "internvl",
    "idefics3",
    "smolvlm",
    "aya_vision",
    "mistral3",
    "perception_lm",
    "cohere2_vision",
    "ovis2",
)
"""Model types that one class serves by the models' own processors and code, each with a test against `forward`."""
FAMILIES |= dict.fromkeys(GENERIC, "lvctx.vlm.generic:GenericVLM")


def family_of(path: Path) -> str | None:
    """The model type of a directory if it is one of `FAMILIES`; None for a language model.

    Raises UsageError for vision-language models of no family.
    """
    config = load_config(path)
    if config.model_type in FAMILIES:
        return str(config.model_type)
    if getattr(config, "vision_config", None) is not None:
        raise UsageError(f"{config.model_type} models are not supported", where=path, fix=f"give {_supported()}")
    return None


def open_vlm(name: str | Path, *, device: str = "cpu", feature_cache: Path | None = None, weights: bool = True) -> VLM:
    """The family of a model, a directory or hub id; loads no weights.

    Where the family keeps vision features of video files, `device` is where a vision tower computes them, and
    `feature_cache` the folder that keeps them for the next time. Without `weights` the small files of the
    checkpoint are enough. Raises InputError where there is no such model,
    UsageError for a language model or an unknown family.
    """
    path = resolve_model(name, weights=weights)
    family = family_of(path)
    if family is None:
        raise UsageError(f"{name} is a language model and has no vision tower", fix=f"give {_supported()}")
    module, _, attribute = FAMILIES[family].partition(":")
    opened: VLM = getattr(import_module(module), attribute)(path, device=device, feature_cache=feature_cache)
    return opened


def _supported() -> str:
    return f"a model of lvctx align, or one of {', '.join(FAMILIES)}"
