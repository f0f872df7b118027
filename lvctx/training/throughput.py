"""Throughput of a step: tokens per second, memory, and model FLOPs utilization (MFU)."""

import resource
from typing import Any

import torch

from lvctx.parallel.context import ParallelContext
from lvctx.training.memory_model import DEVICES, GIB, known_device


def measure(world: ParallelContext, *, tokens: int, seconds: float, flops: float | None) -> dict[str, Any]:
    """Columns of metrics.jsonl for a step of `tokens` on all ranks; `flops` are its operations (`memory_model.flops`).

    `memory_bytes` is this rank's maximum so far: memory allocated by torch on a GPU, the resident set on a CPU.
    `mfu` is None if the operations or the device's peak are not known.
    """
    device, peak = torch.device(world.device), 0.0
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
        kind = known_device(torch.cuda.get_device_name(device))
        peak = DEVICES[kind].flops if kind else 0.0
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "memory_bytes": memory,
        "mfu": round(flops / seconds / (world.size * peak), 4) if flops and peak else None,
    }


def note(row: dict[str, Any]) -> str:
    """A step's row of metrics.jsonl as a readable line."""
    mfu = f", MFU {row['mfu']:.0%}" if row["mfu"] else ""
    speed, memory = row["tokens_per_second"], row["memory_bytes"] / GIB
    return f"loss {row['loss']:.3f}, {speed:,.0f} tokens/s, {memory:.1f} GiB{mfu}"
