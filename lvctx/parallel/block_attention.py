"""Attention over one block of queries and keys, and what a ring needs in addition: the log-sum-exp, and a backward that
takes the whole row's output and log-sum-exp and returns this block's exact share of gradients (Dao 2023, sec. 3.1).

Torch's own flash kernels are used where supported (CPU; CUDA in half precision), otherwise plain matrix products.
Grouped queries need no copies: K key heads may be fewer than the H query heads.

A kernel's `forward` takes q (B, H, Q, D), k and v (B, K, S, D), and returns the output in the dtype of q and the
log-sum-exp (B, H, Q) in float32; `causal` needs Q == S. Its `backward` takes the output's gradient, the same tensors,
and `out` and `lse` over all keys that the queries attend to; it returns the gradients of q, k and v from this block.

Shapes: B samples, H query heads, K key heads, Q queries, S keys, D channels.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_aten = torch.ops.aten


class FlashCPU:
    """torch's flash attention for CPU: float32, float64, bfloat16, float16."""

    name = "torch flash (cpu)"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )


class FlashCUDA:
    """torch's FlashAttention-2 for CUDA: bfloat16 and float16, head sizes that are multiples of 8 up to 256."""

    name = "torch flash (cuda)"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        outputs = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return outputs[0], outputs[1]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Seed and offset of the unused dropout, in the shapes that the kernel's forward would return.
        seed, offset = (torch.zeros(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))
        sizes = (None, None, q.shape[2], k.shape[2])
        return _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), *sizes, 0.0, causal, seed, offset, scale=scale
        )


class Plain:
    """Matrix products with all Q x S scores in memory: for float32 on CUDA and sizes that no flash kernel supports."""

    name = "matrix products"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        scores = self._scores(q, k, causal=causal, scale=scale)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp()
        return (weights @ self._spread(v, q)).to(q.dtype), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = (self._scores(q, k, causal=causal, scale=scale) - lse[..., None]).exp()
        grad = grad.float()
        rows = (grad * out.float()).sum(-1, keepdim=True)
        scores = weights * (grad @ self._spread(v, q).mT - rows) * scale
        dq = scores @ self._spread(k, q)
        dk, dv = scores.mT @ q.float(), weights.mT @ grad
        groups = (k.shape[1], q.shape[1] // k.shape[1])
        return dq, dk.unflatten(1, groups).sum(2), dv.unflatten(1, groups).sum(2)

    @staticmethod
    def _spread(x_BKSD: Tensor, q_BHQD: Tensor) -> Tensor:
        return x_BKSD.float().repeat_interleave(q_BHQD.shape[1] // x_BKSD.shape[1], dim=1)

    def _scores(self, q_BHQD: Tensor, k_BKSD: Tensor, *, causal: bool, scale: float) -> Tensor:
        scores = q_BHQD.float() @ self._spread(k_BKSD, q_BHQD).mT * scale
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        return scores


Kernel = FlashCPU | FlashCUDA | Plain
"""One way to compute a block; see above."""


def cudnn_first(device: str) -> AbstractContextManager[None]:
    """Let `scaled_dot_product_attention` try cuDNN first on CUDA, for repeated shapes; each new shape is compiled.

    On an H100 it takes 0.52 to 0.65 of the time of torch's own flash kernels, forward and backward, at 32,768 tokens.
    """
    if torch.device(device).type != "cuda":
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def choose_kernel(device: str, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The fastest kernel that supports these blocks."""
    if torch.device(device).type == "cpu":
        return FlashCPU()
    half = dtype in (torch.bfloat16, torch.float16)
    return FlashCUDA() if half and head_dim % 8 == 0 and head_dim <= 256 else Plain()
