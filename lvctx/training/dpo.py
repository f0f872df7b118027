"""Direct preference optimisation (Rafailov et al. 2023, equation 7; LLaVA-Hound-DPO, which LongVA-DPO follows).

Training raises the probability of the preferred answer relative to the other one, compared with the model that training
starts from: `-log sigmoid(beta * ((log p - log p0)(chosen) - (log p - log p0)(rejected)))`, where a log-probability is
the sum over the answer's tokens and its end of turn. The starting model's log-probabilities are computed once and kept
in a row log, so there is never a second model in memory.

Shapes: M pairs, T tokens of all their answers (chosen, rejected, chosen, ...), E language-model width, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lvctx.artifacts.result_log import ResultLog, read_results
from lvctx.config import OnProgress
from lvctx.models.loss import token_loss
from lvctx.parallel.fsdp import keep_in_graph
from lvctx.training.align import AlignTask
from lvctx.training.align_job import AlignJob
from lvctx.training.batching import Sample, pack_samples
from lvctx.training.schedule import Schedule

REFERENCE = "reference.jsonl"
"""File in the output with the starting model's log-probabilities, one row per pair."""
Reference = Mapping[int, tuple[float, float]]
"""Number of a pair -> the starting model's log-probabilities of its chosen and its rejected answer."""


def log_probs(hidden_TE: Tensor, head_VE: Tensor, labels_T: Tensor, micro: Sequence[Sample]) -> Tensor:
    """Log-probabilities (M, 2) of each pair's chosen and rejected answer, float32, in nats."""
    lengths = [len(s.ids) for sample in micro for s in sample.sequences]
    answers = zip(hidden_TE.split(lengths), labels_T.split(lengths), strict=True)
    # Recomputed in the backward pass if the head is trained: otherwise every answer would hold a gradient of it.
    recompute = torch.is_grad_enabled() and head_VE.requires_grad
    loss = partial(checkpoint, token_loss, use_reentrant=True) if recompute else token_loss
    sums = [-loss(hidden, head_VE, labels)[0] for hidden, labels in answers]
    return torch.stack(sums).view(-1, 2)


def preference_loss(ours_M2: Tensor, reference_M2: Tensor, beta: float) -> Tensor:
    """Summed loss over pairs, from log-probabilities of chosen and rejected answers."""
    gain_M2 = ours_M2 - reference_M2
    return -F.logsigmoid(beta * (gain_M2[:, 0] - gain_M2[:, 1])).sum()


def reference_loss(
    hidden_TE: Tensor, head_VE: Tensor, labels_T: Tensor, micro: Sequence[Sample], *, reference: Reference, beta: float
) -> tuple[Tensor, int]:
    """Summed loss of a micro-batch of pairs, and their number; a `LossFn` once `reference` and `beta` are bound."""
    ours_M2 = log_probs(hidden_TE, head_VE, labels_T, micro)
    total = preference_loss(ours_M2, ours_M2.new_tensor([reference[s.number] for s in micro]), beta)
    return keep_in_graph(total, hidden_TE, head_VE), len(micro)


class DpoTask(AlignTask):
    """DPO on an aligned model; samples are pairs."""

    schedule: Schedule = "linear"

    def clear(self, out: Path) -> None:
        """Remove the starting model's log-probabilities."""
        (out / REFERENCE).unlink(missing_ok=True)

    def before_steps(self, out: Path, on_progress: OnProgress) -> None:
        """Compute the starting model's log-probabilities of all pairs used in training."""
        numbers = {number for step in range(self.train_config.steps) for number in self.sample_numbers(step)}
        reference = self.compute_reference(sorted(numbers), out / REFERENCE, on_progress)
        assert self.config.beta is not None
        self.loss_fn = partial(reference_loss, reference=reference, beta=self.config.beta)

    def compute_reference(self, numbers: Sequence[int], path: Path, on_progress: OnProgress) -> Reference:
        """Log-probabilities of these pairs under the current model, stored in `path` row by row.

        Pairs that have a row are not computed again. Every rank must call it and computes its share. Raises InputError
        if `path` has rows of another run.
        """
        context, made_of = self.context, _reference_made_of(self.job)
        keys = {number: str(number) for number in numbers}
        context.barrier()
        with ResultLog.open(path, made_of, shared=True) as log:
            # Rank 0 decides what is missing: a faster rank may already have written rows.
            missing = set(context.gather([number for number, key in keys.items() if key not in log])[0])
            done = len(keys) - len(missing)
            with torch.no_grad(), context.autocast():
                for groups in self._windows(numbers, missing):
                    # Ranks compute in step; a rank without its own batch computes another's and discards the result.
                    micro = groups[min(context.dp_rank, len(groups) - 1)]
                    values = self.forward(micro, log_probs).tolist()
                    for sample, (chosen, rejected) in zip(micro, values, strict=True):
                        if context.dp_rank < len(groups) and sample.number in missing:
                            log.append(keys[sample.number], {"chosen": chosen, "rejected": rejected})
                    done += sum(sample.number in missing for group in groups for sample in group)
                    on_progress(done, len(keys), "reference")
        if context.mesh is not None:
            # Without a backward the root's parameters would stay gathered, and weights loaded now would be lost.
            sharded: Any = self.forward
            sharded.reshard()
        context.barrier()
        stored = {row["key"]: row for row in read_results(path).values()}
        rows = {number: stored[key] for number, key in keys.items()}
        return {number: (row["chosen"], row["rejected"]) for number, row in rows.items()}

    def _windows(self, numbers: Sequence[int], missing: set[int]) -> Iterator[list[list[Sample]]]:
        """Micro-batches with a missing pair, one for each data-parallel group at a time.

        Pairs are read in windows: their order does not affect the result, and not all fit in memory at once.
        """
        dp = self.context.dp
        window = 64 * dp
        for begin in range(0, len(numbers), window):
            part = numbers[begin : begin + window]
            if missing.isdisjoint(part):
                continue
            # The same micro-batches as in an uninterrupted run, since samples that share a forward affect rounding.
            groups = pack_samples([self.sample(number) for number in part], self.micro_tokens)
            groups = [group for group in groups if any(sample.number in missing for sample in group)]
            yield from (groups[first : first + dp] for first in range(0, len(groups), dp))


def _reference_made_of(job: AlignJob) -> dict[str, Any]:
    """The values that decide the starting model's log-probabilities."""
    names = ("image_encoding", "unires_rule", "max_grids", "max_length", "frames", "fps")
    encoding = {name: getattr(job.config, name) for name in names}
    return {**{name: value[:16] for name, value in job.provenance.inputs.items()}, **encoding}


def align_task(job: AlignJob) -> AlignTask:
    """The training of a checked alignment."""
    return DpoTask(job) if job.config.stage == "dpo" else AlignTask(job)
