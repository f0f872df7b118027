"""How a training uses the machine: no part of its result, so no part of its configuration hash."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from lvctx.config import Flag


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Devices, memory and speed."""

    panel: ClassVar[str] = "Devices, memory and speed"

    device: str = "auto"
    """Where to train: cuda, mps or cpu. auto: CUDA if there is one, else MPS, else the CPU."""
    cp: Annotated[int, Flag(min=1)] = 1
    """Processes that share a row (context parallelism); start them with torchrun."""
    offload: bool = False
    """Keep parameters and optimizer state in host memory."""
    checkpoint_activations: bool = True
    """Recompute each layer in the backward pass instead of keeping its activations: less memory, a third more time."""
    offload_activations: bool = False
    """Keep the inputs of the layers in host memory between forward and backward pass."""
    micro_tokens: Annotated[int | None, Flag(min=1)] = None
    """Tokens per forward pass, in whole rows or samples and at least one. Default: 4096."""

    @property
    def forward_tokens(self) -> int:
        """`micro_tokens` with its default."""
        return self.micro_tokens or 4096
