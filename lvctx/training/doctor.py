"""Checks that context parallelism is exact: the loss and every gradient of one row, on one process and on N.

Both run in float32. The row has every difficult case: a length that is not a multiple of 2N, targets without a loss,
and documents that cross the boundaries of the shards. The run on one process is torch's own attention with a mask.
"""

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from lvctx.errors import InputError
from lvctx.models.loading import context_length, load_config, load_model, resolve_model
from lvctx.models.loss import IGNORED
from lvctx.parallel import hf_attention
from lvctx.parallel.context import ParallelContext, joined, make_context, open_context, under_torchrun
from lvctx.parallel.ring_attention import Ring
from lvctx.training.doctor_config import DoctorConfig
from lvctx.training.text_rows import RowLoss, shard_row

GRADIENT_TOLERANCE = 1e-5
"""Largest relative difference in float32; several processes sum in another order than one."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The differences between one process and N, with or without document masks."""

    doc_mask: bool
    """Whether tokens attended within their own document only."""
    loss: float
    """Relative difference of the summed loss."""
    gradient: float
    """Largest ratio of the difference's norm to the gradient's norm over all parameters."""
    parameter: str
    """The parameter of that largest difference."""
    parameters: int
    """Number of parameters compared."""

    @property
    def exact(self) -> bool:
        """Whether the differences are within `GRADIENT_TOLERANCE`; NaN is not."""
        return self.loss <= GRADIENT_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE


def diagnose(config: DoctorConfig) -> list[Finding]:
    """Compare one process with `cp` processes on a model's own weights; returns the findings on every rank.

    Under torchrun its processes are used; otherwise `cp` processes are started on the CPU. Raises InputError for a
    model whose attention `cp_kind` does not support, UsageError if `cp` does not divide the number of processes.
    """
    path = resolve_model(config.model)
    model_config = load_config(path)
    cp, length = config.cp, config.length
    hf_attention.check_ring(model_config.get_text_config(), Ring(world=cp, kind=config.cp_kind), where=path)
    if length > (longest := context_length(model_config)):
        raise InputError(f"{length} tokens exceed its context of {longest}", where=path, fix="lower --length")
    if under_torchrun() or cp == 1:
        with open_context(device=config.device, cp=cp, cp_kind=config.cp_kind) as context:
            return _compare(path, context, config)
    with tempfile.TemporaryDirectory() as folder:
        results = multiprocessing.get_context("spawn").SimpleQueue()
        try:
            multiprocessing.spawn(_one_of, args=(Path(folder), path, config, results), nprocs=cp)
        except multiprocessing.ProcessRaisedException as e:
            raise RuntimeError(str(e)) from e
        return [Finding(**row) for row in results.get()]


def _one_of(rank: int, folder: Path, path: Path, config: DoctorConfig, results: Any) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // config.cp))
    with joined(folder / "store", rank=rank, size=config.cp):
        findings = _compare(path, make_context(device="cpu", cp=config.cp, cp_kind=config.cp_kind), config)
    if rank == 0:
        results.put([asdict(f) for f in findings])


def _compare(path: Path, context: ParallelContext, config: DoctorConfig) -> list[Finding]:
    lm, length = load_model(path, dtype=torch.float32, device=context.device), config.length
    row_loss = RowLoss(lm)
    draw = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(0, lm.config.vocab_size, (1, length), generator=draw)
    boundaries = {0, 1, length // 3, length // 2, length - length // 5, length - 1}
    single = ParallelContext(device=context.device)
    findings = []
    for starts in (None, tuple(sorted(boundaries))):
        expected_loss, expected = _run(row_loss, single, ids, starts, stock=True)
        loss, gradients = _run(row_loss, context, ids, starts, stock=False)
        (loss,) = context.sum([loss])
        loss /= context.dp
        worst, name = 0.0, ""
        for key, gradient in gradients.items():
            context.add_up(gradient)
            truth = expected[key]
            off = float((gradient / context.dp - truth).norm() / truth.norm().clamp_min(1e-30))
            if not off <= worst:
                worst, name = off, key
        findings.append(
            Finding(
                doc_mask=starts is not None,
                loss=abs(loss - expected_loss) / abs(expected_loss),
                gradient=worst if math.isfinite(worst) else math.inf,
                parameter=name,
                parameters=len(gradients),
            )
        )
    return findings


def document_mask(lm: Any, ids_BL: Tensor, starts: tuple[int, ...]) -> Any:
    """transformers' attention masks for a row of documents, which it detects by positions that begin again."""
    from transformers.masking_utils import create_masks_for_generate

    places = torch.arange(ids_BL.shape[1])
    begins = torch.tensor(starts)
    within_1L = (places - begins[torch.bucketize(places, begins, right=True) - 1])[None].to(ids_BL.device)
    return create_masks_for_generate(lm.config, lm.get_input_embeddings()(ids_BL), None, None, within_1L)


def _run(
    row_loss: RowLoss, context: ParallelContext, ids: Tensor, starts: tuple[int, ...] | None, *, stock: bool
) -> tuple[float, dict[str, Tensor]]:
    """Summed loss and gradients of this rank's part; every seventh target is not counted.

    With `stock` attention and its mask are those of transformers.
    """
    lm = row_loss.lm
    lm.zero_grad(set_to_none=True)
    inputs = shard_row(ids, context, starts)
    inputs["labels"] = inputs["labels"].masked_fill(inputs["positions"] % 7 == 3, IGNORED)
    if stock:
        lm.set_attn_implementation("sdpa")
        inputs.pop("shard", None)
        if starts is not None:
            inputs["attention_mask"] = document_mask(lm, inputs["ids"], starts)
    else:
        hf_attention.use(lm.get_decoder(), where=lm.config.name_or_path, ring=context.ring)
    total, _ = row_loss(**inputs)
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
