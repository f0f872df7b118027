"""Cross-entropy on hidden states: logits are computed for one chunk of counted tokens at a time, not for the sequence.

At 224K tokens and Qwen2's 152,064 entries the logits alone are 68 GB in bfloat16. The sum is kept in float32, and
sum and count are returned separately: a mean of means would weigh short samples more than long ones.

torch 2.13's `linear_cross_entropy` is not used: its sum of bfloat16 losses is bfloat16 (0.7 % off over 2,048 tokens,
compared with 7e-6 here), and on a CPU it takes four times as long (`benchmarks/loss.py`).

Shapes: N tokens, E hidden width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Label of a token that is not counted."""


def token_loss(hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, *, chunk: int = 1024) -> tuple[Tensor, int]:
    """Sum of the cross-entropies (float32, nats) over counted tokens, and their number.

    `labels_N` are targets already shifted to the position of the hidden state that predicts them; -100 is not counted.
    """
    counted = labels_N != IGNORED
    hidden, labels = hidden_NE[counted], labels_N[counted]
    total = hidden.new_zeros((), dtype=torch.float32)
    # Split, not sliced: the gradient of every slice would be as large as all hidden states.
    for hidden_CE, labels_C in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        total = total + checkpoint(_chunk_loss, hidden_CE, weight_VE, labels_C, use_reentrant=False)
    return total, len(labels)


def _chunk_loss(hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_NE, weight_VE).float(), labels_N, reduction="sum")


def shift_labels(ids: Tensor) -> Tensor:
    """Targets of next-token prediction for rows of ids (..., L): each token's successor, -100 for the last."""
    return torch.cat([ids[..., 1:], torch.full_like(ids[..., :1], IGNORED)], dim=-1)
