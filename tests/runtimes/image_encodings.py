"""How well a model answers about drawn images: in its own encoding by lvctx, and as `<image>` in stock transformers.

    python recipes/nano/draw_data.py OUT --projector 0 --full 60 --seed 7
    python tests/runtimes/image_encodings.py MODEL OUT

The first question about each image of OUT/full.json is asked. An answer is right if it is the colour.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from support import torchvision_cpu

NEW = 4
"""Greedy tokens of an answer."""


def stock_answer(model: Any, processor: Any, image: Image.Image, question: str) -> str:
    """By transformers alone."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[image], return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return str(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> None:
    """Print both counts."""
    path, data = Path(sys.argv[1]), Path(sys.argv[2])
    folder = torchvision_cpu.install()
    if folder is not None:
        torchvision_cpu.use(folder)  # before transformers is imported, which asks for it once
    from transformers import AutoProcessor

    from lvctx.inference.sampling_params import SamplingParams
    from lvctx.inference.transformers_engine import TransformersEngine
    from lvctx.video.sampling import VideoSampling
    from lvctx.vlm.registry import open_vlm

    processor = AutoProcessor.from_pretrained(path)
    engine = TransformersEngine(open_vlm(path), device="cpu", dtype=torch.float32)
    rows = json.loads((data / "full.json").read_text())
    right = {"lvctx": 0, "stock": 0}
    for number, row in enumerate(rows, 1):
        image = Image.open(data / "images" / row["image"]).convert("RGB")
        question, answer = (turn["value"] for turn in row["conversations"][:2])
        question = question.removeprefix("<image>\n")
        engine.show([image], VideoSampling())
        right["lvctx"] += (
            engine.reply([question], SamplingParams(max_new_tokens=NEW)).text.lower().startswith(answer.lower())
        )
        stock = stock_answer(engine.model, processor, image, question)
        right["stock"] += stock.strip().lower().startswith(answer.lower())
        print(json.dumps({"model": str(path), "images": number, **right}), flush=True)


if __name__ == "__main__":
    main()
