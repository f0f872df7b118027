"""Tiny random models of every kind that lvctx writes, in float32.

    python tests/runtimes/models.py OUT

OUT gets a directory a model, and parts/ with what they are made of.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from support import aligning, mrope_models, torchvision_cpu

PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
"""Pixels of an image or video of the Qwen-VL models, least and most: a few tokens each."""
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] in ('image', 'image_url', 'video') %}"
    "<|vision_start|><|{{ part['type'][:5] }}_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat template of the Qwen-VL models, whose turns have parts."""
CONTEXT = 256
"""Positions of the language model before it is extended."""
EXTENDED = {
    "lm-plain": None,
    "lm-theta": "--rope-theta 1e6 --context 1024",
    "lm-ntk": "--rope ntk --factor 4",
    "lm-pi": "--rope pi --factor 4",
    "lm-yarn": "--rope yarn --factor 4",
    "lm-yarn-attention": "--rope yarn --factor 4 --attention-factor 1.4",
}
"""Language models: name to options of extend-lm."""
MROPE = {
    "qwen2_vl": (
        "none",
        "mrope++ --ramp index",
        "mrope++ --ramp wavelength",
        "mrope++ --ramp ntk",
        "pi",
        "ntk",
        "yarn",
    ),
    "qwen2_5_vl": ("mrope++ --ramp index", "yarn"),
    "qwen3_vl": ("none", "yarn"),
}
"""Qwen-VL: model type to options of mrope-extend, after `--method`."""
ADAPTED = {"lm-lora": "lm-yarn", "vlm-lora": "vlm-clip"}
"""Models trained with LoRA, merged with their `adapter/` beside: the model that the adapter goes on."""


def run(*words: object) -> None:
    """A command of ours, in float32 on the CPU."""
    subprocess.run([sys.executable, "-m", "lvctx", *map(str, words), "-q"], check=True, stdout=subprocess.DEVNULL)


def make_lm(out: Path) -> None:
    """A Llama whose words depend on where they stand, with a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = mrope_models.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_tower(out: Path, kind: str) -> None:
    """A CLIP or SigLIP tower of 48 pixels."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    config, model = {
        "clip": (CLIPVisionConfig, CLIPVisionModel),
        "siglip": (SiglipVisionConfig, SiglipVisionModel),
    }[kind]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model(config(**sizes, image_size=48, patch_size=12)).save_pretrained(out)
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "rescale_factor": 1 / 255}
    pixels |= {"do_rescale": True, "do_normalize": True}
    (out / "preprocessor_config.json").write_text(json.dumps(pixels))


def make_vlm(lm: Path, tower: Path, out: Path) -> None:
    """Aligned for no step: a random projector."""
    from lvctx.models.loading import load_model, load_tokenizer
    from lvctx.models.side_files import write_side_files
    from lvctx.models.vision_encoder import load_vision_model
    from lvctx.models.vlm_assembly import assemble, save_vlm

    tokenizer = load_tokenizer(lm)
    vlm = assemble(load_model(lm), load_vision_model(tower, dtype=torch.float32), tokenizer, where=lm, seed=0)
    save_vlm(vlm, tokenizer, tower, out)
    write_side_files(out)


def make_lora(out: Path) -> None:
    """Two steps of extend-lm and of align with LoRA, fast enough that every adapter counts."""
    steps = ["--steps", 2, "--lr", 0.01, "--lora", 4]
    data = out / "parts" / "data"
    data.mkdir(exist_ok=True)
    (data / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    options = ["--tokenizer", out / "lm-yarn", "--seq-len", 64, "--keep-short", 1]
    run("pack-text", data / "text.txt", *options, "-o", data / "packed")
    options = [*EXTENDED["lm-yarn"].split(), "--data", data / "packed", "--batch-tokens", 64]
    run("extend-lm", "--model", out / "parts" / "lm", *options, *steps, "-o", out / "lm-lora")
    aligning.draw(data)
    rows = [aligning.talk("<image>\nWhat is it?", "red", image=f"{i}.png") for i in range(4)]
    parts = ["--lm", out / "lm-yarn", "--tower", out / "parts" / "clip", "--tower-lr", 0]
    options = [*parts, "--data", aligning.write(data / "data.json", rows), "--images", data, "--stage", "full"]
    run("align", *options, "--batch", 2, *steps, "-o", out / "vlm-lora")


def save_processor(kind: str, out: Path) -> None:
    """Tokenizer, template and processors of a Qwen-VL model as its own checkpoints have them."""
    from transformers import models
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]
    video = models.qwen3_vl.Qwen3VLVideoProcessor if kind == "qwen3_vl" else models.qwen2_vl.Qwen2VLVideoProcessor
    patch = {"patch_size": mrope_models.config(kind).vision_config.patch_size}
    tokenizer = mrope_models.tokenizer()
    tokenizer.chat_template = PARTS
    images = Qwen2VLImageProcessorPil(**patch, size=PIXELS)
    processor: Any = getattr(getattr(models, kind), f"{name}Processor")
    processor(images, tokenizer, video(**patch, size=PIXELS), chat_template=PARTS).save_pretrained(out)


def make_all(out: Path) -> None:
    """Write every model."""
    make_lm(out / "parts" / "lm")
    for name, options in EXTENDED.items():
        if options is None:
            make_lm(out / name)
        else:
            run("extend-lm", "--model", out / "parts" / "lm", *options.split(), "--steps", 0, "-o", out / name)
    for kind in ("clip", "siglip"):
        make_tower(out / "parts" / kind, kind)
        make_vlm(out / "lm-yarn", out / "parts" / kind, out / f"vlm-{kind}")
    make_lora(out)
    for kind, methods in MROPE.items():
        mrope_models.opinionated(kind).save_pretrained(out / "parts" / kind)
        save_processor(kind, out / "parts" / kind)
        for method in methods:
            name = f"{kind}-{method}".replace("++ --ramp ", "-")
            length = ["--original-length", 32_768] if kind == "qwen2_5_vl" else []
            options = ["--scale", 4, *length, "--method", *method.split()]
            run("mrope-extend", "--model", out / "parts" / kind, *options, "-o", out / name)


if __name__ == "__main__":
    folder = torchvision_cpu.install()
    if folder is not None:
        torchvision_cpu.use(folder)
    make_all(Path(sys.argv[1]))
