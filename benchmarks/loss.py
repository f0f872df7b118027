"""Cross-entropy on hidden states, forward and backward: ours, chunks that are recomputed, torch's own, and all logits.

    python benchmarks/loss.py [--tokens 4096] [--hidden 576] [--vocab 49152] [--rounds 3] [--device cpu] [--dtype auto]
        [--frozen-head]

Random hidden states and head, in the type that `--dtype auto` means for the device. `flops` are those of the matrix
products that are needed: logits and the gradients. Each way runs in a process of its own, one after the other in every
round;
`seconds` is the median, `bytes` what the process grew by (GPU: the largest allocation), `error` the relative error
of the sum of losses against float64 logits of the same values. One JSON line a way.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lvctx.device import resolve_dtype
from lvctx.models.loss import token_loss

WAYS = ("chunks", "recomputed", "torch", "full")


def ours(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return token_loss(hidden, head, labels)[0]


def recomputed(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """A chunk of 1,024 tokens at a time, whose logits are computed again in the backward pass."""
    pieces = zip(hidden.split(1024), labels.split(1024), strict=True)
    return torch.stack([checkpoint(full, h, head, y, use_reentrant=False) for h, y in pieces]).sum()


def torchs(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(acc_dtype=torch.float32)
    return F.linear_cross_entropy(hidden, head, labels, reduction="sum", options=options)


def full(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float(), labels, reduction="sum")


def run(arguments: argparse.Namespace) -> None:
    """One way, in this process."""
    torch.manual_seed(0)
    size, device = (arguments.tokens, arguments.hidden), arguments.device
    dtype = getattr(torch, resolve_dtype(arguments.dtype, device))
    hidden = torch.randn(size, device=device).to(dtype).requires_grad_()
    head = (0.05 * torch.randn(arguments.vocab, arguments.hidden, device=device)).to(dtype)
    head.requires_grad_(not arguments.frozen_head)
    labels = torch.randint(0, arguments.vocab, (arguments.tokens,), device=device)
    before = held(device)
    began = time.perf_counter()
    ways = {"chunks": ours, "recomputed": recomputed, "torch": torchs, "full": full}
    total = ways[arguments.way](hidden, head, labels)
    total.backward()
    value = total.item()
    seconds, grown = time.perf_counter() - began, held(device) - before
    with torch.no_grad():
        pieces = zip(hidden.split(256), labels.split(256), strict=True)
        want = sum(F.cross_entropy(h.double() @ head.double().T, y, reduction="sum").item() for h, y in pieces)
    products = 2 if arguments.frozen_head else 3
    flops = 2 * products * arguments.tokens * arguments.hidden * arguments.vocab
    print(json.dumps({"seconds": seconds, "bytes": grown, "flops": flops, "error": value / want - 1}))


def held(device: str) -> int:
    """Bytes at most so far."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--frozen-head", action="store_true", help="as with LoRA: no gradient of the head")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        run(arguments)
        return
    ways = [way for way in WAYS if way != "torch" or hasattr(F, "linear_cross_entropy")]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for way in ways:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[way].append(json.loads(done.stdout))
    for way in ways:
        middle = {key: statistics.median(row[key] for row in found[way]) for key in found[way][0]}
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(found[way], found["chunks"], strict=True))
        print(json.dumps({"way": way, **middle, "time_over_chunks": round(ratio, 2)}))


if __name__ == "__main__":
    main()
