"""Tiny random models of every kind that lvctx writes, and what they compute here: the reference for other runtimes.

    python tests/runtimes/models.py OUT

OUT gets a directory a model and reference.json: for every model its prompt's token ids, the log-probability of each of
them after those before, the tokens of a greedy continuation, and for a VLM the greedy answers about an image and a
video. Everything in float32.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mrope_models
import numpy as np
import torch
from PIL import Image
from support import torchvision_cpu

CONTEXT = 256
"""Positions of the language model before it is extended."""
LONG = 900
"""Tokens of the prompt: far beyond that."""
NEW = 8
"""Greedy tokens."""
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
    from lvctx.model.load import load_model, load_tokenizer
    from lvctx.model.vlm import assemble, save_vlm
    from lvctx.stages.side_files import write_side_files
    from lvctx.vision.tower import load_vision_model

    tokenizer = load_tokenizer(lm)
    vlm = assemble(load_model(lm), load_vision_model(tower, dtype=torch.float32), tokenizer, where=lm, seed=0)
    save_vlm(vlm, tokenizer, tower, out)
    write_side_files(out)


def make_all(out: Path) -> dict[str, Path]:
    """Write every model; name to directory."""
    made = {}
    make_lm(out / "parts" / "lm")
    for name, options in EXTENDED.items():
        made[name] = out / name
        if options is None:
            make_lm(out / name)
        else:
            run("extend-lm", "--model", out / "parts" / "lm", *options.split(), "--steps", 0, "-o", out / name)
    for kind in ("clip", "siglip"):
        make_tower(out / "parts" / kind, kind)
        made[f"vlm-{kind}"] = out / f"vlm-{kind}"
        make_vlm(out / "lm-yarn", out / "parts" / kind, out / f"vlm-{kind}")
    for kind, methods in MROPE.items():
        model = mrope_models.opinionated(kind)
        model.save_pretrained(out / "parts" / kind)
        mrope_models.save_processors(kind, out / "parts" / kind)
        for method in methods:
            name = f"{kind}-{method}".replace("++ --ramp ", "-")
            made[name] = out / name
            length = ["--original-length", 32_768] if kind == "qwen2_5_vl" else []
            options = ["--scale", 4, *length, "--method", *method.split()]
            run("mrope-extend", "--model", out / "parts" / kind, *options, "-o", out / name)
    return made


def compute(path: Path) -> dict[str, Any]:
    """What a model computes here for a prompt of text."""
    from lvctx.model.load import load_model

    model = load_model(path, dtype=torch.float32)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 250, LONG).tolist()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        grown, likely = list(ids), []
        for _ in range(NEW):
            best = model(input_ids=torch.tensor([grown])).logits[0, -1].log_softmax(-1).max(-1)
            grown.append(int(best.indices))
            likely.append(float(best.values))
    chosen = logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return {"ids": ids, "logprobs": chosen.tolist(), "greedy": grown[LONG:], "greedy_logprobs": likely}


def show(path: Path, out: Path) -> dict[str, Any]:
    """Stock transformers' greedy answers of a LlavaOnevision model about an image and a video; media go to `out`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    rng = np.random.default_rng(1)
    image = rng.integers(0, 255, (60, 100, 3), dtype=np.uint8)
    video = rng.integers(0, 255, (6, 60, 100, 3), dtype=np.uint8)
    Image.fromarray(image).save(out / "image.png")
    np.save(out / "video.npy", video)
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    answers: dict[str, Any] = {}
    for kind, given in (("image", {"images": [Image.fromarray(image)]}), ("video", {"videos": [video]})):
        content = [{"type": kind}, {"type": "text", "text": "What is it?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], return_tensors="pt", **given)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers[kind] = {"prompt": text, "greedy": tokens.tolist()}
    return answers


def main() -> None:
    """Models and reference."""
    out = Path(sys.argv[1])
    folder = torchvision_cpu.install()
    if folder is not None:
        torchvision_cpu.use(folder)
    reference = {}
    for name, path in make_all(out).items():
        reference[name] = compute(path)
        if name.startswith("vlm"):
            reference[name]["shown"] = show(path, out)
        print(name, flush=True)
    (out / "reference.json").write_text(json.dumps(reference))


if __name__ == "__main__":
    main()
