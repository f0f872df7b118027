"""A training step of ours against the plain one: peak memory and tokens a second by length, and what the plan said.

    python benchmarks/train_step.py --model MODEL_DIR [--lengths 1024,2048,4096] [--steps 2] [--device cpu]
        [--checkpoint-activations auto|none|layers|tiles] [--ours-only]

Ours is `lvctx extend-lm` itself (full parameters, logits in chunks, layers recomputed as stated). Plain is what
transformers gives out of the box: float32 weights under bfloat16 autocast, SDPA, all logits, nothing recomputed,
AdamW. Each runs in a process of its own on the same random rows; the fastest step counts. Memory is the process's
largest resident set, or the device's largest allocation. `share` is the model's own operations (nothing counted
twice) a second over the speed of a large bfloat16 matrix product on this device. A length that is killed or out of
memory is a row with `error`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def rows(out: Path, length: int, vocab: int) -> None:
    """Packed rows of random ids: what is in them does not change a step's cost."""
    from lvctx.artifacts.manifest import Provenance, write_manifest
    from lvctx.data.packed import shard_name, write_token_shard

    out.mkdir()
    ids = np.random.default_rng(0).integers(0, vocab, (4, length)).astype(np.int32)
    write_token_shard(out / shard_name(0), ids, np.zeros(5, np.int64), np.zeros(0, np.int32), {})
    provenance = Provenance(schema="lvctx.packed/1", command="pack-text", config={}, inputs={})
    facts = {"rows": 4, "seq_len": length, "shard_rows": [4], "length_bins": [], "sources": {}}
    write_manifest(out, provenance, [shard_name(0)], **facts)


def ours(arguments: argparse.Namespace, work: Path) -> list[float]:
    """Seconds of each step of the real command."""
    from lvctx.__main__ import main

    flags = {"model": arguments.model, "data": work / "packed", "rope": "none", "context": max(arguments.length, 2048)}
    flags |= {
        "steps": arguments.steps,
        "batch-tokens": arguments.length,
        "device": arguments.device,
        "checkpoint-activations": arguments.checkpoint_activations,
        "out": work / "out",
    }
    sys.argv = ["lvctx", "extend-lm", "-q", *(str(x) for name, value in flags.items() for x in (f"--{name}", value))]
    try:
        main()
    except SystemExit as e:
        if e.code:
            raise
    return [json.loads(line)["seconds"] for line in (work / "out" / "metrics.jsonl").read_text().splitlines()]


def plain(arguments: argparse.Namespace, work: Path) -> list[float]:
    """Seconds of each step of the plain path."""
    import torch
    from transformers import AutoModelForCausalLM

    from lvctx.data.packed import PackedRows

    model: Any = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa"
    ).to(arguments.device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    data, taken = PackedRows(work / "packed"), []
    for step in range(arguments.steps):
        began = time.perf_counter()
        ids = torch.from_numpy(data.row(step).astype("int64"))[None].to(arguments.device)
        with torch.autocast(torch.device(arguments.device).type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken.append(time.perf_counter() - began)
    return taken


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One path at one length, in this process."""
    import torch

    work = Path(arguments.work)
    seconds = min((ours if arguments.path == "ours" else plain)(arguments, work))
    if arguments.device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = torch.cuda.max_memory_allocated()
    return {"peak_bytes": peak, "seconds": round(seconds, 3), "tokens_per_second": round(arguments.length / seconds, 1)}


def speed(device: str) -> float:
    """Operations a second of a bfloat16 product of two 4096 x 4096 matrices, the best of five."""
    import torch

    a = torch.randn(4096, 4096, device=device).bfloat16()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * 4096**3 / best


def predicted(arguments: argparse.Namespace, length: int) -> tuple[int, float]:
    """Peak of ours by the plan, and the model's operations of a step."""
    from lvctx.device import resolve_dtype
    from lvctx.training.plan import predict
    from lvctx.training.plan_config import PlanConfig

    found = predict(
        PlanConfig(
            model=arguments.model,
            seq_len=length,
            batch_tokens=length,
            micro_tokens=length,
            steps=1,
            dtype=resolve_dtype("auto", arguments.device),
            checkpoint_activations=arguments.checkpoint_activations,
            device="cpu" if arguments.device == "cpu" else "h200",
            mfu=1.0,
        )
    )
    runtime = 0 if arguments.device == "cpu" else found["bytes"]["runtime"]  # no part of torch's allocations
    return found["peak_bytes"] - runtime, found["flops_a_step"]


def compare(arguments: argparse.Namespace) -> None:
    """Every length by both paths, a row each as it is done."""
    from lvctx.models.loading import read_config

    limit, vocab = speed(arguments.device), int(read_config(arguments.model)["vocab_size"])
    for length in (int(n) for n in arguments.lengths.split(",")):
        expected, work = predicted(arguments, length)
        found: dict[str, dict[str, Any]] = {}
        for path in ("ours",) if arguments.ours_only else ("ours", "plain"):
            with tempfile.TemporaryDirectory() as folder:
                rows(Path(folder) / "packed", length, vocab)
                command = [sys.executable, __file__, *sys.argv[1:], "--path", path, "--length", str(length)]
                done = subprocess.run([*command, "--work", folder], capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.strip().splitlines() or [""]
                found[path] = {"error": f"exit {done.returncode}: {said[-1][:200]}"}
            else:
                found[path] = json.loads(done.stdout.splitlines()[-1])
                found[path]["share"] = round(work / found[path]["seconds"] / limit, 3)
        row: dict[str, Any] = {"length": length, "flops": work, "limit_flops": round(limit), **found}
        if "error" not in found["ours"]:
            row |= {"predicted_bytes": expected, "plan_error": round(expected / found["ours"]["peak_bytes"] - 1, 3)}
            if "error" not in found.get("plain", {"error": ""}):
                row["memory_ratio"] = round(found["ours"]["peak_bytes"] / found["plain"]["peak_bytes"], 3)
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--lengths", default="1024,2048,4096")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpoint-activations", choices=["auto", "none", "layers", "tiles"], default="auto")
    parser.add_argument("--ours-only", action="store_true", help="leave the plain path out")
    parser.add_argument("--path", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.path:
        print(json.dumps(measure(arguments)))
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
