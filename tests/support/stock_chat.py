"""A conversation with a model directory by stock transformers alone: what it feeds the model, and what it answers.

    python stock_chat.py REQUEST.json OUT.npz

A request is `{"model", "messages", "max_new_tokens"}`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision_cpu
from PIL import Image


def main() -> None:
    """One conversation, greedy, in float32."""
    torchvision_cpu.use()
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.video_utils import load_video

    request = json.loads(Path(sys.argv[1]).read_text())
    processor = AutoProcessor.from_pretrained(request["model"])
    model = AutoModelForImageTextToText.from_pretrained(request["model"], dtype=torch.float32).eval()
    for message in request["messages"]:
        for part in message["content"]:
            # By default transformers opens files with torchvision or torchcodec, whose own code does not load here.
            if part["type"] == "video":
                part["video"], _ = load_video(part.pop("path"), backend="pyav")
            if part["type"] == "image":
                part["image"] = Image.open(part.pop("path"))
    inputs = processor.apply_chat_template(
        request["messages"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=request.get("max_new_tokens", 5), do_sample=False)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    np.savez(sys.argv[2], answer=np.array(answer), **{name: tensor.numpy() for name, tensor in inputs.items()})


if __name__ == "__main__":
    main()
