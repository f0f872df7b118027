"""Cross-entropy on hidden states: logits are computed for one chunk of counted tokens at a time, not for the sequence.

At 224K tokens and Qwen2's 152,064 entries the logits alone are 68 GB in bfloat16. A chunk's gradients are computed
together with its loss, while its logits exist, so the head is applied once (the technique of fused linear
cross-entropy, as in Liger Kernel). The sum is kept in float32, and sum and count are returned separately: a mean of
means would weigh short samples more than long ones.

torch 2.13's `linear_cross_entropy` is not used: its sum of bfloat16 losses is bfloat16 (0.7 % off over 2,048 tokens,
compared with 7e-6 here), and on a CPU it takes several times as long (`benchmarks/loss.py`).

Shapes: N tokens, C tokens of a chunk, E hidden width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100
"""Label of a token that is not counted."""


def token_loss(hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, *, chunk: int = 1024) -> tuple[Tensor, int]:
    """Sum of the cross-entropies (float32, nats) over counted tokens, and their number.

    `labels_N` are targets already shifted to the position of the hidden state that predicts them; -100 is not counted.
    The backward pass can run once.
    """
    counted = labels_N != IGNORED
    hidden, labels = hidden_NE[counted], labels_N[counted]
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return _ChunkedLoss.apply(hidden, weight_VE, labels, chunk, torch.is_grad_enabled()), len(labels)


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss; its gradients are computed in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, chunk: int, with_gradients: bool
    ) -> Tensor:
        need_hidden, need_weight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        head_VE = weight_VE.to(hidden_NE.dtype)
        grad_NE = torch.empty_like(hidden_NE) if need_hidden else None
        grad_VE = torch.zeros_like(weight_VE) if need_weight else None
        total = hidden_NE.new_zeros((), dtype=torch.float32)
        for start in range(0, len(labels_N), chunk):
            piece = slice(start, start + chunk)
            grad_CE = None if grad_NE is None else grad_NE[piece]
            total += _add_chunk(hidden_NE[piece], head_VE, labels_N[piece, None], grad_CE, grad_VE)
        ctx.gradients = (grad_NE, grad_VE)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: the head's gradient is not copied
        return *(None if grad is None else grad.mul_(slope.to(grad.dtype)) for grad in gradients), None, None, None


def _add_chunk(
    hidden_CE: Tensor, head_VE: Tensor, labels_C1: Tensor, grad_CE: Tensor | None, grad_VE: Tensor | None
) -> Tensor:
    """The loss of a chunk; writes its gradient by the hidden states and adds that by the head, where they are given.

    A function of its own, so that the logits are free before the next chunk's exist.
    """
    # In place from logits to their exponentials and then to the loss's derivative by them.
    logits_CV = F.linear(hidden_CE, head_VE).float()
    logits_CV -= logits_CV.amax(1, keepdim=True)
    loss = -logits_CV.gather(1, labels_C1).sum()
    sum_C1 = logits_CV.exp_().sum(1, keepdim=True)
    loss += sum_C1.log().sum()
    if grad_CE is None and grad_VE is None:
        return loss
    logits_CV /= sum_C1
    slope_CV = logits_CV.scatter_add_(1, labels_C1, -torch.ones_like(sum_C1)).to(hidden_CE.dtype)
    del logits_CV
    if grad_CE is not None:
        torch.mm(slope_CV, head_VE, out=grad_CE)
    if grad_VE is not None and grad_VE.dtype == slope_CV.dtype:
        grad_VE.addmm_(slope_CV.T, hidden_CE)
    elif grad_VE is not None:
        grad_VE += slope_CV.T @ hidden_CE
    return loss


def shift_labels(ids: Tensor) -> Tensor:
    """Targets of next-token prediction for rows of ids (..., L): each token's successor, -100 for the last."""
    return torch.cat([ids[..., 1:], torch.full_like(ids[..., :1], IGNORED)], dim=-1)
