"""How a training uses the machine and where it writes; not part of its result or its configuration hash."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from lvctx.config import Flag, OnProgress
from lvctx.device import CpKind, Dtype

Checkpointing = Literal["auto", "none", "layers", "tiles"]
"""What the backward pass recomputes; see `ParallelConfig`."""

CPU_TOKENS, GPU_TOKENS = 4096, 32_768
"""Most tokens of a forward pass by default. On a GPU, 32,768 tokens need an eighth of the Python time per token that
4,096 need; `plan` predicts 32 GiB for a step of SmolLM2-135M with them."""

OnStep = Callable[[Path, dict[str, Any]], None]
"""Called with the output directory and the row of metrics.jsonl that a step has just written."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Devices, memory and speed."""

    panel: ClassVar[str] = "Devices, memory and speed"

    device: str = "auto"
    """Device: cuda, mps or cpu. auto: CUDA if there is one, else MPS, else the CPU."""
    dtype: Dtype = "auto"
    """Type of matrix products; trained weights are float32. auto: bfloat16 if the device computes it natively."""
    cp: Annotated[int, Flag(min=1)] = 1
    """Processes that share a row (context parallelism); start them with torchrun."""
    cp_kind: CpKind = "ring"
    """How these processes compute attention: ring (zigzag ring attention), ulysses (all-to-all over attention
    heads; --cp must divide their number; also for models with sliding windows), or both (ulysses among as many
    neighbours as divide the key heads, the ring around these groups)."""
    offload: bool = False
    """Keep parameters and optimizer state in host memory."""
    checkpoint_activations: Checkpointing = "auto"
    """What the backward pass recomputes. none: nothing. layers: every layer (less memory, a third more time). tiles:
    every layer, and its MLP for 4,096 tokens at a time (least memory). auto: in extend-lm as few layers as the memory
    predicted by lvctx plan allows, elsewhere layers."""
    offload_activations: bool = False
    """Keep the inputs of the layers in host memory between forward and backward pass."""
    compile: bool = False
    """Compile the decoder layers with torch.compile, which makes the first steps longer and later ones shorter. Needs a
    C++ compiler on a CPU, triton on CUDA."""
    micro_tokens: Annotated[int | None, Flag(min=1)] = None
    """Tokens per forward pass, in whole rows or samples, at least one. Default: 4096; in extend-lm on CUDA up to
    32768, if the backward pass need not recompute more for them than for one row."""

    @property
    def forward_tokens(self) -> int:
        """`micro_tokens`, or its default where the memory is not predicted."""
        return self.micro_tokens or CPU_TOKENS


@dataclass(frozen=True, kw_only=True)
class RunControl:
    """The output of a training, the handling of an existing one, and callbacks."""

    out: Path
    """Directory of the trained model."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Continue an unfinished output: if there is one, never, or fail if there is none."""
    force: bool = False
    """Overwrite the output of another run."""
    on_progress: OnProgress = lambda done, total, note: None
    """Called after every step, and during longer preparations."""
    on_step: OnStep = lambda out, row: None
    """Called after every step, on rank 0."""
    command: str = ""
    """The command line, without local paths, for the model card."""
