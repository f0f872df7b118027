"""Selection of samples of several kinds, so that every kind and the long samples have their shares of the tokens.

GIRAFFE section 2.3: of the tokens 20% long text, 25% short images, 25% interleaved, 30% video, and 60% in samples
longer than 8K tokens; figure 3 has 0 to 80%. Both are shares of tokens: with shares of samples, 25% short images would
rule out 60%.

Suffixes: N samples of one kind.
"""

from collections.abc import Mapping
from math import ceil, inf

import numpy as np

from lvctx.data.row_packing import uniform
from lvctx.errors import InputError


def largest_blend(
    lengths: Mapping[str, np.ndarray], shares: Mapping[str, float], *, long_share: float | None, long_over: int
) -> int:
    """The largest number of tokens at which every kind and the long samples have their shares.

    `lengths` are each kind's samples in tokens (N,); without `long_share` only the kinds have shares. Raises InputError
    naming the kinds without long, or without short samples, if `long_share` cannot be reached at all.
    """
    long, short = _long_and_short(lengths, long_over)
    high = min(int((long[kind] + short[kind]) / share) for kind, share in shares.items() if share > 0)
    if long_share is None:
        return high
    for have, share, limit, name in (
        (long, long_share, "more than", "long"),
        (short, 1 - long_share, "at most", "short"),
    ):
        most = sum(shares[kind] for kind in shares if have[kind])
        if most < share - 1e-9:
            none = ", ".join(kind for kind in shares if shares[kind] and not have[kind])
            raise InputError(
                f"{share:.0%} of the tokens have to be in samples of {limit} {long_over:,}, but no sample of {none} "
                f"is that {name}, so at most {most:.0%} are possible",
                fix="add such samples, change --mix, --long-share or --long-over, or give --long-share any",
            )
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        missing = _missing(long, short, shares, middle, long_share)
        low, high = (middle, high) if max(missing) <= 1e-9 * middle else (low, middle - 1)
    return low


def describe_shortage(
    lengths: Mapping[str, np.ndarray],
    shares: Mapping[str, float],
    *,
    tokens: int,
    long_share: float | None,
    long_over: int,
) -> str:
    """The kinds that have too few tokens for `tokens` in total, with the number of missing tokens."""
    long, short = _long_and_short(lengths, long_over)
    missing = {kind: round(share * tokens) - long[kind] - short[kind] for kind, share in shares.items()}
    if lines := [f"{kind} is {n:,} tokens short" for kind, n in missing.items() if n > 0]:
        return ", ".join(lines)
    lines = []
    too_few = _missing(long, short, shares, tokens, long_share or 0.0)
    for have, n, name in zip((long, short), too_few, ("long", "short"), strict=True):
        if n > 0:
            kinds = ", ".join(kind for kind, share in shares.items() if have[kind] < share * tokens)
            lines.append(f"{kinds} lack {ceil(n):,} tokens in {name} samples")
    return ", ".join(lines)


def _long_and_short(lengths: Mapping[str, np.ndarray], over: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tokens of each kind in samples of more than `over` tokens, and in the others."""
    long = {kind: int(lengths_N[lengths_N > over].sum()) for kind, lengths_N in lengths.items()}
    return long, {kind: int(lengths_N.sum()) - long[kind] for kind, lengths_N in lengths.items()}


def _missing(
    long: Mapping[str, int], short: Mapping[str, int], shares: Mapping[str, float], tokens: int, long_share: float
) -> tuple[float, float]:
    """Tokens that long samples, and that short ones, lack for their shares of `tokens`."""
    reachable = [sum(min(share * tokens, have[kind]) for kind, share in shares.items()) for have in (long, short)]
    return long_share * tokens - reachable[0], (1 - long_share) * tokens - reachable[1]


def choose_samples(
    lengths: Mapping[str, np.ndarray],
    shares: Mapping[str, float],
    *,
    tokens: int,
    long_share: float | None,
    long_over: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Samples to take of each kind, ascending (int64), for `tokens` in total, which `largest_blend` must allow.

    Without `long_share`, long and short samples of a kind keep the proportions of its source; else every kind takes
    more, or fewer, long ones, each the same fraction of what is possible. A budget is filled with samples in an order
    drawn from `seed`, skipping those that no longer fit, so a kind falls short of it by less than a sample. Then short
    samples are taken in proportion to the long ones, so the long share is met to less than a short sample per kind.
    """
    all_long, all_short = _long_and_short(lengths, long_over)
    budget = {kind: share * tokens for kind, share in shares.items()}
    usual = {kind: budget[kind] * all_long[kind] / max(all_long[kind] + all_short[kind], 1) for kind in shares}
    target = sum(usual.values()) if long_share is None else long_share * tokens
    limits = {kind: max(0.0, budget[kind] - all_short[kind]) for kind in shares}
    if target > sum(usual.values()):
        limits = {kind: min(budget[kind], all_long[kind]) for kind in shares}
    room = sum(limits.values()) - sum(usual.values())
    part = min(1.0, (target - sum(usual.values())) / room) if room else 0.0
    for_long = {kind: usual[kind] + part * (limits[kind] - usual[kind]) for kind in shares}

    orders, selected, used = {}, {}, {}
    for number, kind in enumerate(shares):
        lengths_N = lengths[kind]
        order = np.argsort(uniform(seed + 1_000_003 * number, np.arange(len(lengths_N))), kind="stable")
        is_long = lengths_N[order] > long_over
        orders[kind] = order[~is_long]
        selected[kind] = _fill(order[is_long], lengths_N, for_long[kind])
        used[kind] = int(lengths_N[selected[kind]].sum())
    in_long = sum(used.values())
    scale = in_long / target if long_share else 1.0
    left = inf if long_share is None else scale * (tokens - target)
    # The second time the remaining tokens go to any kind that has room for them.
    for limit in ({kind: scale * (budget[kind] - for_long[kind]) for kind in shares}, dict.fromkeys(shares, inf)):
        for kind in shares:
            taken = set(selected[kind])
            order = np.array([n for n in orders[kind].tolist() if n not in taken], np.int64)
            short = _fill(order, lengths[kind], min(limit[kind], budget[kind] - used[kind], left))
            selected[kind] += short
            used[kind] += int(lengths[kind][short].sum())
            left -= int(lengths[kind][short].sum())
    return {kind: np.array(sorted(numbers), np.int64) for kind, numbers in selected.items()}


def _fill(order: np.ndarray, lengths: np.ndarray, budget: float) -> list[int]:
    selected, room = [], budget + 0.5  # budgets are products of floats, and an exact fill must fit
    for number in order.tolist():
        if lengths[number] <= room:
            selected.append(number)
            room -= int(lengths[number])
    return selected
