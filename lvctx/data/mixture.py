"""Shares of sources (SlimPajama's, a file's, or the input's), and the token budgets that follow from them.

LongVA section 3.1 and Fu et al. 2024 (arXiv 2402.10171): long documents are upsampled inside each source while every
source keeps its share, because the mix of domains matters as much as the lengths.
"""

from collections.abc import Mapping
from pathlib import Path

from lvctx.artifacts.bounded import read_toml
from lvctx.artifacts.store import read_json
from lvctx.errors import InputError

SLIMPAJAMA = {
    "RedPajamaC4": 0.26610,
    "RedPajamaCommonCrawl": 0.53375,
    "RedPajamaStackExchange": 0.03170,
    "RedPajamaWikipedia": 0.03402,
    "RedPajamaGithub": 0.05005,
    "RedPajamaArXiv": 0.04290,
    "RedPajamaBook": 0.04148,
}
"""Token shares of SlimPajama-627B, under the names of its `meta.redpajama_set_name`."""

AUTO, KEEP, NONE = "auto", "keep", "none"
"""`auto`: SlimPajama's shares if documents have a source, else none; `keep`: the input's own; `none`: no budgets."""


def load_mix(mix: str) -> dict[str, float] | str:
    """Shares from a name or a TOML/JSON file `{source: weight}`, normalised to sum 1; AUTO, KEEP and NONE unchanged.

    Raises InputError for an unreadable file or invalid weights.
    """
    if mix in (AUTO, KEEP, NONE):
        return mix
    if mix == "slimpajama":
        return dict(SLIMPAJAMA)
    path = Path(mix)
    try:
        table = read_json(path) if path.suffix == ".json" else read_toml(path)
    except InputError as e:
        raise InputError(e.what, where=mix, fix=e.fix or "--mix takes auto, keep, none, slimpajama or a file") from e
    if not table:
        raise InputError("the file has no shares", where=mix, fix='write lines such as "RedPajamaBook" = 0.04')
    for source, weight in table.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise InputError(f"the share of {source!r} is {weight!r}", where=mix, fix="give a number of at least 0")
    total = sum(table.values())
    if total <= 0:
        raise InputError("the shares sum to 0", where=mix)
    return {source: weight / total for source, weight in table.items()}


def apportion(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole tokens per source that sum to `total`: each share rounded down, the rest to the largest remainders."""
    exact = {source: total * share for source, share in shares.items()}
    budgets = {source: int(value) for source, value in exact.items()}
    by_remainder = sorted(exact, key=lambda s: (budgets[s] - exact[s], s))
    for source in by_remainder[: total - sum(budgets.values())]:
        budgets[source] += 1
    return budgets


def largest_total(available: Mapping[str, int], shares: Mapping[str, float]) -> tuple[int, str]:
    """The largest number of tokens at which every source still reaches its share, and the source that limits it."""
    limits = {source: int(available.get(source, 0) / share) for source, share in shares.items() if share > 0}
    scarce = min(limits, key=lambda s: (limits[s], s))
    total = limits[scarce]
    while total and any(b > available.get(s, 0) for s, b in apportion(total, shares).items()):
        total -= 1
    return total, scarce


def check_budgets(budgets: Mapping[str, int], available: Mapping[str, int], shares: Mapping[str, float]) -> None:
    """Raise InputError naming every source with fewer tokens than its budget, by how many, and the largest total."""
    short = {s: b - available.get(s, 0) for s, b in budgets.items() if b > available.get(s, 0)}
    if short:
        lines = ", ".join(f"{s} needs {budgets[s]} and has {budgets[s] - n}: {n} short" for s, n in short.items())
        total, _ = largest_total(available, shares)
        fix = f"--tokens {total} is the most this mix allows" if total else "change --mix"
        raise InputError(f"the token budget cannot be met ({lines})", fix=f"{fix}, or raise --keep-short or add input")
