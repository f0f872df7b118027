"""The training loop: batches by global step, one loss over all counted tokens, resumable at every step.

Trained parameters are float32; matrix products are computed in the context's type (autocast).
One process and many run the same code: see `parallel.context`.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lvctx.artifacts.jsonl_log import json_line, read_jsonl, write_jsonl
from lvctx.artifacts.store import disk_error, is_disk_error
from lvctx.errors import InputError, Stopped
from lvctx.parallel.checkpoint import Checkpoints
from lvctx.parallel.context import ParallelContext
from lvctx.parallel.fsdp import full_tensor
from lvctx.training.parallel_config import RunControl
from lvctx.training.schedule import rate
from lvctx.training.signals import agreed_stop, uninterrupted
from lvctx.training.task import MicroT, ParameterGroup, TrainingTask
from lvctx.training.throughput import measure, note

log = logging.getLogger(__name__)


def train(
    task: TrainingTask[MicroT], groups: Sequence[ParameterGroup], context: ParallelContext, control: RunControl
) -> list[dict[str, Any]]:
    """Run the task's optimizer steps and write metrics.jsonl and the checkpoint of the last step to `control.out`.

    Returns, on rank 0, the rows of metrics.jsonl: every step once, including those of earlier processes of this run.

    A checkpoint of another run than `task.provenance` is refused. On SIGTERM or Ctrl-C the last finished step is saved
    before the exception is raised on every rank. Raises InputError on every rank if a loss or the gradient is not
    finite, before the step is taken.
    """
    config, out = task.train_config, control.out
    parameters = [p for group in groups for p in group.parameters]
    optimizer = torch.optim.AdamW(
        [{"params": group.parameters, "lr": group.lr, "peak": group.lr} for group in groups],
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    checkpoints = Checkpoints(out, task.provenance, context)
    done = first = _restore(checkpoints, parameters, optimizer)

    def save(*, wait: bool) -> None:
        checkpoints.save(done, _state(parameters, optimizer, done), wait=wait)

    out.mkdir(parents=True, exist_ok=True)
    opened = _open_metrics(out / "metrics.jsonl", keep=first, writes=context.rank == 0)
    with opened as write, agreed_stop(context) as raise_if_stopped:
        try:
            for step in range(first, config.steps):
                began = time.monotonic()
                factor = rate(step, steps=config.steps, schedule=config.schedule, warmup=config.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                micro_batches = task.batches(step)
                row = _compute_gradients(task, step, micro_batches, parameters, out, context, raise_if_stopped)
                with uninterrupted():
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    done = step + 1
                    rates = [group["lr"] for group in optimizer.param_groups]
                    row["lr"] = {group.name: lr for group, lr in zip(groups, rates, strict=True)}
                    seconds = time.monotonic() - began
                    row |= measure(context, tokens=row["tokens"], seconds=seconds, flops=task.flops)
                    lengths = [n for micro in micro_batches if (n := task.longest(micro)) is not None]
                    if lengths:
                        row["longest_sample"] = max(lengths)
                    write(row)  # before any checkpoint has the step
                control.on_progress(done, config.steps, note(row))
                if context.rank == 0:
                    control.on_step(out, row)
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
    return read_jsonl(out / "metrics.jsonl") if context.rank == 0 else []


def _compute_gradients(
    task: TrainingTask[MicroT],
    step: int,
    micro_batches: Sequence[MicroT],
    parameters: Sequence[nn.Parameter],
    out: Path,
    context: ParallelContext,
    raise_if_stopped: Callable[[], None],
) -> dict[str, Any]:
    """Set the clipped gradient of the mean loss over all ranks' tokens in `parameters`; returns the first columns."""
    shared = _rank_micro_batches(micro_batches, context)
    total, tokens = _accumulate(shared, task.loss, context, raise_if_stopped)
    for p in parameters:
        if p.grad is not None:
            p.grad /= tokens / context.size  # sharded gradients are means over the ranks
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, task.train_config.clip)).item()
    mean = context.sum([total])[0] / tokens
    if not (math.isfinite(mean) and math.isfinite(norm)):
        _refuse(step, total, norm, [task.describe(micro) for micro, counts in shared if counts], out, context)
    return {"step": step + 1, "loss": mean, "tokens": tokens, "lr": {}, "norm": norm}


def _rank_micro_batches(micro_batches: Sequence[MicroT], context: ParallelContext) -> list[tuple[MicroT, bool]]:
    """This rank's micro-batches, and whether each counts.

    Ranks compute in step, so if the number is not divisible, some compute an extra one that does not count.
    """
    rounds = -(-len(micro_batches) // context.dp)
    numbers = [i * context.dp + context.dp_rank for i in range(rounds)]
    return [(micro_batches[i], True) if i < len(micro_batches) else (micro_batches[0], False) for i in numbers]


def _accumulate(
    micro_batches: Sequence[tuple[MicroT, bool]],
    loss: Callable[[MicroT], tuple[Tensor, int]],
    context: ParallelContext,
    raise_if_stopped: Callable[[], None],
) -> tuple[float, int]:
    """Backward through each micro-batch's summed loss: returns this rank's sum of losses and all ranks' counted tokens.

    The caller divides the gradients by the tokens.
    """
    total, tokens = 0.0, 0
    for micro, counts in micro_batches:
        raise_if_stopped()
        with context.autocast():
            value, count = loss(micro)
        (value if counts else value * 0).backward()
        if counts:
            total += value.item()
            tokens += count
    raise_if_stopped()
    tokens = round(context.sum([tokens])[0])
    assert tokens > 0, "a step without a counted token"
    return total, tokens


def _refuse(step: int, total: float, norm: float, samples: list[str], out: Path, context: ParallelContext) -> NoReturn:
    """Raise an error with every rank's information about a step whose loss or gradient is not finite."""
    losses = context.gather((total, samples))
    bad = [(r, t, s) for r, (t, s) in enumerate(losses) if not math.isfinite(t)]
    # Gradients are summed over ranks, so with finite losses any sample of the step may be the cause.
    ranks = [f"rank {r}: loss {t} on {', '.join(s)}" for r, t, s in bad]
    ranks = ranks or [f"loss {sum(t for t, _ in losses)} on {', '.join(s for _, part in losses for s in part)}"]
    raise InputError(
        f"step {step}: {'; '.join(ranks)}; gradient norm {norm}",
        where=out,
        fix="lower --lr, or leave out these samples",
    )


@contextmanager
def _open_metrics(path: Path, *, keep: int, writes: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Append rows to metrics.jsonl, each durable immediately, after dropping those past step `keep`.

    An interrupted run leaves such rows, and repeats their steps. One rank writes; others discard theirs.
    """
    if not writes:
        yield lambda row: None
        return
    rows = read_jsonl(path) if path.exists() else []
    rows_by_step = {row["step"]: row for row in rows if isinstance(row.get("step"), int) and row["step"] <= keep}
    if len(rows_by_step) < keep:
        log.warning("%s: %d of the %d steps done so far are missing", path, keep - len(rows_by_step), keep)
    write_jsonl(path, rows_by_step.values())
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
    """Load the newest checkpoint into parameters and optimizer; returns its number of steps, 0 without one."""
    if checkpoints.saved is None:
        return 0
    state = _state(parameters, optimizer, 0)
    checkpoints.load(state)
    step = int(state["step"])
    for i, p in enumerate(parameters):
        # `parameters` were filled in place; the optimizer starts empty and takes over the loaded moments.
        optimizer.state[p] = {**state["moments"][str(i)], "step": torch.tensor(float(step), device=p.device)}
    return step
