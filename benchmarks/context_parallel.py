"""Ring and Ulysses attention of one row on several processes of this machine: forward and backward, float32, gloo.

    python benchmarks/context_parallel.py [--processes 2] [--length 8192] [--heads 8] [--key-heads 2] [--channels 64]

Medians of five, taken in turns; `both` is Ulysses among neighbours and the ring around them, `window` is Ulysses with a
sliding window, which the ring does not support.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from lvctx.parallel.block_attention import FlashCPU
from lvctx.parallel.context import joined
from lvctx.parallel.ring_attention import Ring, ring_attention
from lvctx.parallel.ulysses_attention import ulysses_attention, unified_attention


def measure(rank: int, folder: str, a: argparse.Namespace) -> None:
    """One process; the first prints."""
    torch.set_num_threads(1)
    with joined(Path(folder) / "store", rank=rank, size=a.processes):
        shared: dict[str, Any] = {
            "ring": Ring(rank=rank, world=a.processes, group=torch.distributed.group.WORLD),
            "scale": 0.125,
        }
        ways = {
            "ring": partial(ring_attention, kernel=FlashCPU(), **shared),
            "ulysses": partial(ulysses_attention, **shared),
            "both": partial(
                unified_attention, kernel=FlashCPU(), **shared | {"ring": replace(shared["ring"], kind="both")}
            ),
            "window": partial(ulysses_attention, window=a.window, **shared),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        q, k, v = (
            torch.randn(1, heads, a.length // a.processes, a.channels, requires_grad=True)
            for heads in (a.heads, a.key_heads, a.key_heads)
        )
        for _ in range(6):
            for name, attend in ways.items():
                torch.distributed.barrier()
                began = time.perf_counter()
                attend(q, k, v).sum().backward()
                torch.distributed.barrier()
                taken[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(times[1:]) for name, times in taken.items()}
    ratio = round(seconds["ulysses"] / seconds["ring"], 2)
    if rank == 0:
        print(json.dumps({**{name: round(s, 3) for name, s in seconds.items()}, "ulysses_to_ring": ratio}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in [("processes", 2), ("length", 8192), ("heads", 8), ("key-heads", 2), ("channels", 64)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--window", type=int, default=1024)
    with tempfile.TemporaryDirectory() as folder:
        arguments = parser.parse_args()
        multiprocessing.spawn(measure, args=(folder, arguments), nprocs=arguments.processes)


if __name__ == "__main__":
    main()
