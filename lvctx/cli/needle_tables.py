"""Tables of needle tests: accuracy by length, a column per run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from lvctx.config import Flag

if TYPE_CHECKING:
    from lvctx.eval.niah.results import NeedleResults

Threshold = Annotated[float, Flag(min=0, max=1)]


def print_tables(results: "Sequence[NeedleResults]", *, threshold: float, stderr: bool) -> None:
    """A table for text and one for video: a row per length, a column per run, then mean and effective length."""
    from rich.console import Console
    from rich.table import Table

    for modality in ("text", "video"):
        chosen = [result for result in results if result.modality == modality]
        if not chosen:
            continue
        tokens = {n: t for result in chosen for n, t in zip(result.lengths, result.tokens, strict=True)}
        guessing = f", {chosen[0].guessing}" if chosen[0].guessing else ""
        table = Table(title=f"{modality}: accuracy{guessing}", title_justify="left")
        for name in (
            chosen[0].unit,
            *(("tokens",) if modality == "video" else ()),
            *(result.name for result in chosen),
        ):
            table.add_column(name, justify="right")
        for n in sorted(tokens):
            shares = [
                _share(result.by_length(result.lengths.index(n)) if n in result.lengths else None) for result in chosen
            ]
            table.add_row(f"{n:,}", *((f"{tokens[n]:,}",) if modality == "video" else ()), *shares)
        table.add_section()
        lead = ("",) if modality == "video" else ()
        intervals = [result.interval for result in chosen]
        table.add_row("mean", *lead, *(_share(result.mean) for result in chosen))
        if any(result.mean_share not in (None, result.mean) for result in chosen):
            table.add_row("mean share found", *lead, *(_share(result.mean_share) for result in chosen))
        for part in ("caption", "qa", "both") if any(result.pairs for result in chosen) else ():
            table.add_row(part, *lead, *(_share(result.pair_mean(part)) for result in chosen))
        table.add_row("95 %", *lead, *("–" if i is None else f"{i[0]:.2f} to {i[1]:.2f}" for i in intervals))
        table.add_row(f"effective at {threshold:g}", *lead, *(_effective(result, threshold) for result in chosen))
        Console(stderr=stderr).print(table)


def _effective(results: "NeedleResults", threshold: float) -> str:
    i = results.effective(threshold)
    if i is None:
        return f"< {results.lengths[0]:,}"
    return f"{'≥ ' if i == len(results.lengths) - 1 else ''}{results.lengths[i]:,}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
