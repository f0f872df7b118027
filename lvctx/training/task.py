"""What a training has to provide: its model, its batches, its loss, and how its result is saved."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from lvctx.artifacts.manifest import Provenance
from lvctx.config import OnProgress
from lvctx.parallel.context import ParallelContext
from lvctx.training.parallel_config import ParallelConfig
from lvctx.training.schedule import Schedule

MicroT = TypeVar("MicroT")
"""A micro-batch: what one forward and backward pass computes."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast to train."""

    steps: int
    """Optimizer steps; 0 trains nothing."""
    schedule: Schedule
    """Shape of the learning rate: constant for LongVA's extension, cosine for its alignment."""
    warmup: float
    """Fraction of the steps over which the rate climbs from 0; LLaVA: 0.03."""
    weight_decay: float
    """AdamW's; LongVA's extension 0.1, LLaVA 0."""
    clip: float = 1.0
    """Largest global gradient norm; longer gradients are scaled to it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's; LongVA's extension."""
    save_every: int = 100
    """Steps between checkpoints; a signal saves one in any case."""


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Modules whose trainable parameters share a peak learning rate."""

    name: str
    """In metrics.jsonl: `lm`, `projector`, `tower`."""
    modules: Sequence[nn.Module]
    """Parameters that do not train have `requires_grad` False."""
    lr: float
    """Peak learning rate."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters, each once: an output head may share its weight with the embedding."""
        return list({id(p): p for m in self.modules for p in m.parameters() if p.requires_grad}.values())


@dataclass(frozen=True, kw_only=True)
class TrainableModel:
    """A model with its frozen parameters frozen."""

    model: Any
    """What is saved."""
    groups: Sequence[ParameterGroup]
    """What trains."""
    decoder: Any = None
    """Its transformers decoder, whose `layers` are sharded and recomputed one by one; None: the model has no layers."""
    lora: Any = None
    """The decoder wrapped in LoRA, if it trains by LoRA."""


class TrainingTask(ABC, Generic[MicroT]):
    """One training. `run_training` calls the methods in the order in which they are defined here."""

    provenance: Provenance
    """What identifies the run: its checkpoints and its output are refused by any other."""
    train_config: TrainConfig
    """How long and how fast to train."""
    flops: float | None = None
    """Operations of a step, where they are known."""
    equal_lengths: bool = False
    """Whether all micro-batches have one shape, so that compiled attention kernels pay off."""

    def clear(self, out: Path) -> None:
        """Remove what an earlier run left in `out` besides its checkpoints; called when a run starts over."""

    @abstractmethod
    def load(self, device: str) -> TrainableModel:
        """Load the model as training starts from it; called again, on the CPU, for the unsharded copy to be saved."""

    @abstractmethod
    def build(self, trainable: TrainableModel, context: ParallelContext, parallel: ParallelConfig) -> nn.Module:
        """The module that contains the model and computes the loss, to be sharded; `loss` calls it.

        Raises UsageError for settings that the training cannot run with.
        """

    def before_steps(self, out: Path, on_progress: OnProgress) -> None:
        """Compute what the loss needs from the starting model; called on every rank."""

    @abstractmethod
    def batches(self, step: int) -> Sequence[MicroT]:
        """Micro-batches of a global step, of all ranks; they must depend on the step alone."""

    @abstractmethod
    def loss(self, micro: MicroT) -> tuple[Tensor, int]:
        """Summed loss and number of counted tokens; of this rank's part where ranks share a sample."""

    def describe(self, micro: MicroT) -> str:
        """Which samples a micro-batch holds, for errors."""
        return str(micro)

    def longest(self, micro: MicroT) -> int | None:
        """Tokens of the longest sample of a micro-batch for metrics.jsonl; None: no such column."""
        return None

    def longest_sample(self, metrics: Sequence[dict[str, Any]]) -> int:
        """Tokens of the longest sample trained on so far, from the rows of metrics.jsonl."""
        return 0

    @abstractmethod
    def save(self, model: Any, out: Path, metrics: Sequence[dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
        """Write the trained model, LoRA merged; the names of its files and further facts for the manifest."""
