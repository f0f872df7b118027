"""The training loop: batches by global step, one loss over all counted tokens, resumable at every step.

Trained parameters are kept in float32 and computed with in bfloat16 (autocast); frozen ones stay as they were loaded.
One process and many run the same lines: see `dist.context`.
"""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lvctx.artifacts.jsonl_log import json_line, read_jsonl, write_jsonl
from lvctx.artifacts.manifest import Provenance
from lvctx.artifacts.store import disk_error, is_disk_error
from lvctx.dist.checkpoint import Checkpoints
from lvctx.dist.context import ParallelContext
from lvctx.dist.fsdp import full_tensor
from lvctx.errors import InputError, Stopped
from lvctx.train.meter import measure, note
from lvctx.train.schedule import Schedule, rate

log = logging.getLogger(__name__)


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
    run: Provenance,
    report: Callable[[int, int, str], None],
    world: ParallelContext,
    name: Callable[[Any], str] = str,
    longest: Callable[[Any], int] | None = None,
    flops: float | None = None,
) -> list[dict[str, Any]]:
    """Take `config.steps` optimizer steps and leave `out/metrics.jsonl` and the checkpoint of the last step.

    Returns, on rank 0, the rows of metrics.jsonl: every step once, also those of earlier processes of this run. What a
    manifest says of all steps is counted there.

    `batch(step)` gives the micro-batches of a global step, of which each data-parallel group takes its share; it must
    depend on the step alone. `loss(micro_batch)` gives the summed loss and the number of counted tokens, of this rank's
    part where ranks share a sample; `name(micro_batch)` says which samples it holds and `longest(micro_batch)` how
    many tokens the longest of them has; `flops` are a step's operations, where they are known. `run` identifies the
    run: a checkpoint of another is refused. On SIGTERM or Ctrl-C the last finished step is saved before the exception
    goes on, on every rank. Raises InputError on every rank when a loss or the gradient is not finite, before the step
    is taken.
    """
    parameters = [p for g in groups for p in g.parameters]
    optimizer = torch.optim.AdamW(
        [{"params": list(g.parameters), "lr": g.lr, "peak": g.lr} for g in groups],
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    checkpoints = Checkpoints(out, run, world)
    done = first = _restore(checkpoints, parameters, optimizer)

    def save(*, wait: bool) -> None:
        checkpoints.save(done, _state(parameters, optimizer, done), wait=wait)

    out.mkdir(parents=True, exist_ok=True)
    with _open_metrics(out / "metrics.jsonl", keep=first, speak=world.rank == 0) as write, _stop(world) as stopped:
        try:
            for step in range(first, config.steps):
                began = time.monotonic()
                factor = rate(step, steps=config.steps, schedule=config.schedule, warmup=config.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                micro_batches = batch(step)
                mine = _share(micro_batches, world)
                total, tokens = _accumulate(mine, loss, world, stopped)
                for p in parameters:
                    if p.grad is not None:
                        p.grad /= tokens / world.size  # sharded gradients are means over the ranks
                norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, config.clip)).item()
                sums = world.sum([total])
                mean = sums[0] / tokens
                if not (math.isfinite(mean) and math.isfinite(norm)):
                    _refuse(step, total, norm, [name(micro) for micro, counts in mine if counts], out, world)
                with uninterrupted():
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    done = step + 1
                    lr = {g.name: pg["lr"] for g, pg in zip(groups, optimizer.param_groups, strict=True)}
                    took = measure(world, tokens=tokens, seconds=time.monotonic() - began, flops=flops)
                    row = {"step": done, "loss": mean, "tokens": tokens, "lr": lr, "norm": norm, **took}
                    if longest is not None:
                        row["longest_sample"] = max(longest(micro) for micro in micro_batches)
                    write(row)  # before any checkpoint has the step
                report(done, config.steps, note(row))
                with uninterrupted():
                    checkpoints.poll()
                    if done % config.save_every == 0 and done < config.steps:
                        save(wait=False)
            with uninterrupted():
                save(wait=True)
        except (Stopped, KeyboardInterrupt):
            with uninterrupted():
                if done:
                    save(wait=True)
            raise
    return read_jsonl(out / "metrics.jsonl") if world.rank == 0 else []


