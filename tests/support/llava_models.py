"""A tiny checkpoint in LLaVA's own format, with the names and the config.json that LongVA-7B was released with."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def parts(tokenizer: Any, *, rows: int | None = None, tied: bool = False) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Random bfloat16 language model (Qwen2), tower (CLIP, 48 px, patch 12, one head of 64) and projector."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=rows or len(tokenizer) + 128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 1e9, "rope_type": "default"},
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=1, image_size=48, patch_size=12
    )
    sizes = {"0.weight": (32, 64), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    projector = {name: torch.randn(size).bfloat16() / 4 for name, size in sizes.items()}
    lm, tower = Qwen2ForCausalLM(config).bfloat16().eval(), CLIPVisionModel(vision).bfloat16().eval()
    return lm, tower, projector


def tensors_of(lm: Any, tower: Any, projector: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under LLaVA's names."""
    inside = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    found = dict(lm.state_dict())
    found |= {f"model.mm_projector.{name}": value for name, value in projector.items()}
    found |= {f"model.vision_tower.vision_tower.vision_model.{name}": value for name, value in inside.items()}
    found["model.image_newline"] = torch.randn(lm.config.hidden_size).bfloat16()
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def write(
    out: Path, tensors: dict[str, torch.Tensor], lm: Any, tokenizer: Any, *, shards: int = 3, **more: Any
) -> Path:
    """The directory: `shards` shards, their index, tokenizer, and a flat config.json; `more` goes into the last."""
    out.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        shard = {name: tensors[name] for name in names[i::shards]}
        save_file(shard, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    text = lm.config
    config = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "torch_dtype": "bfloat16",
        **{
            key: getattr(text, key)
            for key in (
                *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
                *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "bos_token_id"),
                *("eos_token_id", "tie_word_embeddings"),
            )
        },
        "rope_theta": 1e9,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[336, 672], [672, 336]],
        "mm_hidden_size": 64,
        "mm_patch_merge_type": "unires",
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "transformers_version": "4.39.0.dev0",
        **more,
    }
    (out / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(out)
    return out
