"""The model families, and the only place that uses a checkpoint's `model_type`."""

from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lvctx.artifacts.model_config import read_model_config
from lvctx.errors import LvctxError, UsageError
from lvctx.models.loading import load_config, resolve_model, stateful_layers
from lvctx.vlm.base import VLM

FAMILIES = {
    "llava_onevision": "lvctx.vlm.llava_onevision:LlavaOnevision",
    "qwen2_vl": "lvctx.vlm.qwen_vl:QwenVL",
    "qwen2_5_vl": "lvctx.vlm.qwen_vl:QwenVL",
    "qwen3_vl": "lvctx.vlm.qwen_vl:Qwen3VL",
    "qwen3_vl_moe": "lvctx.vlm.qwen_vl:Qwen3VL",
}
"""Model type -> module and class."""
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
"""Model types that one class serves by their own processors and code, each with a test against stock `forward`."""
FAMILIES |= dict.fromkeys(GENERIC, "lvctx.vlm.generic:GenericVLM")
FORWARD = "lvctx.vlm.generic:ForwardVLM"
"""Every other model type that transformers loads as a model of images and text."""
EVALUATE = ("niah video", "vqa", "videomme", "bench")
"""Commands that every vision-language model has."""
TRAINED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Model types with M-RoPE that `mrope-extend` and `extend-lm` extend and train."""


@dataclass(frozen=True, kw_only=True)
class ModelSupport:
    """What lvctx can do with a model type."""

    family: str
    """The class that serves it."""
    reuse: str
    """`prefixes`: what prompts share is computed once; `none`: each has a forward of its own."""
    commands: tuple[str, ...]
    """Commands that take such a model."""


def support_of(model_type: str) -> ModelSupport | None:
    """What lvctx can do with a model type; None for language models and unknown types."""
    target = FAMILIES.get(model_type) or (FORWARD if model_type in _image_text_types() else None)
    return None if target is None else _support(model_type, target)


def _support(model_type: str, target: str) -> ModelSupport:
    family, commands = target.partition(":")[2], list(EVALUATE)
    if target != FORWARD:
        commands += ["niah text", "perplexity"]
    if family == "LlavaOnevision":
        commands += ["align", "encode-video", "extend-lm", "export"]
    if model_type in TRAINED:
        commands += ["extend-lm", "mrope-extend", "export"]
    return ModelSupport(family=family, reuse="none" if target == FORWARD else "prefixes", commands=tuple(commands))


def evaluation_facts(path: Path) -> dict[str, Any]:
    """How a model directory's videos and images would be evaluated, for people; empty for a language model."""
    raw = read_model_config(path)
    if "vision_config" not in raw and raw["model_type"] not in FAMILIES:
        return {}
    facts: dict[str, Any] = {}
    try:
        model_type = family_of(path)
        if model_type is None:
            return {}
        facts |= asdict(_support(model_type, _class_of(model_type, load_config(path))))
        vlm: Any = open_vlm(path, weights=False)
        facts["frames_are"] = "a video" if getattr(vlm, "takes_video", True) else "images, one for each frame"
    except LvctxError as e:
        facts["error"] = str(e)
    return {"evaluation": facts}


def _class_of(model_type: str, config: Any) -> str:
    """Module and class for a configuration; a language model with a state other than keys and values shares nothing."""
    if model_type not in GENERIC:
        return FAMILIES.get(model_type, FORWARD)
    return FORWARD if stateful_layers(config) else FAMILIES[model_type]


def _image_text_types() -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def family_of(path: Path) -> str | None:
    """The model type of a directory if it is a vision-language model; None for a language model.

    Raises UsageError for a model type that transformers does not know, or knows as something else.
    """
    _check_type(path)
    config = load_config(path)
    if config.model_type in FAMILIES or config.model_type in _image_text_types():
        return str(config.model_type)
    if getattr(config, "vision_config", None) is not None:
        raise _unknown(path, f"transformers does not load {config.model_type} models as models of images and text")
    return None


def _check_type(path: Path) -> None:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    raw = read_model_config(path)
    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type not in CONFIG_MAPPING_NAMES:
        what = f"transformers {transformers.__version__} has no class for model type {model_type!r}"
        if "auto_map" in raw:
            what += ", and the code in the checkpoint is not run"
        raise _unknown(path, what)


def _unknown(path: Path, what: str) -> UsageError:
    fix = "take a checkpoint in transformers' format or a newer transformers, or serve it elsewhere and give --endpoint"
    return UsageError(what, where=path, fix=fix)


def open_vlm(name: str | Path, *, device: str = "cpu", feature_cache: Path | None = None, weights: bool = True) -> VLM:
    """The family of a model, a directory or hub id; loads no weights.

    If the family caches vision features of video files, `device` is where a vision tower computes them, and
    `feature_cache` the folder that stores them. Without `weights` the small files of the checkpoint are sufficient.
    Raises InputError if there is no such model, UsageError for a language model or an unknown class.
    """
    path = resolve_model(name, weights=weights)
    family = family_of(path)
    if family is None:
        raise UsageError(f"{name} is a language model and has no vision tower", fix="give a vision-language model")
    module, _, attribute = _class_of(family, load_config(path)).partition(":")
    opened: VLM = getattr(import_module(module), attribute)(path, device=device, feature_cache=feature_cache)
    return opened
