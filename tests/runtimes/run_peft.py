"""PEFT puts `adapter/` on the model that was trained: the merged model's log-probabilities.

python run_peft.py OUT [NAME...]      one JSON line a model that has an adapter: the largest difference
"""

import json
import sys
from pathlib import Path

import peft
import torch
from rows import Row, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText


def read(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """The log-probability of each token of a prompt after those before."""
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def measure(out: Path, name: str, reference: Row) -> Row:
    """One model: the adapter on its base, and how far the adapter moves the base."""
    base = out / reference["base"]
    vlm = AutoConfig.from_pretrained(base).model_type == "llava_onevision"
    kind = AutoModelForImageTextToText if vlm else AutoModelForCausalLM
    model = kind.from_pretrained(base, dtype=torch.float32).eval()
    before = read(model, reference["ids"])
    after = read(peft.PeftModel.from_pretrained(model, out / name / "adapter").eval(), reference["ids"])
    merged = torch.tensor(reference["logprobs"])
    return {"difference": float((after - merged).abs().max()), "moved": float((merged - before).abs().max())}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    models = json.loads((folder / "reference.json").read_text())
    adapted = [name for name, computed in models.items() if "base" in computed]
    write_rows(folder, sys.argv[2:] or adapted, f"PEFT {peft.__version__}", measure)
