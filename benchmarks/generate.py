"""Decoding at batch 1: the engine of this process against stock `model.generate`, in turns in one run.

    python benchmarks/generate.py --model MODEL_DIR [--prompt 1024] [--new 64] [--repeat 5] [--dtype float32]
    python benchmarks/generate.py --model QWEN_VL_DIR --image 448

Both have the same weights, the same prompt (random words, or with --image a drawn image of so many pixels a side and a
question) and choose the same number of tokens greedily; `same` is the share of equal ones. A turn computes the prompt
and one token, and then the prompt and all tokens, so the difference is decoding alone. Medians of seconds and of
processor seconds; ratios are medians of each turn's, ours to stock's.
A token reads all weights but the input embedding and the cache so far: `limit` is the time in which a matrix-vector
product in the same data type reads as many bytes, in the same run, and `of_limit` its share of our time. Operations are
two a weight, and four a head's dimension and token in the cache. Stock `generate` encodes an image with each prompt,
ours does not: there only decoding is compared. On a busy machine set OMP_NUM_THREADS=1.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

Generate = Callable[[int], list[int]]
"""Generates so many tokens after the prompt."""


def language_model(path: Path, arguments: argparse.Namespace) -> tuple[Any, Generate, Generate, int]:
    """A language model with a prompt of random words: the model, both ways to generate, and tokens of the prompt."""
    from lvctx.inference.prefix_scorer import PrefixScorer
    from lvctx.models.loading import load_model

    options = {"dtype": getattr(torch, arguments.dtype), "device": arguments.device}
    ours, stock = load_model(path, **options), load_model(path, **options)
    ids = np.random.default_rng(0).integers(1000, 10_000, arguments.prompt)
    scorer = PrefixScorer(ours, reuse=False)
    return (
        ours,
        lambda count: scorer.decode([scorer.prefill(ids, count, ())])[0],
        stock_of(stock, torch.from_numpy(ids)[None]),
        len(ids),
    )


def qwen_vl(path: Path, arguments: argparse.Namespace) -> tuple[Any, Generate, Generate, int]:
    """A Qwen-VL with an image and a question."""
    from PIL import Image

    from lvctx.inference.transformers_engine import TransformersEngine
    from lvctx.models.loading import load_model
    from lvctx.video.sampling import VideoSampling
    from lvctx.vlm.registry import open_vlm

    vlm: Any = open_vlm(path)
    dtype = getattr(torch, arguments.dtype)
    engine: Any = TransformersEngine(vlm, device=arguments.device, dtype=dtype, reuse=False)
    pixels = np.random.default_rng(0).integers(0, 255, (arguments.image, arguments.image, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    engine.show([image], VideoSampling())
    ids = engine.prompt_ids(["What is it?"])
    is_visual = ids >= vlm.vocabulary
    pad = vlm.token_rule(vlm.resolve(VideoSampling())).pads["image"]
    stock_ids = torch.from_numpy(np.where(is_visual, pad, ids))[None]
    inputs = {name: value.to(arguments.device) for name, value in vlm.processor([image], return_tensors="pt").items()}
    inputs["mm_token_type_ids"] = torch.from_numpy(is_visual.astype(np.int64))[None].to(arguments.device)
    stock = load_model(path, dtype=dtype, device=arguments.device)
    ours = lambda count: engine.scorer.decode([engine.scorer.prefill(ids, count, ())])[0]  # noqa: E731
    return engine.model, ours, stock_of(stock, stock_ids, **inputs), len(ids)


def stock_of(model: Any, ids_1L: torch.Tensor, **inputs: torch.Tensor) -> Generate:
    """`generate` as its documentation calls it, without an end."""
    ids_1L = ids_1L.to(model.device)
    inputs = {"input_ids": ids_1L, "attention_mask": torch.ones_like(ids_1L), **inputs}

    def generate(count: int) -> list[int]:
        out = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None)
        made: list[int] = out[0, ids_1L.shape[1] :].tolist()
        return made

    return generate


def clocked(run: Callable[[], Any], device: str) -> tuple[np.ndarray, Any]:
    """Seconds and processor seconds of a call, and what it returns."""
    began, worked = time.perf_counter(), time.process_time()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return np.array([time.perf_counter() - began, time.process_time() - worked]), result


def work(model: Any, cached: float) -> tuple[float, float]:
    """Bytes that a token reads, and operations, with so many tokens in the cache."""
    text = model.config.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
    weights = sum(p.numel() for p in model.get_decoder().parameters()) - embedding.numel() + head.numel()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * width * cached
    attention = 4 * text.num_hidden_layers * text.num_attention_heads * width * cached
    return (weights + cache) * embedding.element_size(), 2 * weights + attention


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The turns."""
    from lvctx.vlm.registry import family_of

    path = Path(arguments.model)
    model, ours, stock, prompt = (qwen_vl if family_of(path) else language_model)(path, arguments)
    matrix = torch.zeros(2**14, 2**13, dtype=getattr(torch, arguments.dtype), device=arguments.device)
    vector = torch.zeros(1, 2**13, dtype=matrix.dtype, device=arguments.device)
    ways: dict[str, Generate] = {"ours": ours, "stock": stock}
    steps: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    whole: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    reading: list[float] = []
    with torch.inference_mode():
        found = {name: way(arguments.new) for name, way in ways.items()}
        for turn in range(arguments.repeat):
            for name in sorted(ways, reverse=bool(turn % 2)):
                first, _ = clocked(lambda name=name: ways[name](1), arguments.device)  # type: ignore[misc]
                total, _ = clocked(lambda name=name: ways[name](arguments.new), arguments.device)  # type: ignore[misc]
                steps[name].append((total - first) / (arguments.new - 1))
                whole[name].append(total)
            seconds, _ = clocked(lambda: torch.nn.functional.linear(vector, matrix), arguments.device)
            reading.append(seconds[0])
    bytes_read, operations = work(model, prompt + arguments.new / 2)
    limit = median(reading) * bytes_read / (matrix.numel() * matrix.element_size())
    step = median(float(s[0]) for s in steps["ours"])

    def ratio(of: dict[str, list[np.ndarray]], kind: int) -> float:
        return round(median(float(a[kind] / b[kind]) for a, b in zip(of["ours"], of["stock"], strict=True)), 3)

    return {
        "model": path.name,
        "dtype": arguments.dtype,
        "prompt": prompt,
        "new": arguments.new,
        "same": round(float(np.mean([a == b for a, b in zip(found["ours"], found["stock"], strict=True)])), 3),
        **{f"ms_a_token_{name}": round(1000 * median(float(s[0]) for s in steps[name]), 3) for name in ways},
        **{f"cpu_ms_a_token_{name}": round(1000 * median(float(s[1]) for s in steps[name]), 3) for name in ways},
        "decode_ratio": ratio(steps, 0),
        "decode_cpu_ratio": ratio(steps, 1),
        "with_prompt_ratio": ratio(whole, 0),
        "with_prompt_cpu_ratio": ratio(whole, 1),
        "megabytes_a_token": round(bytes_read / 1e6, 3),
        "gflop_a_token": round(operations / 1e9, 4),
        "limit_ms": round(1000 * limit, 3),
        "of_limit": round(limit / step, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--image", type=int, default=448)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
