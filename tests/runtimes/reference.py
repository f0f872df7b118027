"""What the models of models.py compute here, for other runtimes to be compared with.

    python tests/runtimes/reference.py OUT

OUT has the models; it gets an image, a video and reference.json: for every model the token ids of a long prompt, the
log-probability of each after those before, a greedy continuation, and greedy answers to a chat: a text for a language
model, an image and a video for a VLM. Everything in float32.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from models import ADAPTED
from PIL import Image
from support import torchvision_cpu
from support.id_positions import Rules, positions_of_ids

from lvctx.models.loading import context_length, load_model, load_tokenizer

LONG = 900
"""Tokens of the prompt, far beyond the 256 positions of the unextended language model, whose own prompt is shorter."""
NEW = 8
"""Greedy tokens."""
FPS = 2.0
"""Frames a second of the video."""


def make_media(out: Path) -> dict[str, Any]:
    """An image and a video of noise, written to `out`."""
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 255, (60, 100, 3), dtype=np.uint8))
    video = rng.integers(0, 255, (6, 60, 100, 3), dtype=np.uint8)
    image.save(out / "image.png")
    np.save(out / "video.npy", video)
    sampled = {"fps": FPS, "total_num_frames": len(video), "frames_indices": list(range(len(video)))}
    read = {"videos": [video], "video_metadata": [sampled], "do_sample_frames": False}
    return {"image": {"images": [image]}, "video": read}


def grow(model: Any, ids: list[int], **inputs: Any) -> dict[str, Any]:
    """Greedy tokens after `ids` and their log-probabilities, each from a forward over all before it."""
    grown, likely = list(ids), []
    grids = {
        kind: inputs[f"{kind[:5]}_grid_thw"].tolist()
        for kind in ("images", "videos")
        if f"{kind[:5]}_grid_thw" in inputs
    }
    seconds = torch.as_tensor(inputs.pop("second_per_grid_ts", [])).tolist()
    for _ in range(NEW):
        given = dict(inputs)
        if grids:  # stock positions after a video are wrong: see rope/mrope_positions.py
            positions_3S, _ = positions_of_ids(grown, Rules.of(model.config), **grids, seconds_per_grid=seconds)
            given["position_ids"] = positions_3S[:, None]
        with torch.no_grad():
            best = model(input_ids=torch.tensor([grown]), **given).logits[0, -1].log_softmax(-1).max(-1)
        grown.append(int(best.indices))
        likely.append(float(best.values))
    return {"greedy": grown[len(ids) :], "greedy_logprobs": likely}


def read(model: Any) -> dict[str, Any]:
    """The log-probabilities of a prompt, and what comes after it."""
    length = min(LONG, context_length(model.config) - NEW)
    ids = np.random.default_rng(0).integers(0, 250, length).tolist()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    chosen = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return {"ids": ids, "logprobs": chosen.tolist(), **grow(model, ids)}


def tell(model: Any, path: Path) -> dict[str, Any]:
    """The answer of a language model to a text that is longer than it could read before it was extended."""
    content = "".join(np.random.default_rng(2).choice(list("abcdefgh "), LONG))
    tokenizer = load_tokenizer(path)
    chat = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return {"content": content, "prompt": prompt, **grow(model, tokenizer(prompt, add_special_tokens=False).input_ids)}


def show(model: Any, path: Path, media: dict[str, Any], kind: str) -> dict[str, Any]:
    """The answer of a VLM about an image or a video that its stock processor read."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(path)
    content = "What is it?"
    parts = [{"type": kind}, {"type": "text", "text": content}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = dict(processor(text=[prompt], return_tensors="pt", **media[kind]))
    ids = inputs.pop("input_ids")[0].tolist()
    for unused in ("attention_mask", "mm_token_type_ids"):
        inputs.pop(unused, None)
    return {"content": content, "prompt": prompt, **grow(model, ids, **inputs)}


def main() -> None:
    """Every model in OUT."""
    out = Path(sys.argv[1])
    folder = torchvision_cpu.install()
    if folder is not None:
        torchvision_cpu.use(folder)
    reference: dict[str, dict[str, Any]] = {}
    media = make_media(out)
    for path in sorted(config.parent for config in out.glob("*/config.json")):
        name, model = path.name, load_model(path, dtype=torch.float32)
        kinds = () if name.startswith("lm") else ("image", "video")
        shown = {kind: show(model, path, media, kind) for kind in kinds} or {"text": tell(model, path)}
        reference[name] = {**read(model), "shown": shown}
        if name in ADAPTED:
            reference[name]["base"] = ADAPTED[name]
        print(name, flush=True)
    (out / "reference.json").write_text(json.dumps(reference))


if __name__ == "__main__":
    main()
