"""Host memory of each rank of `extend-lm --lora` on gloo processes, against its shard and the largest tensor.

    python benchmarks/sharded_memory.py [--ranks 2] [--layers 13] [--hidden 1536] [--rounds 3] [--nano .cache/nano]

A random bfloat16 Llama with the nano model's tokenizer is loaded, trained for one step of one row of 64 tokens a rank,
and saved. `weights`, `shard` and `largest` are bytes of the model, of a rank's part and of the largest tensor. `torch`
is the peak of the same run with a model of one narrow layer: libraries, process group, tokenizer. `loading` and
`saving` are what each rank takes above it before and after the step, `limit` is 1.3 x (shard + largest), and `ratio`
the largest of them over `limit`. Medians of the rounds, one JSON line. Linux only. With PYTHONPATH at another version
of lvctx the figures are that version's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONFIG = {"rope_theta": 1e6, "context": 4096, "steps": 1, "lora": 8}
LENGTH = 64


def rank(model: str, data: str, out: str) -> None:
    """One process of torchrun: the training, then its peaks to a file."""
    from lvctx.training import run_training
    from lvctx.training.extend import resolve_extend
    from lvctx.training.extend_config import ExtendConfig
    from lvctx.training.parallel_config import ParallelConfig, RunControl

    loading, train, gathering = [], run_training.train, run_training.gathering

    def measured(*arguments: Any) -> Any:
        loading.append(peak())
        return train(*arguments)

    def saving(*arguments: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        return gathering(*arguments)

    run_training.train, run_training.gathering = measured, saving  # type: ignore[assignment]
    options: dict[str, Any] = {**CONFIG, "batch_tokens": LENGTH * int(os.environ["WORLD_SIZE"])}
    job = resolve_extend(ExtendConfig(model=model, data=Path(data), out=Path(out), **options))
    run_training.run_training(job.task(), ParallelConfig(device="cpu"), RunControl(out=Path(out)))
    Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps([*loading, peak()]))


def peak() -> int:
    """Most memory of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def make_model(out: Path, nano: Path, *, layers: int, hidden: int) -> tuple[int, int]:
    """A random model; returns the bytes of all tensors and of the largest."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(nano / "lm")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    return sum(sizes), max(sizes)


def peaks(model: Path, data: Path, out: Path, ranks: int) -> list[list[int]]:
    """Peak bytes of every rank of one run, loading and saving."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), __file__, "--worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, model, data, out], check=True, env=environment, capture_output=True)
    return [json.loads(Path(f"{out}.{number}").read_text()) for number in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nano", type=Path, default=Path(".cache/nano"))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        rank(*arguments.worker)
        return
    ranks = arguments.ranks
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        make_model(here / "small", arguments.nano, layers=1, hidden=64)
        weights, largest = make_model(here / "large", arguments.nano, layers=arguments.layers, hidden=arguments.hidden)
        flags = ["--tokenizer", here / "small", "--seq-len", LENGTH, "--keep-short", 1, "-o", here / "rows"]
        text = arguments.nano / "essays" / "love.txt"
        command = [sys.executable, "-m", "lvctx", "pack-text", text, "--separator", "<|endoftext|>", *flags]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        found: dict[str, list[list[list[int]]]] = {"small": [], "large": []}
        for number in range(arguments.rounds):
            for name, runs in found.items():
                runs.append(peaks(here / name, here / "rows", here / f"{name}-{number}", ranks))
    alone = statistics.median(max(peak for of_rank in run for peak in of_rank) for run in found["small"])
    phases = {
        phase: [round(statistics.median(run[i][at] for run in found["large"]) - alone) for i in range(ranks)]
        for at, phase in enumerate(("loading", "saving"))
    }
    limit = 1.3 * (weights / ranks + largest)
    figures = {"weights": weights, "shard": weights // ranks, "largest": largest, "torch": round(alone), **phases}
    ratio = max(max(values) for values in phases.values()) / limit
    print(json.dumps({"ranks": ranks, **figures, "limit": round(limit), "ratio": round(ratio, 3)}))


if __name__ == "__main__":
    main()
