"""What vLLM computes of the models of models.py; run by the Python of an environment with vLLM.

python run_vllm.py OUT NAME...      one JSON line a model: the largest difference of a log-probability, and answers
"""

import json
import math
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams
from vllm import __version__ as version


def measure(out: Path, name: str, reference: dict) -> dict:
    """One model."""
    path = out / name
    overrides = path / "vllm.json"
    # From 0.31 on the override of a language model's attention factor is not needed; that of a Qwen2-VL's ramp is.
    given = json.loads(overrides.read_text()) if overrides.is_file() and "qwen" in name else None
    llm = LLM(
        model=str(path),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        hf_overrides=given,
        limit_mm_per_prompt={"image": 1, "video": 1} if "lm-" not in name or "vlm" in name else None,
    )
    new = len(reference["greedy"])
    sampling = SamplingParams(temperature=0, max_tokens=new, prompt_logprobs=0, ignore_eos=True)
    (done,) = llm.generate({"prompt_token_ids": reference["ids"]}, sampling)
    got = [probs[token].logprob for probs, token in zip(done.prompt_logprobs[1:], reference["ids"][1:], strict=True)]
    off = max(abs(a - b) for a, b in zip(got, reference["logprobs"], strict=True))
    row = {"difference": off, "tokens": list(done.outputs[0].token_ids) == reference["greedy"]}
    for kind, shown in reference.get("shown", {}).items():
        data = Image.open(out / "image.png") if kind == "image" else np.load(out / "video.npy")
        sampling = SamplingParams(temperature=0, max_tokens=len(shown["greedy"]))
        (done,) = llm.generate({"prompt": shown["prompt"], "multi_modal_data": {kind: data}}, sampling)
        row[kind] = list(done.outputs[0].token_ids) == shown["greedy"]
    return row


def main() -> None:
    """Every named model."""
    out = Path(sys.argv[1])
    reference = json.loads((out / "reference.json").read_text())
    for name in sys.argv[2:]:
        try:
            row = measure(out, name, reference[name])
        except Exception as e:
            row = {"error": f"{type(e).__name__}: {' '.join(str(e).split())[-300:]}"}
        if not math.isfinite(row.get("difference", 0)):
            row["difference"] = None
        print(json.dumps({"runtime": f"vLLM {version}", "model": name, **row}), flush=True)


if __name__ == "__main__":
    main()
