"""Tables on a terminal: scores and their differences, what a run cost, and accuracy of needle tests by length."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lvctx.cli.output import emit, wants_json
from lvctx.config import Flag

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lvctx.eval.niah.results import NeedleResults

Threshold = Annotated[float, Flag(min=0, max=1)]
Detect = Annotated[float, Flag(min=0.1, max=100, metavar="POINTS")]
"""A difference between two models, in points."""


def open_console(*, stderr: bool = False, width: int | None = None) -> "Console":
    """A console without markup: names and groups are external text, so [x] and :x: are printed as they are."""
    from rich.console import Console

    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def number_table(first: str, columns: Iterable[str], title: str | None = None) -> "Table":
    """A table without lines: a column of names, then columns of numbers."""
    from rich.table import Table

    table = Table(first, title=title, title_justify="left", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def percent(value: float | None) -> str:
    """`61.2`, or a dash if nothing was counted."""
    return "–" if value is None else f"{100 * value:.1f}"


def interval(e: dict[str, Any]) -> str:
    """`58.9 to 63.5`, or a dash."""
    return "–" if e["low"] is None else f"{100 * e['low']:.1f} to {100 * e['high']:.1f}"


def estimate(e: dict[str, Any]) -> str:
    """`61.2 (58.9 to 63.5; n 2,700)`."""
    return f"{percent(e['mean'])} ({interval(e)}; n {e['counted']:,})"


def print_warnings(console: "Console", name: str, warnings: Iterable[str]) -> None:
    """Print what makes a run's results doubtful."""
    for warning in warnings:
        console.print(f"WARNING {name}: {warning}", style="bold red")


def print_heading(console: "Console", name: str, asked: str, result: dict[str, Any]) -> None:
    """Print a run's warnings, what it was asked, and the protocol that it followed, if it followed one."""
    from lvctx.eval.benchmarks.protocol import describe_protocol

    print_warnings(console, name, result["warnings"])
    left_out = f", {result['failed']:,} failed and left out" if result["failed"] else ""
    console.print(f"{name}: {asked}{left_out}")
    if "protocol" in result:
        console.print(f"protocol {describe_protocol(result['protocol'])}")


def print_sources(console: "Console", rules: Iterable[str]) -> None:
    """Print the scorer and version of each rule."""
    from lvctx.eval.benchmarks.answers import RULE_SOURCES

    for rule in rules:
        if rule in RULE_SOURCES:
            console.print(f"{rule}: {RULE_SOURCES[rule]}")


def report_difference(
    names: Sequence[str],
    versus: dict[str, Any],
    warnings: list[str],
    *,
    detect: float,
    group: str = "rule",
    unit: str = "questions",
) -> None:
    """Print or emit the paired differences of two runs for every `group`: rule, or length of a needle test."""
    from lvctx.artifacts.schemas import SCORE

    first, second = names
    if wants_json():
        emit({"schema": SCORE, "first": first, "second": second, "warnings": warnings, "difference": versus})
        return
    columns = ("difference", "95% interval", "p", unit, f"needed for {detect:g} points")
    table = number_table(group, columns, title=f"{first} minus {second}, same {unit}")
    for name, e in versus.items():
        p = "–" if e["p_value"] is None else f"{e['p_value']:.3f}"
        needed = "–" if e["needed"] is None else f"{e['needed']:,}"
        table.add_row(name, percent(e["mean"]), interval(e), p, f"{e['counted']:,}", needed)
    console = open_console()
    print_warnings(console, f"{first}, {second}", ["; ".join(warnings)] if warnings else [])
    console.print(table)


def run_costs(run: Path) -> dict[str, Any]:
    """`summarize_costs` of a results directory; empty for a file, which has no costs."""
    from lvctx.artifacts.result_log import read_results
    from lvctx.eval.cost_summary import summarize_costs

    return summarize_costs(read_results(run).values()) if run.is_dir() else {}


def print_costs(name: str, result: dict[str, Any]) -> None:
    """Print total and median of each number of a result's `cost`; nothing if it has none."""
    if "cost" not in result:
        return
    cost = result["cost"]
    rate = f", {cost['samples_per_second']:.3g} per second" if cost["samples_per_second"] else ""
    columns = ("total", "median")
    table = number_table("cost", columns, title=f"{name}: cost of {cost['samples']:,} samples{rate}")
    for key in cost["total"]:
        values = (_amount(key, cost[column][key]) for column in columns)
        table.add_row(key.removesuffix("_seconds").removesuffix("_bytes").replace("_", " "), *values)
    open_console().print(table)


def _amount(key: str, value: float) -> str:
    if key.endswith("_seconds"):
        return f"{value:,.3f} s"
    return f"{value / 2**30:.2f} GiB" if key.endswith("_bytes") else f"{value:,g}" if value % 1 else f"{int(value):,}"


def print_needle_tables(results: "Sequence[NeedleResults]", *, threshold: float, stderr: bool) -> None:
    """A table for text and one for video: a row per length, a column per run, then mean and effective length."""
    for modality in ("text", "video"):
        if chosen := [result for result in results if result.modality == modality]:
            open_console(stderr=stderr).print(_needle_table(chosen, threshold))


def _needle_table(results: "list[NeedleResults]", threshold: float) -> "Table":
    from rich.table import Table

    first = results[0]
    guessing = f", {first.guessing}" if first.guessing else ""
    table = Table(title=f"{first.modality}: accuracy{guessing}", title_justify="left")

    def with_tokens(name: str, tokens: str, values: Iterable[str]) -> list[str]:
        return [name, *([tokens] if first.modality == "video" else []), *values]

    for column in with_tokens(first.unit, "tokens", (result.name for result in results)):
        table.add_column(column, justify="right")
    tokens = {n: t for result in results for n, t in zip(result.lengths, result.tokens, strict=True)}
    for n in sorted(tokens):
        means = (result.by_length(result.lengths.index(n)) if n in result.lengths else None for result in results)
        table.add_row(*with_tokens(f"{n:,}", f"{tokens[n]:,}", map(_share, means)))
    table.add_section()
    table.add_row(*with_tokens("mean", "", (_share(result.mean) for result in results)))
    if any(result.mean_share not in (None, result.mean) for result in results):
        table.add_row(*with_tokens("mean share found", "", (_share(result.mean_share) for result in results)))
    for part in ("caption", "qa", "both") if any(result.pairs for result in results) else ():
        table.add_row(*with_tokens(part, "", (_share(result.pair_mean(part)) for result in results)))
    intervals = [result.interval for result in results]
    table.add_row(*with_tokens("95 %", "", ("–" if i is None else f"{i[0]:.2f} to {i[1]:.2f}" for i in intervals)))
    effective = (_effective(result, threshold) for result in results)
    table.add_row(*with_tokens(f"effective at {threshold:g}", "", effective))
    return table


def _effective(results: "NeedleResults", threshold: float) -> str:
    i = results.effective(threshold)
    if i is None:
        return f"< {results.lengths[0]:,}"
    return f"{'≥ ' if i == len(results.lengths) - 1 else ''}{results.lengths[i]:,}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
