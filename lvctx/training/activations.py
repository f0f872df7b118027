"""Activation checkpointing: only a layer's input is kept for the backward pass, on the device or in host memory.

Activations inside a layer are recomputed in the backward pass (Chen et al. 2016). At 224K tokens over 8 ranks the
inputs of Qwen2-7B's 28 layers are still 5.6 GB per rank, so they can be moved to host memory. At 1M tokens the inside
of one MLP is 36 GB per rank, so an MLP can be computed for a tile of tokens at a time, in the backward pass too
(Bekman et al. 2025, Arctic Long Sequence Training).

Shapes: B rows, T tokens, C tokens of a tile, E hidden width.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lvctx.training.memory_model import MLP_TILE, Recomputation

M_MMAP_THRESHOLD, MAPPED = -3, 1 << 20
"""glibc's parameter number (malloc.h), and the size in bytes from which a block of memory is mapped separately."""


def checkpoint_layers(decoder: Any, recomputation: Recomputation, *, offload: bool = False) -> None:
    """Recompute decoder layers of a transformers model in the backward pass, and put the model in train mode.

    The last `recomputation.kept_layers` keep their activations: the backward pass begins with them, so theirs are free
    again when it reaches the others. `offload` keeps the other layers' inputs in host memory until then.
    """
    if recomputation.kept_layers < len(decoder.layers):
        map_large_blocks()
    # Renamed in transformers 5.2x; both recompute layer by layer without reentrance.
    enable = getattr(decoder, "activation_checkpointing_enable", decoder.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    decoder.train()
    for layer in decoder.layers[len(decoder.layers) - recomputation.kept_layers :]:
        layer.gradient_checkpointing = False
    for layer in decoder.layers if recomputation.mlp_tiles else ():
        layer.mlp.forward = partial(_tiled, layer.mlp.forward, MLP_TILE)
    if offload:
        for module in decoder.modules():
            if getattr(module, "gradient_checkpointing", False):
                module._gradient_checkpointing_func = _checkpoint_offloaded


def _tiled(forward: Callable[[Tensor], Tensor], tile: int, hidden_BTE: Tensor) -> Tensor:
    """`forward` of every token on its own, for `tile` tokens at a time; their activations are recomputed."""
    parts_BCE = [
        # It has no dropout. Experts take only contiguous tokens.
        checkpoint(forward, part_BCE.contiguous(), use_reentrant=False, preserve_rng_state=False)
        for part_BCE in hidden_BTE.split(tile, dim=1)
    ]
    return torch.cat(parts_BCE, dim=1)


def _checkpoint_offloaded(function: Any, *args: Any) -> Any:
    # The outer hook moves the layer's inputs; tensors inside belong to the checkpoint, which drops them.
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *args, use_reentrant=False)


def map_large_blocks() -> None:
    """Let freed tensors in host memory return to the system, those freed before and from now on.

    By default glibc soon takes blocks of up to 32 MB from its heap, where the remaining inputs prevent it from
    returning the freed memory between them: a step of 8,192 tokens of SmolLM2-135M held 6.0 GB instead of 2.6.
    """
    libc = ctypes.CDLL(None)
    for name, arguments in (("mallopt", (M_MMAP_THRESHOLD, MAPPED)), ("malloc_trim", (0,))):
        function = getattr(libc, name, None)  # other C libraries lack it
        if function is not None:
            function(*arguments)
