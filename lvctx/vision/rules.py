"""Which rule counts a model's visual tokens: read from its configuration, its tokenizer and its preprocessor's file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvctx.artifacts.store import read_json
from lvctx.errors import InputError, UsageError
from lvctx.model.load import VLM_TYPE, load_config
from lvctx.model.qwen_vl import TIMED, TYPES
from lvctx.model.vlm import image_grid, image_rule
from lvctx.vision.grids import image_max_grids
from lvctx.vision.hybrid import Hybrid
from lvctx.vision.tokens import LlavaRule, QwenRule, VisualRule, pooling


def find_rule(path: Path, tokenizer: Any, *, hybrid: Mapping[str, Any] | None) -> VisualRule | None:
    """The rule of a model directory (no weights needed), or None for a language model.

    `hybrid` are `Hybrid`'s values; None is uniform resolution: 240 tokens a grid for Qwen2-VL, the tower's own for
    LlavaOnevision. Raises InputError for a vision-language model of another family.
    """
    config = load_config(path)  # what config.json leaves out has its family's default
    family, vision = config.model_type, getattr(config, "vision_config", None)
    if vision is None:
        return None
    if family in TYPES:
        return qwen_rule(path, tokenizer, Hybrid(**(hybrid or {})))
    if family == VLM_TYPE:
        if image_grid(config) != "unires":
            raise InputError(f"aligned with --grid {image_grid(config)}: only UniRes rows can be packed", where=path)
        side = vision.image_size // vision.patch_size
        usual = ((side + 1) // 2) ** 2
        resolution = Hybrid(**(hybrid or {"tokens": usual}))
        if resolution.tokens != usual:
            raise UsageError(f"this model's frames have {usual} tokens, not {resolution.tokens}", fix="change m")
        pooling(side, resolution.ratio)
        placeholder = _id(tokenizer, "<video>", path)
        return LlavaRule(
            placeholder=placeholder,
            tile=vision.image_size,
            side=side,
            grid_rule=image_rule(config),
            max_grids=image_max_grids(config),
            hybrid=resolution,
        )
    raise InputError(f"no rule for {family}", where=path, fix="--model takes Qwen2-VL, Qwen2.5-VL or LlavaOnevision")


def qwen_rule(path: Path, tokenizer: Any, hybrid: Hybrid) -> QwenRule:
    """The rule of a Qwen-VL directory. For Qwen3-VL sizes are right, but its `layout` lacks the times in text."""
    config = load_config(path)
    vision = config.vision_config
    if config.model_type in TIMED and hybrid.mode != "pair":
        raise UsageError(f"--hybrid-mode {hybrid.mode}: {config.model_type} reads pairs of frames", fix="drop it")
    file = path / "preprocessor_config.json"
    pixels = read_json(file) if file.is_file() else {}
    stated = pixels.get("size")
    size: dict[str, Any] = stated if isinstance(stated, dict) else {}
    least = pixels.get("min_pixels") or size.get("shortest_edge", QwenRule.min_pixels)
    most = pixels.get("max_pixels") or size.get("longest_edge", QwenRule.max_pixels)
    if not (isinstance(least, int) and isinstance(most, int) and 0 < least <= most):
        raise InputError(f"images of {least!r} to {most!r} pixels", where=file, fix="correct min_pixels and max_pixels")
    return QwenRule(
        start=_id(tokenizer, "<|vision_start|>", path),
        end=_id(tokenizer, "<|vision_end|>", path),
        pads={"image": _id(tokenizer, "<|image_pad|>", path), "video": _id(tokenizer, "<|video_pad|>", path)},
        hybrid=hybrid,
        min_pixels=least,
        max_pixels=most,
        factor=vision.patch_size * vision.spatial_merge_size,
        merge=vision.temporal_patch_size,
    )


def _id(tokenizer: Any, token: str, path: Path) -> int:
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise InputError(f"the tokenizer has no {token}", where=path)
    return int(found)
