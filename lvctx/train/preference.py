"""Direct preference optimisation (Rafailov et al. 2023, equation 7; LLaVA-Hound-DPO, which LongVA-DPO follows).

Of two answers to one prompt the preferred one shall gain probability over the other, relative to the model that
training started from: `-log sigmoid(beta * ((log p - log p0)(chosen) - (log p - log p0)(rejected)))`, where a
log-probability is the sum over the answer's tokens and its end of turn. The starting model's are computed once and kept
in a row log, so there is never a second model in memory.

A row of the data is `{"prompt": TEXT, "chosen": TEXT, "rejected": TEXT, "image" or "images": PATH or [PATHS]}`, or
TRL's with lists of messages in their places; `conversations` in LLaVA's form, ending in a human turn, may stand in
place of `prompt`, and lists `chosen` and `rejected` may begin with the prompt. Files and turns are those of
`lvctx.train.samples`.

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
from lvctx.errors import InputError
from lvctx.model.loss import token_loss
from lvctx.train.chat import Conversation, conversation
from lvctx.train.micro import Forward, Sample, pack_samples
from lvctx.train.samples import check_object, check_row, first, read_checked, role_of

REFERENCE = "reference.jsonl"
"""In the output: the starting model's log-probabilities, a row each pair."""


def read_pairs(path: Path, images: Path) -> list[tuple[Conversation, Conversation]]:
    """Every row of a file or dataset of preferences, once ending in the chosen answer and once in the rejected one.

    Image paths are relative to `images`. Raises InputError naming file and row for what `read_conversations` refuses,
    and for answers that are no text, empty or the same.
    """

    def check(row: Any, where: str) -> tuple[Conversation, Conversation]:
        row = check_object(row, where)
        turns, *answers = _turns(row, where)
        if any(role_of(answer, where) != "assistant" for answer in answers):
            raise InputError("`chosen` or `rejected` does not end in the assistant's words", where=where)
        pair = [check_row({**row, "conversations": [*turns, answer], "messages": None}, where) for answer in answers]
        if len(pair[0].turns) < 2 or pair[0].turns[-2][0] != "user":
            raise InputError("the prompt does not end in a human turn", where=where)
        chosen, rejected = ([p.strip() if isinstance(p, str) else p for p in one.turns[-1][1]] for one in pair)
        if chosen == rejected:
            raise InputError("`chosen` and `rejected` are the same", where=where)
        return conversation(pair[0], images), conversation(pair[1], images)

    return read_checked(path, images, check)


def _turns(row: dict[str, Any], where: str) -> tuple[list[Any], Any, Any]:
    """The turns of a pair's prompt, and the turn of either answer, as the row has them."""
    prompts = [row[key] for key in ("prompt", "conversations") if row.get(key) is not None]
    if len(prompts) > 1:
        raise InputError("either `prompt` or `conversations` is wanted", where=where)
    answers = [_as_turns(row.get(key), "gpt") for key in ("chosen", "rejected")]
    if not all(answers):
        raise InputError("`chosen` and `rejected` have to be text that is not empty, or messages", where=where)
    inside = [answer[:-1] for answer in answers]
    if not prompts and not all(inside):
        raise InputError("either `prompt` or `conversations` is wanted", where=where)
    if inside[0] != inside[1]:
        raise InputError("`chosen` and `rejected` begin with different prompts", where=where)
    turns = _as_turns(row.get("prompt"), "human") or row.get("conversations") or inside[0]
    if not isinstance(turns, list) or not turns:
        raise InputError("no list of `conversations`, or text or messages in `prompt`", where=where)
    if inside[0] and not (turns == inside[0] or _last_text(turns) == _last_text(inside[0])):
        raise InputError("`chosen` begins with another prompt than the row's own", where=where)
    # Messages inside the answers may say more than a prompt of one text: what came before it.
    return inside[0] or turns, answers[0][-1], answers[1][-1]


def _as_turns(value: Any, role: str) -> list[Any]:
    """Text as a turn, a turn as a list of one; nothing for what is neither, or empty."""
    if isinstance(value, str):
        return [{"from": role, "value": value}] if value.strip() else []
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else []


def _last_text(turns: list[Any]) -> Any:
    return first(turns[-1], "value", "content") if isinstance(turns[-1], dict) else None


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