def _share(micro_batches: Sequence[Any], world: ParallelContext) -> list[tuple[Any, bool]]:
    """This rank's micro-batches, and whether each counts.

    Ranks compute in step, so where the number does not divide, some compute one more that does not count.
    """
    rounds = -(-len(micro_batches) // world.dp)
    places = [i * world.dp + world.dp_rank for i in range(rounds)]
    return [(micro_batches[i], True) if i < len(micro_batches) else (micro_batches[0], False) for i in places]


def _accumulate(
    micro_batches: Sequence[tuple[Any, bool]],
    loss: Callable[[Any], tuple[Tensor, int]],
    world: ParallelContext,
    stopped: Callable[[], None],
) -> tuple[float, int]:
    """Backward through each micro-batch's summed loss: this rank's sum of losses and all ranks' counted tokens.

    The caller divides the gradients by the tokens.
    """
    total, tokens = 0.0, 0
    for micro, counts in micro_batches:
        stopped()
        with torch.autocast(torch.device(world.device).type, torch.bfloat16):
            value, count = loss(micro)
        (value if counts else value * 0).backward()
        if counts:
            total += value.item()
            tokens += count
    stopped()
    tokens = round(world.sum([tokens])[0])
    assert tokens > 0, "a step without a counted token"
    return total, tokens


def _refuse(step: int, total: float, norm: float, samples: list[str], out: Path, world: ParallelContext) -> NoReturn:
    """Raise what every rank knows of a step whose loss or gradient is not finite."""
    found = world.gather((total, samples))
    bad = [(r, t, s) for r, (t, s) in enumerate(found) if not math.isfinite(t)]
    # A gradient is summed over ranks as it comes: where the losses are finite, any sample of the step may be the one.
    ranks = [f"rank {r}: loss {t} on {', '.join(s)}" for r, t, s in bad]
    ranks = ranks or [f"loss {sum(t for t, _ in found)} on {', '.join(s for _, s in found for s in s)}"]
    raise InputError(
        f"step {step}: {'; '.join(ranks)}; gradient norm {norm}",
        where=out,
        fix="lower --lr, or leave these samples out",
    )


@contextmanager
def _stop(world: ParallelContext) -> Iterator[Callable[[], None]]:
    """A function that raises on every rank once a signal has come to any of them.

    Alone, a signal raises by itself, wherever it finds the process. Among others that would leave them waiting, so
    there it is only noted, and told to all where the function is called.
    """
    if world.size == 1:
        yield lambda: None
        return
    with _held() as held:

        def stopped() -> None:
            number = int(world.max(max(held, default=0)))
            if number:
                held.clear()
                raise Stopped if number == signal.SIGTERM else KeyboardInterrupt

        yield stopped
        stopped()


@contextmanager
def _held() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C are put in a list instead of raised; those left in it at the end are raised then.

    Blocking them in this thread would not do: another thread takes the signal and Python still runs the handler here.
    """
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield held  # handlers only ever run in the main thread
        return
    previous = {s: signal.signal(s, lambda number, frame: held.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield held
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)
    for number in held[:1]:
        signal.raise_signal(number)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGTERM and Ctrl-C back while parameters, moments and step count are being changed together."""
    with _held():
        yield


@contextmanager
def _open_metrics(path: Path, *, keep: int, speak: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Append rows to metrics.jsonl, each durable at once, after dropping those past step `keep`.

    An interrupted run leaves such rows, and their steps are done again. One rank speaks; the others' rows go nowhere.
    """
    if not speak:
        yield lambda row: None
        return
    rows = read_jsonl(path) if path.exists() else []
    kept = {row["step"]: row for row in rows if isinstance(row.get("step"), int) and row["step"] <= keep}
    if len(kept) < keep:
        log.warning("%s: %d of the %d steps done so far are missing", path, keep - len(kept), keep)
    write_jsonl(path, kept.values())
    try:
        with open(path, "a", encoding="utf-8") as f:

            def write(row: dict[str, Any]) -> None:
                f.write(json_line(row))
                f.flush()
                os.fsync(f.fileno())

            yield write
    except OSError as e:
        if is_disk_error(e):
            raise disk_error(e, path) from e
        raise


def _state(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    moments = {
        str(i): {k: optimizer.state[p].get(k, torch.zeros_like(p)) for k in ("exp_avg", "exp_avg_sq")}
        for i, p in enumerate(parameters)
    }
    return {
        "step": torch.tensor(step),
        "parameters": {str(i): p.detach() for i, p in enumerate(parameters)},
        "moments": moments,
    }


def _restore(checkpoints: Checkpoints, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint into parameters and optimizer; the number of steps it has done, 0 without one."""
    if checkpoints.saved is None:
        return 0
    state = _state(parameters, optimizer, 0)
    checkpoints.load(state)
    step = int(state["step"])
    for i, p in enumerate(parameters):
        # `parameters` were filled in place; the optimizer starts empty and takes the moments as they are.
        optimizer.state[p] = {**state["moments"][str(i)], "step": torch.tensor(float(step), device=p.device)}
    return step
