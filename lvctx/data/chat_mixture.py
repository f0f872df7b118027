"""Selection of samples of several kinds, so that every kind has its share and enough tokens are in long samples.

GIRAFFE section 2.3: of the tokens 20% long text, 25% short images, 25% interleaved, 30% video, and 60% or more in
samples longer than 8K tokens. Both are shares of tokens: with shares of samples, 25% short images would rule out 60%.

Suffixes: N samples of one kind.
"""

from collections.abc import Mapping

import numpy as np

from lvctx.data.row_packing import uniform
from lvctx.errors import InputError


def largest_blend(
    lengths: Mapping[str, np.ndarray], shares: Mapping[str, float], *, long_share: float, long_over: int
) -> int:
    """The largest number of tokens at which every kind and the long samples still reach their shares.

    `lengths` are each kind's samples in tokens (N,). Raises InputError if long samples cannot reach theirs at all.
    """
    total = {kind: int(lengths_N.sum()) for kind, lengths_N in lengths.items()}
    long = {kind: int(lengths_N[lengths_N > long_over].sum()) for kind, lengths_N in lengths.items()}
    most = sum(shares[kind] for kind in shares if long[kind])
    if most < long_share - 1e-9:
        none = ", ".join(kind for kind in shares if not long[kind])
        raise InputError(
            f"{long_share:.0%} of the tokens have to be in samples of more than {long_over:,}, but no sample of {none} "
            f"is that long, so at most {most:.0%} are possible",
            fix="give longer samples, change --mix, or lower --long-share or --long-over",
        )
    high = min(int(total[kind] / share) for kind, share in shares.items() if share > 0)
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        reachable = sum(min(share * middle, long[kind]) for kind, share in shares.items())
        low, high = (middle, high) if reachable >= long_share * middle * (1 - 1e-12) else (low, middle - 1)
    return low


def choose_samples(
    lengths: Mapping[str, np.ndarray],
    shares: Mapping[str, float],
    *,
    tokens: int,
    long_share: float,
    long_over: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Samples to take of each kind, ascending (int64), for `tokens` in total, which `largest_blend` must allow.

    In a kind, long and short samples keep the proportions of the source if enough are long; otherwise every kind
    takes more of its long ones, each the same fraction of what is possible. A budget is filled with samples in an order
    drawn from `seed`, skipping those that no longer fit, so a kind falls short of it by less than a sample; if long
    samples then miss their share, short ones are removed.
    """
    budget, long, usual, most = {}, {}, {}, {}
    for kind, share in shares.items():
        lengths_N = lengths[kind]
        long[kind] = lengths_N > long_over
        budget[kind] = share * tokens
        in_long = float(lengths_N[long[kind]].sum())
        usual[kind] = budget[kind] * in_long / max(float(lengths_N.sum()), 1.0)
        most[kind] = min(budget[kind], in_long)
    missing, room = long_share * tokens - sum(usual.values()), sum(most.values()) - sum(usual.values())
    part = min(1.0, max(0.0, missing / room)) if room > 0 else 0.0
    selected: dict[str, set[int]] = {}
    short: dict[str, list[int]] = {}
    for number, kind in enumerate(shares):
        lengths_N = lengths[kind]
        order = np.argsort(uniform(seed + 1_000_003 * number, np.arange(len(lengths_N))), kind="stable")
        for_long = usual[kind] + part * (most[kind] - usual[kind])
        first = _fill(order[long[kind][order]], lengths_N, for_long)
        rest = _fill(order[~long[kind][order]], lengths_N, budget[kind] - int(lengths_N[first].sum()))
        selected[kind] = {*first, *rest}
        short[kind] = rest
    selected_tokens = {kind: int(lengths[kind][sorted(numbers)].sum()) for kind, numbers in selected.items()}
    in_long = sum(selected_tokens.values()) - sum(int(lengths[kind][numbers].sum()) for kind, numbers in short.items())
    while in_long < long_share * sum(selected_tokens.values()) and any(short.values()):
        kind = max((k for k in short if short[k]), key=lambda k: selected_tokens[k] / budget[k])
        number = short[kind].pop()
        selected[kind].remove(number)
        selected_tokens[kind] -= int(lengths[kind][number])
    return {kind: np.array(sorted(numbers), np.int64) for kind, numbers in selected.items()}


def _fill(order: np.ndarray, lengths: np.ndarray, budget: float) -> list[int]:
    selected, room = [], budget + 0.5  # budgets are products of floats, and an exact fill must fit
    for number in order.tolist():
        if lengths[number] <= room:
            selected.append(number)
            room -= int(lengths[number])
    return selected
