"""Direct preference optimisation (Rafailov et al. 2023, equation 7; LLaVA-Hound-DPO, which LongVA-DPO follows).

Of two answers to one prompt the preferred one shall gain probability over the other, relative to the model that
training started from: `-log sigmoid(beta * ((log p - log p0)(chosen) - (log p - log p0)(rejected)))`, where a
log-probability is the sum over the answer's tokens and its end of turn. The starting model's are computed once and kept
in a row log, so there is never a second model in memory.

Shapes: M pairs, T tokens of all their answers (chosen, rejected, chosen, ...), E language-model width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lvctx.artifacts.result_log import ResultLog
from lvctx.dist.context import ParallelContext
from lvctx.dist.fsdp import keep_in_graph
from lvctx.model.loss import token_loss
from lvctx.train.micro import Forward, Sample, pack_samples

REFERENCE = "reference.jsonl"
"""In the output: the starting model's log-probabilities, a row each pair."""


def log_probs(hidden_TE: Tensor, head_VE: Tensor, labels_T: Tensor, micro: Sequence[Sample]) -> Tensor:
    """Log-probabilities (M, 2), float32, nats: of each pair's chosen and rejected answer."""
    lengths = [len(s.ids) for sample in micro for s in sample.sequences]
    answers = zip(hidden_TE.split(lengths), labels_T.split(lengths), strict=True)
    sums = [-token_loss(hidden, head_VE, labels)[0] for hidden, labels in answers]
    return torch.stack(sums).view(-1, 2)


def preference_loss(ours_M2: Tensor, reference_M2: Tensor, beta: float) -> Tensor:
    """Summed loss over pairs, from log-probabilities of chosen and rejected answers."""
    gain_M2 = ours_M2 - reference_M2
    return -F.logsigmoid(beta * (gain_M2[:, 0] - gain_M2[:, 1])).sum()


class Preference:
    """The loss of a micro-batch of pairs, for `Forward`."""

    def __init__(self, reference: Mapping[int, tuple[float, float]], beta: float) -> None:
        """`reference`: number of a pair -> the starting model's log-probabilities."""
        self.reference, self.beta = reference, beta

    def __call__(
        self, hidden_TE: Tensor, head_VE: Tensor, labels_T: Tensor, micro: Sequence[Sample]
    ) -> tuple[Tensor, int]:
        """Summed loss, and the number of pairs."""
        ours_M2 = log_probs(hidden_TE, head_VE, labels_T, micro)
        total = preference_loss(ours_M2, ours_M2.new_tensor([self.reference[s.number] for s in micro]), self.beta)
        return keep_in_graph(total, hidden_TE, head_VE), len(micro)


def compute_reference(
    numbers: Iterable[int],
    *,
    sample: Callable[[int], Sample],
    forward: Forward,
    path: Path,
    made_of: Mapping[str, Any],
    micro_tokens: int,
    world: ParallelContext,
    report: Callable[[int, int, str], None],
) -> dict[int, tuple[float, float]]:
    """Log-probabilities of these pairs under the model as it is now, stored in `path` row by row.

    `made_of` is what decides them (the starting model and the data). Pairs that have a row are not computed again.
    Every rank must call it and computes its share. Raises InputError where `path` has rows of another run.
    """
    world.barrier()
    with ResultLog.open(path, made_of, shared=True) as log:
        keys = {number: f"{number}" for number in sorted(set(numbers))}
        # Rank 0 decides what is missing: another one may be ahead and have written already.
        missing = set(world.gather([number for number, key in keys.items() if key not in log])[0])
        done = len(keys) - len(missing)
        with torch.no_grad(), torch.autocast(torch.device(world.device).type, torch.bfloat16):
            # Pairs are read a window at a time: their order decides nothing, and not all fit in memory at once.
            window, order = 64 * world.dp, list(keys)
            for begin in range(0, len(order), window):
                numbers = order[begin : begin + window]
                if missing.isdisjoint(numbers):
                    continue
                # The same groups as in a run that was never stopped: what shares a forward decides the last bits.
                groups = pack_samples([sample(n) for n in numbers], micro_tokens)
                groups = [group for group in groups if any(one.number in missing for one in group)]
                for first in range(0, len(groups), world.dp):
                    # Ranks compute in step; one without a group of its own computes another's and keeps it to itself.
                    at = first + world.dp_rank
                    micro = groups[min(at, len(groups) - 1)]
                    found = forward(micro, log_probs).tolist()
                    for one, (chosen, rejected) in zip(micro, found, strict=True):
                        if at < len(groups) and one.number in missing:
                            log.append(keys[one.number], {"chosen": chosen, "rejected": rejected})
                    done += sum(one.number in missing for group in groups[first : first + world.dp] for one in group)
                    report(done, len(keys), "reference")
    if world.mesh is not None:
        # Without a backward the root's parameters would stay gathered: what is loaded into them now would not be seen.
        sharded: Any = forward
        sharded.reshard()
    world.barrier()
    with ResultLog.open(path, made_of, shared=True) as log:
        rows = {number: log.rows[key] for number, key in keys.items()}
    return {number: (row["chosen"], row["rejected"]) for number, row in rows.items()}
