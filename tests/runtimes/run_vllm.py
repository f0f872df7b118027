"""What vLLM computes of the models of models.py; run by the Python of an environment with vLLM.

python run_vllm.py OUT [NAME...]      one JSON line a model: the largest difference of a log-probability, and answers
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a process a model would import everything again
    "TORCH_COMPILE_DISABLE": "1",  # the sampler's functions would be compiled by a C++ compiler
}

import numpy as np
from PIL import Image
from rows import Row, refusal, write_rows
from vllm import LLM, SamplingParams
from vllm import __version__ as version
from vllm.distributed import cleanup_dist_env_and_memory


def show(llm: LLM, out: Path, kind: str, shown: Row) -> bool:
    """Whether the answer about the image or the video is the reference's."""
    data = Image.open(out / "image.png") if kind == "image" else np.load(out / "video.npy")
    if kind == "video":
        frames = len(data)
        sampled = {
            "fps": 2.0,
            "total_num_frames": frames,
            "frames_indices": list(range(frames)),
            "duration": frames / 2,
        }
        data = (data, {**sampled, "video_backend": "opencv", "do_sample_frames": False})
    sampling = SamplingParams(temperature=0, max_tokens=len(shown["greedy"]), ignore_eos=True)
    (done,) = llm.generate({"prompt": shown["prompt"], "multi_modal_data": {kind: data}}, sampling)
    return list(done.outputs[0].token_ids) == shown["greedy"]


def measure(out: Path, name: str, reference: Row) -> Row:
    """One model. Those that vLLM cannot compute are not loaded: it may crash on their positions."""
    cleanup_dist_env_and_memory()
    path = out / name
    reason = refusal(path, "vLLM")
    if reason is not None:
        return {"refusal": reason}
    overrides = path / "vllm.json"
    # From 0.31 on the override of a language model's attention factor is not needed; that of a Qwen2-VL's ramp is.
    given = json.loads(overrides.read_text()) if overrides.is_file() and "qwen" in name else None
    media = [kind for kind in reference["shown"] if kind != "text"]
    llm = LLM(
        model=str(path),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        hf_overrides=given,
        limit_mm_per_prompt=dict.fromkeys(media, 1) or None,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=len(reference["greedy"]), prompt_logprobs=0, logprobs=0, ignore_eos=True
    )
    (done,) = llm.generate({"prompt_token_ids": reference["ids"]}, sampling)
    answer = done.outputs[0]
    computed = [
        probs[token].logprob for probs, token in zip(done.prompt_logprobs[1:], reference["ids"][1:], strict=True)
    ]
    computed += [probs[token].logprob for probs, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    wanted = reference["logprobs"] + reference["greedy_logprobs"]
    return {
        "difference": max(abs(a - b) for a, b in zip(computed, wanted, strict=True)),
        "tokens": list(answer.token_ids) == reference["greedy"],
        **{kind: show(llm, out, kind, reference["shown"][kind]) for kind in media},
    }


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]), sys.argv[2:], f"vLLM {version}", measure)
