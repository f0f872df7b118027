"""Trainings in processes that kill themselves at a place in the program, which no signal from outside could meet.

The fork server imports what training needs once, so that a process costs little.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import aligning
import numpy as np
import torch
import torch._dynamo
import transformers.models.clip.modeling_clip
import transformers.models.llama.modeling_llama
import transformers.models.llava_onevision.modeling_llava_onevision
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401
from torch import Tensor, nn

from lvctx.artifacts.manifest import Provenance
from lvctx.dist.context import ParallelContext
from lvctx.errors import Stopped
from lvctx.train import loop, preference
from lvctx.train.data import indices
from lvctx.train.trainer import Group, TrainConfig, train


class Toy:
    """A regression whose every step can be watched, or interrupted."""

    def __init__(self, out: Path, steps: int = 6, stop_at: int | None = None, *, lr: float = 0.1) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.out, self.steps, self.stop_at, self.lr = out, steps, stop_at, lr
        self.calls = 0

    def loss(self, sample: int) -> tuple[Tensor, int]:
        self.calls += 1
        if self.stop_at is not None and self.calls == self.stop_at:
            raise Stopped
        x = torch.from_numpy(np.random.default_rng(sample).normal(size=(sample + 1, 3)).astype("float32"))
        return ((self.model(x) - x.sum(1, keepdim=True)) ** 2).sum(), len(x)

    def run(self, seed: int = 0) -> list[Tensor]:
        train(
            groups=[Group(name="all", parameters=list(self.model.parameters()), lr=self.lr)],
            batch=lambda step: indices(step, batch=2, samples=5, seed=0),
            loss=self.loss,
            config=TrainConfig(steps=self.steps, schedule="cosine", warmup=0.3, weight_decay=0.1, save_every=2),
            out=self.out,
            run=Provenance(schema="toy/1", command="toy", config={}, inputs={}, seed=seed),
            report=lambda done, total, note: None,
            world=ParallelContext(device="cpu"),
        )
        return [p.detach().clone() for p in self.model.parameters()]


FORKS = multiprocessing.get_context("forkserver")


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
            at_call(loop, "_accumulate", number, stop)
        elif place == "step":
            at_call(loop, "_accumulate", number)
        elif place == "row":
            at_call(loop, "note", number)  # the row is written, no checkpoint has the step
        elif place == "rewrite":
            at_call(loop, "write_rows", number)
        elif place == "save":
            at_call(loop, "_state", number)
        elif place == "reference":
            at_call(preference.RowLog, "append", number)
        elif place == "end":
            at_call(loop, "read_rows", number)
    try:
        RUNS[kind](folder, out)
    except Stopped:
        os._exit(75)


def process(kind: str, folder: Path, out: Path, blow: tuple[str, int]) -> None:
    """A process of a run that ends by a blow."""
    FORKS.set_forkserver_preload([__name__])
    # Python 3.11's fork server looks on PYTHONPATH alone for what it imports ahead.
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        forkserver.ensure_running()
    child = FORKS.Process(target=_train, args=(kind, folder, out, blow))
    child.start()
    child.join()
    assert child.exitcode == (75 if blow[0] == "stop" else -signal.SIGKILL), (kind, blow)


def _toy(folder: Path, out: Path) -> None:
    Toy(out).run()


def _extend(folder: Path, out: Path) -> None:
    from lvctx.stages.extend import Machine, plan_extend, run_extend

    options: dict[str, Any] = {"rope": "theta", "rope_theta": 1e6, "context": 512, "lr": 1e-3, "lora": 0, "seed": 0}
    unset = dict.fromkeys(("factor", "attention_factor", "seq_len", "adapter"))
    no = dict.fromkeys(("checkpoint_activations", "doc_mask", "pose"), False)
    plan = plan_extend(
        model=str(folder / "lm"), data=folder / "rows", steps=4, batch_tokens=128, **options, **unset, **no
    )
    machine = Machine(device="cpu")
    run_extend(plan, out, resume="auto", force=False, machine=machine, report=lambda done, total, note: None)


def _align(folder: Path, out: Path) -> None:
    aligning.align(folder / "data.json", out, folder / "lm", folder / "tower", steps=4, batch=1)


def _dpo(folder: Path, out: Path) -> None:
    options: dict[str, Any] = {"init": str(folder / "vlm"), "stage": "dpo", "steps": 4, "batch": 2, "lora": 2}
    aligning.align(folder / "pairs.json", out, None, None, **options)


def _mrope(folder: Path, out: Path) -> None:
    from lvctx.stages.extend import Machine
    from lvctx.stages.mrope import plan_mrope
    from lvctx.stages.mrope_train import plan_training, run_training

    model = str(folder / "qwen")
    plan = plan_mrope(model=model, scale=2, original_length=None, method=None, ramp="index", force=False)
    options: dict[str, Any] = {"steps": 4, "batch": 1, "lr": 1e-2, "warmup": 0.0, "lora": 4, "seed": 0}
    unset = dict.fromkeys(("seq_len", "hybrid"))
    trained = plan_training(plan, data=folder / "chat", media=folder, checkpoint_activations=True, **options, **unset)
    machine = Machine(device="cpu")
    run_training(trained, out, resume="auto", force=False, machine=machine, report=lambda done, total, note: None)


RUNS: dict[str, Callable[[Path, Path], None]] = {
    "toy": _toy,
    "extend": _extend,
    "align": _align,
    "dpo": _dpo,
    "mrope": _mrope,
}
