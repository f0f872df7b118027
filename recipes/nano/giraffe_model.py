"""Put a small Qwen2-VL together: SmolLM2's weights as its language model, vision tower and LoRAs trained here.

The directory has a stock `Qwen2VLForConditionalGeneration`: to text it answers exactly as SmolLM2 does
(Qwen2's blocks are Llama's with biases, which are zero here), and each head's 32 frequencies are divided 2:3:3 among
time, height and width as Qwen2-VL's 64 are.

    python recipes/nano/giraffe_model.py --lm .cache/nano/lm -o runs/giraffe/start --rope-theta 1e4 --context 1024 \
        --vision recipes/nano/giraffe/vision.safetensors --adapter recipes/nano/giraffe/short.safetensors
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lvctx.models.adapter import load_adapter
from lvctx.models.loading import load_model, load_tokenizer, resolve_model
from lvctx.models.lora import ATTENTION, add_lora

DELIMITERS = {"<|vision_start|>": " [", "<|vision_end|>": "]"}
"""Tokens around an image, and the words whose embeddings they begin with."""
PADS = ("<|image_pad|>", "<|video_pad|>")
PATCH = 12
SIDE = 2 * PATCH
"""Pixels of a visual token's side."""
VISION = {"depth": 5, "embed_dim": 192, "num_heads": 3, "mlp_ratio": 4, "patch_size": PATCH, "hidden_act": "quick_gelu"}
"""As `tower`, whose layers the vision tower starts from."""
PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_pixels": 4 * SIDE**2}
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type in ('image', 'video') %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2-VL's."""


def processor() -> Any:
    """Images of 48 pixels a side are 4 tokens, of 96 pixels 16."""
    return Qwen2VLImageProcessorPil(patch_size=PATCH, **PIXELS)


def build(lm: str, *, theta: float | None = None, context: int | None = None) -> tuple[Any, Any]:
    """The model in float32 with a random tower, and its tokenizer; `theta` and `context` instead of the LM's own."""
    llama, tokenizer = load_model(resolve_model(lm), dtype=torch.float32), load_tokenizer(lm)
    tokenizer.add_special_tokens({"additional_special_tokens": [*DELIMITERS, *PADS]})
    tokenizer.chat_template = TEMPLATE
    old = llama.config
    text = {
        key: getattr(old, key)
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "hidden_act",
            "rms_norm_eps",
            "bos_token_id",
            "eos_token_id",
        )
    }
    half = old.hidden_size // old.num_attention_heads // 2
    side = half * 3 // 8
    rope = {
        "rope_type": "default",
        "rope_theta": theta or old.rope_parameters["rope_theta"],
        "mrope_section": [half - 2 * side, side, side],
    }
    config = Qwen2VLConfig(
        text_config={
            **text,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": context or old.max_position_embeddings,
            "rope_parameters": rope,
        },
        vision_config={**VISION, "hidden_size": old.hidden_size},
        image_token_id=tokenizer.convert_tokens_to_ids(PADS[0]),
        video_token_id=tokenizer.convert_tokens_to_ids(PADS[1]),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    vlm = Qwen2VLForConditionalGeneration(config).eval()
    state = llama.model.state_dict()
    table_VE = state.pop("embed_tokens.weight")
    like = [tokenizer.encode(word, add_special_tokens=False)[0] for word in DELIMITERS.values()]
    state["embed_tokens.weight"] = torch.cat([table_VE, table_VE[like], table_VE.mean(0).expand(len(PADS), -1)])
    missing, unexpected = vlm.model.language_model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("bias") for name in missing)
    for name, parameter in vlm.model.language_model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    vlm.tie_weights()
    return vlm, tokenizer


def main() -> None:
    """Build, add what was trained, save in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--rope-theta", type=float, help="RoPE base; default: the language model's")
    parser.add_argument("--context", type=int, help="positions that config.json promises; default: as many")
    parser.add_argument("--vision", type=Path, help="tower and merger, of giraffe_vision.py")
    parser.add_argument("--adapter", type=Path, nargs="*", default=[], help="LoRAs, of lvctx mrope-extend, in order")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    vlm, tokenizer = build(args.lm, theta=args.rope_theta, context=args.context)
    if args.vision:
        vlm.model.visual.load_state_dict(load_file(args.vision))
    for file in args.adapter:
        rank = next(tensor for name, tensor in load_file(file).items() if "lora_A" in name).shape[0]
        wrapped = add_lora(vlm.model.language_model, rank=rank, targets=ATTENTION, seed=0)
        load_adapter(file, vlm, wrapped)
        vlm.model.language_model = wrapped.merge_and_unload()
    vlm.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    processor().save_pretrained(args.out)


if __name__ == "__main__":
    main()
