"""LLaVA's own checkpoint format, in which LongVA was released: tensor names and config.json, to and from ours.

Its config.json is the language model's with additional keys (`mm_...`), and names the tower instead of describing
it. UniRes (LongVA section 3.2) is `mm_patch_merge_type` "unires": every grid is pooled 2x2, grids follow each other
without a newline between or after them; the "\\n" that follows is the prompt's. In our format that "\\n" is
`image_newline`, so a parameter of that name in a UniRes checkpoint, which is not used there, is not converted.

LLaVA-NeXT-Video, LongVA's baseline, has `mm_patch_merge_type` "spatial_unpad": images are AnyRes, each row of features
ends with a learned `image_newline`, and a video is its frames, pooled 2x2, with one such newline after the last.
"""

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from lvctx.errors import InputError, UsageError, library_errors
from lvctx.models.vlm_assembly import PIXEL_OPTIONS
from lvctx.models.weight_check import DERIVED

LANGUAGE = {"llava_qwen": "qwen2", "llava_llama": "llama", "llava_mistral": "mistral"}
"""LLaVA's model types, and the language model's."""
LANGUAGE_CLASSES = {
    "qwen2": "LlavaQwenForCausalLM",
    "llama": "LlavaLlamaForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
}
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
NEWLINE = "model.image_newline"
RENAMED = (
    (TOWER_PREFIX, "vision_tower.vision_model."),
    (TOWER_PREFIX, "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    (NEWLINE, "image_newline"),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
"""Prefixes of LLaVA's names and of ours; the first that matches is used. See `lvctx.models.saving.tower_names`."""

SPATIAL = "spatial_unpad"
"""`mm_patch_merge_type` of LLaVA-NeXT-Video."""
SPATIAL_KEYS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("mm_spatial_pool_stride", (2,)),
    ("mm_spatial_pool_mode", ("average", None)),
    ("mm_newline_position", ("one_token", None)),
)
"""Keys that decide how such a checkpoint encodes a video, and the values that stock LlavaOnevision has."""
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}"
)
"""LLaVA's prompts for Mistral, for a tokenizer without a chat template."""

CONFIG_5 = "config.5.0.0.json"
"""Listed in config.json under `configuration_files`, transformers' key for files that later versions read."""

CLIP = "openai/clip-vit-"
CLIP_336 = f"{CLIP}large-patch14-336"
CLIP_PIXELS = {
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}
"""Pixel statistics in the preprocessor_config.json of OpenAI's towers: Radford et al. 2021, the released code."""
SHAPE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""Configuration of the vision tower of LLaVA-1.5 and LongVA."""


def rename(names: Mapping[str, Any] | set[str], *, to_llava: bool) -> dict[str, str]:
    """Old name -> new name, without unknown names."""
    renamed = {}
    for name in names:
        for llava, stock in RENAMED:
            old, new = (stock, llava) if to_llava else (llava, stock)
            if name.startswith(old):
                renamed[name] = new + name[len(old) :]
                break
    return renamed


def expected(text: Any, vision: Any, *, tower: bool = True) -> dict[str, tuple[int, ...]]:
    """LLaVA's names and shapes of a language model with its projector and tower."""
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    with library_errors("no model can be built from its configuration"), torch.device("meta"):
        lm, vision_model = AutoModelForCausalLM.from_config(text), CLIPVisionModel(vision)
    shapes = {name: tuple(value.shape) for name, value in lm.state_dict().items()}
    if text.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    wide, width = text.hidden_size, vision.hidden_size
    for layer, into in ((0, width), (2, wide)):
        shapes[f"model.mm_projector.{layer}.weight"] = (wide, into)
        shapes[f"model.mm_projector.{layer}.bias"] = (wide,)
    if tower:
        shapes |= {
            TOWER_PREFIX + name.removeprefix("vision_model."): tuple(value.shape)
            for name, value in vision_model.state_dict().items()
            if not DERIVED.search(name)
        }
    return shapes


def text_config(flat: Mapping[str, Any], *, context: int | None, where: object) -> Any:
    """The language model's configuration from a LLaVA config.json. Raises InputError for other models."""
    from transformers import CONFIG_MAPPING

    kind = LANGUAGE.get(flat.get("model_type", ""))
    if kind is None:
        raise InputError(
            f"a {flat.get('model_type')} model is no LLaVA checkpoint", where=where, fix=f"known: {', '.join(LANGUAGE)}"
        )
    for key, read in (
        ("mm_patch_merge_type", ("unires", SPATIAL)),
        ("mm_projector_type", ("mlp2x_gelu",)),
        ("mm_vision_select_feature", ("patch",)),
        # LongVA's DPO script passes spatial_pool, but its UniRes encoder reads neither key: it always pools 2x2.
        ("mm_resampler_type", (None, "spatial_pool")),
        *(SPATIAL_KEYS if flat.get("mm_patch_merge_type") == SPATIAL else ()),
    ):
        if flat.get(key) not in read:
            raise InputError(f'{key} is "{flat.get(key)}"', where=where, fix=f'only "{read[0]}" is supported')
    default = CONFIG_MAPPING[kind]()
    known = {*default.to_dict(), "rope_theta", "rope_scaling", "torch_dtype"}
    known -= {"architectures", "model_type", "_name_or_path", "transformers_version"}
    values = {key: copy.deepcopy(value) for key, value in flat.items() if key in known}
    if "rope_parameters" in values:
        values = {key: value for key, value in values.items() if key not in ("rope_theta", "rope_scaling")}
    with library_errors("unreadable config.json", where=where):
        config = type(default).from_dict(values)
    config.architectures = [LANGUAGE_CLASSES[kind].removeprefix("Llava").replace("Qwen", "Qwen2")]
    if context:
        config.max_position_embeddings = context
    return config


