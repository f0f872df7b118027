"""The interface of a training: its model, its batches, its loss, and the saving of its result."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from lvctx.artifacts.manifest import Provenance
from lvctx.config import OnProgress
from lvctx.models.lora import Gather
from lvctx.parallel.context import ParallelContext
from lvctx.training.memory_model import Recomputation
from lvctx.training.parallel_config import ParallelConfig
from lvctx.training.schedule import Schedule

MicroT = TypeVar("MicroT")
"""A micro-batch: the input of one forward and backward pass."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer settings."""

    steps: int
    """Optimizer steps; 0 trains nothing."""
    schedule: Schedule
    """Schedule of the learning rate: constant for LongVA's extension, cosine for its alignment."""
    warmup: float
    """Fraction of the steps over which the rate rises from 0; LLaVA: 0.03."""
    weight_decay: float
    """AdamW's weight decay; LongVA's extension 0.1, LLaVA 0."""
    clip: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas; those of LongVA's extension."""
    save_every: int = 100
    """Steps between checkpoints; a signal saves one in any case."""


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Modules whose trainable parameters share a peak learning rate."""

    name: str
    """Name in metrics.jsonl: `lm`, `projector`, `tower`."""
    modules: Sequence[nn.Module]
    """Modules of the group; frozen parameters have `requires_grad` False."""
    lr: float
    """Peak learning rate."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters, each once: an output head may share its weight with the embedding."""
        return list({id(p): p for m in self.modules for p in m.parameters() if p.requires_grad}.values())


@dataclass(frozen=True, kw_only=True)
class TrainableModel:
    """A model with its trainable parts selected."""

    model: Any
    """The model that is saved."""
    groups: Sequence[ParameterGroup]
    """What trains."""
    decoder: Any = None
    """Its transformers decoder, whose `layers` are sharded and recomputed one by one; None without layers."""
    lora: Any = None
    """The decoder wrapped in LoRA, if it trains with LoRA."""


class TrainingTask(ABC, Generic[MicroT]):
    """One training. `run_training` calls the methods in the order in which they are defined here."""

    provenance: Provenance
    """Identifies the run; checkpoints and output of another run are refused."""
    train_config: TrainConfig
    """Optimizer settings."""
    inputs: Sequence[Path] = ()
    """Files and directories that it reads; finished directories of ours are compared with their hashes before."""
    datasets: Sequence[str] = ()
    """Ids of the hub's datasets that it trains on, for the model card."""
    flops: float | None = None
    """Operations of a step, if known."""
    equal_lengths: bool = False
    """Whether all micro-batches have one shape, so that compiling attention kernels is worthwhile."""

    def clear(self, out: Path) -> None:
        """Remove an earlier run's files in `out` other than its checkpoints; called when a run starts over."""

    @abstractmethod
    def load(self, device: str) -> TrainableModel:
        """Load the starting model; on `meta` its parameters stay in their files (`lvctx.models.loading.load_model`)."""

    @abstractmethod
    def build(self, trainable: TrainableModel, context: ParallelContext, parallel: ParallelConfig) -> nn.Module:
        """The module that contains the model and computes the loss, to be sharded; `loss` calls it.

        Raises UsageError for unsupported settings.
        """

    def recomputation(self, context: ParallelContext, parallel: ParallelConfig) -> Recomputation:
        """What the backward pass recomputes with `--checkpoint-activations auto`: all layers if memory is unknown."""
        return Recomputation()

    def before_steps(self, out: Path, on_progress: OnProgress) -> None:
        """Compute values that the loss needs from the starting model; called on every rank."""

    @abstractmethod
    def batches(self, step: int) -> Sequence[MicroT]:
        """Micro-batches of a global step, of all ranks; they must depend only on the step."""

    @abstractmethod
    def loss(self, micro: MicroT) -> tuple[Tensor, int]:
        """Summed loss and number of counted tokens; for this rank's part if ranks share a sample."""

    def describe(self, micro: MicroT) -> str:
        """Description of a micro-batch's samples, for errors."""
        return str(micro)

    def longest(self, micro: MicroT) -> int | None:
        """Tokens of the longest sample of a micro-batch for metrics.jsonl; None omits the column."""
        return None

    def longest_sample(self, metrics: Sequence[dict[str, Any]]) -> int:
        """Tokens of the longest sample trained on so far, from the rows of metrics.jsonl."""
        return 0

    @abstractmethod
    def save(
        self, model: Any, out: Path, metrics: Sequence[dict[str, Any]], gather: Gather
    ) -> tuple[list[str], dict[str, Any]]:
        """Write the trained model, with LoRA merged; returns the names of its files and facts for the manifest.

        Called on rank 0, where `gather` gives the full tensor of a parameter.
        """
