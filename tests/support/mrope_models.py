"""Tiny random Qwen-VL models with the real models' 64 frequencies per head, and a tokenizer that has their tokens."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISUAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    """Bytes, ChatML and Qwen-VL's visual tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": [*SPECIAL, *VISUAL]})
    fast.chat_template = TEMPLATE
    return fast


@functools.cache
def config(kind: str) -> Any:
    """A configuration of `qwen2_vl`, `qwen2_5_vl`, `qwen3_vl` or `qwen3_vl_moe`, one head of 128 channels a layer."""
    from transformers import AutoConfig

    is_third = kind.startswith("qwen3_vl")
    ids = tokenizer().convert_tokens_to_ids
    text = {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "max_position_embeddings": 262_144 if is_third else 32_768,
        "rms_norm_eps": 1e-6,  # the released checkpoints'
        "eos_token_id": ids("<|im_end|>"),
        "bos_token_id": ids("<|endoftext|>"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6 if is_third else 1e6,
            "mrope_section": [24, 20, 20] if is_third else [16, 24, 24],
            **({"mrope_interleaved": True} if is_third else {}),
        },
    }
    if kind == "qwen3_vl_moe":
        text |= {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 16 if is_third else 14}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 128, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 128}
    if kind == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": [1], "tokens_per_second": 2, "window_size": 56}
    if is_third:
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    return AutoConfig.for_model(
        kind,
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def build(kind: str) -> Any:
    """A random model, the same in every run."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config(kind)).eval()


def skeleton(kind: str) -> Any:
    """The model without its head, for what needs no weights."""
    return build(kind).model


def save(kind: str, out: Path) -> Path:
    """A checkpoint directory as transformers writes it, with tokenizer and image processor."""
    build(kind).save_pretrained(out)
    return save_processors(kind, out)


def save_processors(kind: str, out: Path) -> Path:
    """Tokenizer and image processor of such a checkpoint."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer().save_pretrained(out)
    Qwen2VLImageProcessorPil(patch_size=config(kind).vision_config.patch_size).save_pretrained(out)
    return out


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A sequence as a stock Qwen-VL model reads it: placeholder ids, positions (3, S), patches and grids."""

    ids: list[int]
    positions: Tensor
    pixels: dict[str, Tensor]


def forward(model: Any, prompt: Prompt) -> Any:
    """The stock model's output for a prompt, batch of one."""
    return model(
        input_ids=torch.tensor([prompt.ids]), position_ids=prompt.positions[:, None], use_cache=False, **prompt.pixels
    )


def greedy(model: Any, prompt: Prompt, count: int) -> list[int]:
    """The likeliest tokens, each from a forward over all before it; text counts on from the largest position."""
    said: list[int] = []
    while len(said) < count:
        more = torch.arange(len(said)).expand(3, -1) + prompt.positions.max() + 1
        # A random model may say a placeholder: that would have to be a word.
        whole = Prompt(ids=prompt.ids + said, positions=torch.cat([prompt.positions, more], 1), pixels=prompt.pixels)
        said.append(int(forward(model, whole).logits[0, -1].argmax()))
    return said


@functools.cache
def opinionated(kind: str) -> Any:
    """A random model whose words depend on what it saw, and are no placeholders."""
    model = build(kind)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
        model.lm_head.weight[tokenizer().convert_tokens_to_ids(VISUAL)] = 0
    return model