def clip_config(shapes: Mapping[str, tuple[int, ...]], name: str, *, where: object) -> Any:
    """The configuration of an OpenAI tower, whose heads are all 64 wide, from the shapes of its tensors.

    Raises InputError if those tensors are missing or have other shapes.
    """
    from transformers import CLIPVisionConfig

    decisive = {"embeddings.patch_embedding.weight": 4, "embeddings.position_embedding.weight": 2}
    decisive["encoder.layers.0.mlp.fc1.weight"] = 2
    for key, axes in decisive.items():
        if TOWER_PREFIX + key not in shapes:
            raise InputError(f"lacks {TOWER_PREFIX}{key}", where=where, fix="download or save it again")
        if len(shapes[TOWER_PREFIX + key]) != axes or not all(shapes[TOWER_PREFIX + key]):
            raise InputError(f"{TOWER_PREFIX}{key} has shape {list(shapes[TOWER_PREFIX + key])}", where=where)
    width, _, patch, _ = shapes[f"{TOWER_PREFIX}embeddings.patch_embedding.weight"]
    positions = shapes[f"{TOWER_PREFIX}embeddings.position_embedding.weight"][0]
    if width % 64 or math.isqrt(positions - 1) < 1:
        raise InputError(f"a tower of {width} channels and {positions} positions is not one of OpenAI's", where=where)
    layers = {m[1] for key in shapes if (m := re.match(re.escape(TOWER_PREFIX) + r"encoder\.layers\.(\d+)\.", key))}
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes[f"{TOWER_PREFIX}encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=len(layers),
        num_attention_heads=width // 64,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        projection_dim=768 if "large" in name else 512,
    )
    config.architectures = ["CLIPVisionModel"]
    return config


def llava_config(config: Mapping[str, Any], tokenizer_length: int) -> dict[str, Any]:
    """LLaVA's config.json from that of our VLM. Raises UsageError for a model that the format does not support."""
    text, vision = _value(config, "text_config", dict), _value(config, "vision_config", dict)
    kind = _value(text, "model_type", str)
    if _value(vision, "model_type", str) != "clip_vision_model" or kind not in LANGUAGE_CLASSES:
        raise UsageError(
            f"LLaVA's format is for CLIP on {', '.join(LANGUAGE_CLASSES)}, not {vision['model_type']} on {kind}",
            fix="--to hf",
        )
    if config.get("image_grid", "unires") != "unires":
        raise UsageError(f"LongVA encodes images with UniRes, not {config['image_grid']}", fix="--to hf")
    if config.get("image_grid_rule", "code") != "code":
        raise UsageError("LongVA's code uses its own UniRes rule, not the paper's", fix="--to hf")
    rope = _value(text, "rope_parameters", dict) if "rope_parameters" in text else {}
    left = ("_name_or_path", "model_type", "architectures", "rope_parameters")
    flat = {key: value for key, value in text.items() if key not in left}
    if rope:
        # transformers 4, for which LLaVA's code was written, reads this key.
        flat["rope_theta"] = _value(rope, "rope_theta", int, float)
        if rope.get("rope_type", "default") != "default":
            flat["rope_scaling"] = rope
            flat["configuration_files"] = [CONFIG_5]
    side, most = _value(vision, "image_size", int), config.get("image_max_grids", 49)
    tiles = config.get("image_grids") or [
        [w, h] for w in range(1, most + 1) for h in range(1, most // w + 1) if w * h > 1
    ]
    grids = [[w * side, h * side] for w, h in tiles]
    return flat | {
        "architectures": [LANGUAGE_CLASSES[kind]],
        "model_type": next(name for name, lm in LANGUAGE.items() if lm == kind),
        "torch_dtype": config.get("dtype"),
        "mm_vision_tower": CLIP_336 if is_clip_336(vision) else "tower",
        "mm_hidden_size": _value(vision, "hidden_size", int),
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_vision_select_layer": _value(config, "vision_feature_layer", int),
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "unires",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": grids,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "use_mm_proj": True,
        "tokenizer_model_max_length": tokenizer_length,
        "tokenizer_padding_side": "right",
    }


def _value(config: Mapping[str, Any], key: str, *types: type) -> Any:
    """The value of a key in config.json. Raises InputError if it is missing or of another type."""
    if type(config.get(key)) not in types:
        raise InputError(f"config.json has {key} {str(config.get(key))[:40]}", fix="save the model again")
    return config[key]


def config_for_5(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration for `CONFIG_5`, which transformers 5 reads in place of config.json.

    transformers 5 cannot read YaRN's `rope_scaling` of a model type that it does not know, such as LLaVA's.
    """
    changed = {key: value for key, value in flat.items() if key not in ("rope_theta", "rope_scaling")}
    return {**changed, "rope_parameters": flat["rope_scaling"]}


def is_clip_336(vision: Mapping[str, Any]) -> bool:
    """Whether a tower has the shape of CLIP ViT-L/14-336."""
    return all(vision.get(key) == value for key, value in SHAPE_336.items())


def pixels_of(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a preprocessor_config.json that is kept."""
    return {key: preprocessor[key] for key in PIXEL_OPTIONS if key in preprocessor}
