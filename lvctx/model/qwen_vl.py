"""Qwen-VL models with position ids of our own: one forward over a prompt, and greedy answers that go on from it.

Stock generation asks the model for positions, and transformers 5.3 and later give it wrong ones after a video; here
they come with the prompt, and what is generated counts on from the position after it.

Shapes: S tokens of one sequence; positions are (3, S).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TYPES = ("qwen2_vl", "qwen2_5_vl")
"""Model types whose videos are items of grids; Qwen3-VL writes a time in text before each grid."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A sequence as a Qwen-VL model reads it."""

    ids: list[int]
    """Tokens, with a placeholder for each visual token."""
    positions: Tensor
    """(3, S) time, height and width."""
    after: int
    """Position of the next token."""
    pixels: dict[str, Tensor]
    """Patches and grids, under the names of the model's forward."""


def forward(model: Any, prompt: Prompt, **options: Any) -> Any:
    """The model's output for a prompt, batch of one; `options` go to its forward."""
    device = model.device
    return model(
        input_ids=torch.tensor([prompt.ids], device=device),
        position_ids=prompt.positions[:, None].to(device),
        **{name: tensor.to(device) for name, tensor in prompt.pixels.items()},
        **options,
    )


@torch.inference_mode()
def greedy(model: Any, prompt: Prompt, *, max_new_tokens: int, stop: Collection[int]) -> list[int]:
    """The likeliest tokens one after another, up to and without one of `stop`."""
    said: list[int] = []
    seen = forward(model, prompt, use_cache=True, logits_to_keep=1)
    while True:
        token = int(seen.logits[0, -1].argmax())
        if token in stop:
            return said
        said.append(token)
        if len(said) == max_new_tokens:
            return said
        at = torch.full((3, 1, 1), prompt.after + len(said) - 1, device=model.device)
        ids = torch.tensor([[token]], device=model.device)
        seen = model(input_ids=ids, position_ids=at, past_key_values=seen.past_key_values, use_cache=True)
