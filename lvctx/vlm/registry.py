"""The model families, and the only place that uses a checkpoint's `model_type`."""

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
}
"""Model type -> module and class."""


def family_of(path: Path) -> str | None:
    """The model type of a directory if it is one of `FAMILIES`; None for a language model.

    Raises UsageError for vision-language models of unknown families.
    """
    config = load_config(path)
    if config.model_type in FAMILIES:
        return str(config.model_type)
    if getattr(config, "vision_config", None) is not None:
        raise UsageError(f"{config.model_type} models are not supported", where=path, fix=f"give {_supported()}")
    return None


def open_vlm(name: str | Path, *, device: str = "cpu", feature_cache: Path | None = None, weights: bool = True) -> VLM:
    """The family of a model, a directory or hub id; loads no weights.

    If the family caches vision features of video files, `device` is where a vision tower computes them, and
    `feature_cache` the folder that stores them. Without `weights` the small files of the checkpoint are sufficient.
    Raises InputError if there is no such model, UsageError for a language model or an unknown family.
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
