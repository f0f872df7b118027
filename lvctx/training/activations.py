"""What the backward pass finds of the forward: each layer's input alone, on the device or in host memory.

A layer's inside is computed again in the backward pass (Chen et al. 2016). At 224K tokens over 8 ranks the inputs of
Qwen2-7B's 28 layers are still 5.6 GB a rank; in host memory they wait there for their turn.
"""

import ctypes
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

M_MMAP_THRESHOLD, MAPPED = -3, 1 << 20
"""glibc's number for it (malloc.h), and bytes from which a block of memory is mapped by itself."""


def checkpoint_layers(lm: Any, *, offload: bool) -> None:
    """Recompute each decoder layer of a transformers model in its backward pass, and put the model in train mode.

    `offload` keeps the layers' inputs in host memory meanwhile.
    """
    _map_large_blocks()
    # Renamed in transformers 5.2x; both recompute layer by layer without reentrance.
    enable = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    lm.train()
    if offload:
        for module in lm.modules():
            if getattr(module, "gradient_checkpointing", False):
                module._gradient_checkpointing_func = _checkpoint_offloaded


def _checkpoint_offloaded(function: Any, *args: Any) -> Any:
    # The hook outside catches the layer's inputs; what is inside belongs to the checkpoint, which drops it.
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *args, use_reentrant=False)


def _map_large_blocks() -> None:
    """Let freed tensors in host memory go back to the system, whatever is allocated after them.

    By itself glibc soon takes blocks of up to 32 MB from its heap, where the inputs that stay behind keep it from
    giving back the insides between them: a step of 8,192 tokens of SmolLM2-135M held 6.0 GB instead of 2.6.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED)
