"""The training loop: batches by global step, one loss over all counted tokens, resumable at every step.

Trained parameters are kept in float32 and computed with in bfloat16 (autocast); frozen ones stay as they were loaded.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lvctx.artifacts.store import disk_error, is_disk_error
from lvctx.dist import checkpoint
from lvctx.errors import InputError, Stopped
from lvctx.train.schedule import Schedule, rate


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast to train."""

    steps: int
    """Optimizer steps."""
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
class Group:
    """Parameters that share a peak learning rate."""

    name: str
    """What they are: `lm`, `projector`, `tower`."""
    parameters: Sequence[nn.Parameter]
    """Trained in float32."""
    lr: float
    """Peak learning rate."""


def train(
    *,
    groups: Sequence[Group],
    batch: Callable[[int], Sequence[Any]],
    loss: Callable[[Any], tuple[Tensor, int]],
    config: TrainConfig,
    out: Path,
    run: str,
    report: Callable[[int, int, str], None],
    device: str = "cpu",
) -> None:
    """Take `config.steps` optimizer steps and leave `out/metrics.jsonl`.

    `batch(step)` gives the micro-batches of a global step, and must depend on the step alone; `loss(micro_batch)` gives
    the summed loss and the number of counted tokens. `run` identifies the run: a checkpoint of another is refused.
    On SIGTERM or Ctrl-C the last finished step is saved before the exception goes on. Raises InputError when the loss
    or the gradient is not finite, before the step is taken.
    """
    parameters = [p for g in groups for p in g.parameters]
    optimizer = torch.optim.AdamW(
        [{"params": list(g.parameters), "lr": g.lr, "peak": g.lr} for g in groups],
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    first = _restore(out, run, parameters, optimizer)
    done = first
    out.mkdir(parents=True, exist_ok=True)
    with _open_metrics(out / "metrics.jsonl", keep=first) as write:
        try:
            for step in range(first, config.steps):
                began = time.monotonic()
                factor = rate(step, steps=config.steps, schedule=config.schedule, warmup=config.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                total, tokens = _accumulate(batch(step), loss, device)
                for p in parameters:
                    if p.grad is not None:
                        p.grad /= tokens
                norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip).item()
                mean = total / tokens
                if not (math.isfinite(mean) and math.isfinite(norm)):
                    raise InputError(
                        f"step {step}: loss {mean}, gradient norm {norm}", where=out, fix="lower --lr and --resume"
                    )
                with uninterrupted():
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    done = step + 1
                lr = {g.name: pg["lr"] for g, pg in zip(groups, optimizer.param_groups, strict=True)}
                seconds = round(time.monotonic() - began, 3)
                write({"step": done, "loss": mean, "tokens": tokens, "lr": lr, "norm": norm, "seconds": seconds})
                report(done, config.steps, f"loss {mean:.3f}")
                if done % config.save_every == 0 and done < config.steps:
                    _save(out, run, done, parameters, optimizer)
        except (Stopped, KeyboardInterrupt):
            if done > first:
                _save(out, run, done, parameters, optimizer)
            raise


def _accumulate(
    micro_batches: Sequence[Any], loss: Callable[[Any], tuple[Tensor, int]], device: str
) -> tuple[float, int]:
    """Backward through each micro-batch's summed loss; the caller divides the gradients by the tokens returned."""
    total, tokens = 0.0, 0
    for micro in micro_batches:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            value, count = loss(micro)
        value.backward()
        total += value.item()
        tokens += count
    assert tokens > 0, "a step without a counted token"
    return total, tokens


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGTERM and Ctrl-C back while parameters, moments and step count are being changed together.

    Blocking them in this thread would not do: another thread takes the signal and Python still runs the handler here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers only ever run in the main thread
        return
    held: list[int] = []
    previous = {s: signal.signal(s, lambda number, frame: held.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)
    for number in held[:1]:
        signal.raise_signal(number)


@contextmanager
def _open_metrics(path: Path, *, keep: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Append rows to metrics.jsonl, dropping those past step `keep` that an interrupted run left."""
    kept = []
    if path.exists() and keep:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n") and json.loads(line)["step"] <= keep:
                kept.append(line)
    try:
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(kept)

            def write(row: dict[str, Any]) -> None:
                f.write(json.dumps(row) + "\n")
                f.flush()

            yield write
    except OSError as e:
        if is_disk_error(e):
            raise disk_error(e, path) from e
        raise


def _state(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, run: str, step: int) -> dict[str, Any]:
    moments = {
        str(i): {k: optimizer.state[p].get(k, torch.zeros_like(p)) for k in ("exp_avg", "exp_avg_sq")}
        for i, p in enumerate(parameters)
    }
    return {
        "step": torch.tensor(step),
        "run": torch.tensor(list(bytes.fromhex(run)), dtype=torch.uint8),
        "parameters": {str(i): p.detach() for i, p in enumerate(parameters)},
        "moments": moments,
    }


def _save(out: Path, run: str, step: int, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    with uninterrupted():
        checkpoint.save(_state(parameters, optimizer, run, step), out)


def _restore(out: Path, run: str, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint in `out` into parameters and optimizer; the number of steps it has done, 0 without one."""
    found = checkpoint.find(out)
    if found is None:
        return 0
    header = {"run": torch.zeros(32, dtype=torch.uint8)}
    checkpoint.load(header, found)
    if bytes(header["run"].tolist()).hex() != run:
        raise InputError(
            "holds the checkpoint of a run with other settings", where=out, fix="choose another -o, or --force"
        )
    state = _state(parameters, optimizer, run, 0)
    checkpoint.load(state, found)
    step = int(state["step"])
    for i, p in enumerate(parameters):
        # `parameters` were filled in place; the optimizer starts empty and takes the moments as they are.
        optimizer.state[p] = {**state["moments"][str(i)], "step": torch.tensor(float(step))}
    return step
