"""Trainings in processes that kill themselves at a given point of the program."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
import transformers.models.clip.modeling_clip
import transformers.models.llama.modeling_llama
import transformers.models.llava_onevision.modeling_llava_onevision
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401
from safetensors.torch import save_file
from torch import Tensor, nn

from lvctx.artifacts.manifest import Provenance
from lvctx.errors import Stopped
from lvctx.parallel.context import ParallelContext
from lvctx.training import dpo, trainer
from lvctx.training.parallel_config import ParallelConfig, RunControl
from lvctx.training.row_order import indices
from lvctx.training.run_training import run_training
from lvctx.training.task import ParameterGroup, TrainableModel, TrainConfig, TrainingTask
from lvctx.training.trainer import train
from support import aligning, forks


class Toy(TrainingTask[int]):
    """A regression whose every step can be watched, or interrupted."""

    def __init__(self, out: Path, steps: int = 6, stop_at: int | None = None, *, lr: float = 0.1) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.out, self.stop_at, self.lr = out, stop_at, lr
        self.train_config = TrainConfig(steps=steps, schedule="cosine", warmup=0.3, weight_decay=0.1, save_every=2)
        self.provenance = toy_provenance()
        self.calls = 0

    def load(self, device: str) -> TrainableModel:
        groups = [ParameterGroup(name="all", modules=[self.model], lr=self.lr)]
        return TrainableModel(model=self.model, groups=groups)

    def build(self, trainable: TrainableModel, context: ParallelContext, parallel: ParallelConfig) -> nn.Module:
        return self.model

    def batches(self, step: int) -> list[int]:
        return indices(step, batch=2, samples=5, seed=0)

    def loss(self, micro: int) -> tuple[Tensor, int]:
        self.calls += 1
        if self.stop_at is not None and self.calls == self.stop_at:
            raise Stopped
        x = torch.from_numpy(np.random.default_rng(micro).normal(size=(micro + 1, 3)).astype("float32"))
        return ((self.model(x) - x.sum(1, keepdim=True)) ** 2).sum(), len(x)

    def save(
        self, model: nn.Module, out: Path, metrics: Sequence[dict[str, Any]], gather: Any
    ) -> tuple[list[str], dict[str, Any]]:
        save_file(model.state_dict(), out / "model.safetensors")
        (out / "config.json").write_text('{"model_type": "toy"}')
        return ["config.json", "model.safetensors"], {"steps": len(metrics)}

    def run(self, seed: int = 0) -> list[Tensor]:
        """The steps alone, without the rest of the life cycle; the trained parameters."""
        self.provenance = toy_provenance(seed)
        train(self, self.load("cpu").groups, ParallelContext(device="cpu"), RunControl(out=self.out))
        return [p.detach().clone() for p in self.model.parameters()]


def toy_provenance(seed: int = 0) -> Provenance:
    return Provenance(schema="toy/1", command="toy", config={}, inputs={}, seed=seed)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(module: Any, name: str, number: int, what: Callable[[], None] = die) -> None:
    """From now on the `number`-th call of a function does `what` before anything else."""
    plain, calls = getattr(module, name), []

    def counted(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            what()
        return plain(*args, **named)

    setattr(module, name, counted)


def stop() -> None:
    raise Stopped


def _train(kind: str, folder: Path, out: Path, blow: tuple[str, int] | None) -> None:
    """One process of a run, with what ends it."""
    if blow is not None:
        place, number = blow
        if place == "stop":
            at_call(trainer, "_accumulate", number, stop)
        elif place == "step":
            at_call(trainer, "_accumulate", number)
        elif place == "row":
            at_call(trainer, "note", number)  # the row is written, no checkpoint has the step
        elif place == "rewrite":
            at_call(trainer, "write_jsonl", number)
        elif place == "save":
            at_call(trainer, "_state", number)
        elif place == "reference":
            at_call(dpo.ResultLog, "append", number)
        elif place == "end":
            at_call(trainer, "read_jsonl", number)
    try:
        RUNS[kind](folder, out)
    except Stopped:
        os._exit(75)


def process(kind: str, folder: Path, out: Path, blow: tuple[str, int]) -> None:
    """A process of a run that ends by a blow."""
    forks.ensure_running()
    child = forks.FORKS.Process(target=_train, args=(kind, folder, out, blow))
    child.start()
    child.join()
    assert child.exitcode == (75 if blow[0] == "stop" else -signal.SIGKILL), (kind, blow)


def _toy(folder: Path, out: Path) -> None:
    Toy(out).run()


def _extend(folder: Path, out: Path) -> None:
    from lvctx.training.extend import resolve_extend
    from lvctx.training.extend_config import ExtendConfig

    options: dict[str, Any] = {"rope_theta": 1e6, "context": 512, "lr": 1e-3, "steps": 4, "batch_tokens": 128}
    job = resolve_extend(ExtendConfig(model=str(folder / "lm"), out=out, data=folder / "rows", **options))
    run_training(job.task(), ParallelConfig(checkpoint_activations="none", micro_tokens=1), RunControl(out=out))


def _align(folder: Path, out: Path) -> None:
    aligning.align(folder / "data.json", out, folder / "lm", folder / "tower", steps=4, batch=1)


def _dpo(folder: Path, out: Path) -> None:
    options: dict[str, Any] = {"init": str(folder / "vlm"), "stage": "dpo", "steps": 4, "batch": 2, "lora": 2}
    aligning.align(folder / "pairs.json", out, None, None, **options)


def _mrope(folder: Path, out: Path) -> None:
    from lvctx.training.mrope_config import MropeConfig
    from lvctx.training.mrope_extend import resolve_mrope_training

    options: dict[str, Any] = {"steps": 4, "lr": 1e-2, "warmup": 0.0, "lora": 4}
    config = MropeConfig(model=str(folder / "qwen"), out=out, scale=2, data=folder / "chat", media=folder, **options)
    run_training(resolve_mrope_training(config).task(), ParallelConfig(), RunControl(out=out))


RUNS: dict[str, Callable[[Path, Path], None]] = {
    "toy": _toy,
    "extend": _extend,
    "align": _align,
    "dpo": _dpo,
    "mrope": _mrope,
}
