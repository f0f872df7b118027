"""Attention kernels on CUDA, causal rows forward and backward, and new tokens behind a cache with a mask or without.

    python benchmarks/attention.py [--heads 9 --key-heads 3 --channels 64] [--length 32768] [--chunk 2048]

Rows: torch's own FlashAttention-2 against cuDNN, which training tries first (`block_attention.cudnn_first`). Cache: the
last `chunk` of `length` tokens by one masked call, as transformers makes it, against two flash calls merged by their
log-sum-exp (`striped_attention`), as evaluation does. Medians of five; `limit` is the speed of a large bfloat16 matrix
product on this device. Operations: two a channel, product and pair of tokens that attend.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lvctx.parallel.block_attention import FlashCUDA
from lvctx.parallel.striped_attention import attend_alone


def milliseconds(run: Callable[[], object]) -> float:
    """Median of five, on the device's own clock."""
    run()
    taken = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--chunk", type=int, default=2048)
    a = parser.parse_args()
    square = torch.randn(8192, 8192, device="cuda").bfloat16()
    limit = 2 * 8192**3 / milliseconds(lambda: square @ square) / 1e9
    print(
        json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "limit_tflops": round(limit)})
    )

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, a.length, a.channels, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    q, k, v = draw(a.heads), draw(a.key_heads), draw(a.key_heads)
    work = 2 * a.heads * a.channels * a.length**2
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):

            def run() -> torch.Tensor:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            grad = torch.randn_like(run())
            forward = milliseconds(run)
            backward = milliseconds(lambda run=run, grad=grad: run().backward(grad)) - forward
        speeds = {"forward_tflops": round(work / forward / 1e9), "backward_tflops": round(2.5 * work / backward / 1e9)}
        print(json.dumps({"row": name, "forward_ms": round(forward, 2), "backward_ms": round(backward, 2), **speeds}))

    with torch.inference_mode():
        new, before = q[:, :, -a.chunk :], a.length - a.chunk
        mask = torch.ones(a.chunk, a.length, dtype=torch.bool, device="cuda").tril(before)[None, None]
        whole = [x.repeat_interleave(a.heads // a.key_heads, 1) for x in (k, v)]
        masked = milliseconds(lambda: F.scaled_dot_product_attention(new, *whole, attn_mask=mask))
        merged = milliseconds(lambda: attend_alone(new, k, v, FlashCUDA(), a.channels**-0.5))
    print(json.dumps({"cache": before, "masked_ms": round(masked, 2), "merged_ms": round(merged, 2)}))


if __name__ == "__main__":
    main()
