"""Whether context parallelism is exact here: one model, one row, one process and N; the loss and every gradient.

Both run in float32 on the same row, chosen so that everything hard is in it: a length that 2N does not divide, targets
that do not count, and documents that cross the shards' seams. The first run is torch's own attention with a plain mask.
"""

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from lvctx.dist import attention
from lvctx.dist.context import ParallelContext, joined, make_context, open_context, under_torchrun
from lvctx.errors import InputError
from lvctx.model.load import context_length, load_config, load_model, resolve_model
from lvctx.model.loss import IGNORED
from lvctx.train.rows import RowLoss, shard_row

TOLERANCE = 1e-5
"""Largest relative difference in float32; ring and full attention add up in different orders."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The differences between one process and N, with or without document masks."""

    doc_mask: bool
    """Whether tokens attended in their own document only."""
    loss: float
    """Relative difference of the summed loss."""
    gradient: float
    """Largest, over all parameters, of the difference's norm over the gradient's norm."""
    parameter: str
    """The parameter of that largest difference."""
    parameters: int
    """Number of parameters compared."""

    @property
    def exact(self) -> bool:
        """Within `TOLERANCE`. A difference that is not a number is not."""
        return self.loss <= TOLERANCE and self.gradient <= TOLERANCE


def diagnose(*, model: str, cp: int, length: int, device: str, seed: int) -> list[Finding]:
    """Compare one process with `cp` on a model's own weights; the findings, on every rank.

    Under torchrun its processes take part; alone, `cp` processes are started on the CPU. Raises InputError for a model
    that ring attention does not serve, UsageError where `cp` does not divide the processes.
    """
    path = resolve_model(model)
    config = load_config(path)
    attention.check_config(config.get_text_config(), where=path)
    if length > context_length(config):
        raise InputError(f"{length} tokens are more than its {context_length(config)}", where=path, fix="--length")
    if under_torchrun() or cp == 1:
        with open_context(device=device, cp=cp) as world:
            return _compare(path, world, length, seed)
    with tempfile.TemporaryDirectory() as folder:
        results = multiprocessing.get_context("spawn").SimpleQueue()
        try:
            multiprocessing.spawn(_one_of, args=(Path(folder), path, cp, length, seed, results), nprocs=cp)
        except multiprocessing.ProcessRaisedException as e:
            raise RuntimeError(str(e)) from e
        return [Finding(**row) for row in results.get()]


def _one_of(rank: int, folder: Path, path: Path, cp: int, length: int, seed: int, results: Any) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // cp))
    with joined(folder / "store", rank=rank, size=cp):
        found = _compare(path, make_context(device="cpu", cp=cp), length, seed)
    if rank == 0:
        results.put([asdict(f) for f in found])


def _compare(path: Path, world: ParallelContext, length: int, seed: int) -> list[Finding]:
    attention.register()
    lm = load_model(path, dtype=torch.float32, device=world.device)
    row_loss = RowLoss(lm)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, lm.config.vocab_size, (1, length), generator=draw)
    seams = {0, 1, length // 3, length // 2, length - length // 5, length - 1}
    alone = ParallelContext(device=world.device)
    found = []
    for starts in (None, tuple(sorted(seams))):
        expected_loss, expected = _run(row_loss, alone, ids, starts, ring=False)
        loss, gradients = _run(row_loss, world, ids, starts, ring=True)
        (loss,) = world.sum([loss])
        loss /= world.dp
        worst, name = 0.0, ""
        for key, gradient in gradients.items():
            world.add_up(gradient)
            truth = expected[key]
            off = float((gradient / world.dp - truth).norm() / truth.norm().clamp_min(1e-30))
            if not off <= worst:
                worst, name = off, key
        found.append(
            Finding(
                doc_mask=starts is not None,
                loss=abs(loss - expected_loss) / abs(expected_loss),
                gradient=worst if math.isfinite(worst) else math.inf,
                parameter=name,
                parameters=len(gradients),
            )
        )
    return found


def _run(
    row_loss: RowLoss, world: ParallelContext, ids: Tensor, starts: tuple[int, ...] | None, *, ring: bool
) -> tuple[float, dict[str, Tensor]]:
    """Summed loss and gradients of this rank's part; every seventh target does not count."""
    lm = row_loss.lm
    lm.set_attn_implementation(attention.NAME if ring else "sdpa")
    lm.zero_grad(set_to_none=True)
    given = shard_row(ids, world, starts)
    given["labels"] = given["labels"].masked_fill(given["positions"] % 7 == 3, IGNORED)
    if not ring:
        given.pop("shard", None)
        if starts is not None:
            places = torch.arange(ids.shape[1])
            documents = torch.bucketize(places, torch.tensor(starts), right=True)
            sees = (documents[:, None] == documents) & (places[:, None] >= places)
            given["attention_mask"] = sees[None, None].to(world.device)
    total, _ = row_loss(**given)
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
