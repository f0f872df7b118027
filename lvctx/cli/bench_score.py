"""`lvctx bench NAME score`, and how scores are printed."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lvctx.cli.costs import print_costs
from lvctx.cli.output import emit, estimate, interval, percent, wants_json
from lvctx.cli.protocols import print_protocol
from lvctx.config import Flag

Detect = Annotated[float, Flag(min=0.1, max=100, metavar="POINTS")]
"""A difference between two models, in points."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which runs."""

    runs: Annotated[tuple[Path, ...], Flag(argument=True, metavar="DIR...")]
    """Results directories of run."""
    seed: int = 0
    """Seed of the random letters of LongVideoBench's and EgoSchema's rules."""
    detect: Detect = 2.0
    """For two runs: a difference in points; prints how many questions would find it at p < 0.05 with power 0.8."""


def score_runs(name: str, config: ScoreConfig) -> None:
    """Print the scores of runs of a benchmark; of two runs also their difference."""
    from lvctx.artifacts.schemas import SCORE
    from lvctx.eval.benchmarks.accuracy import difference, read_benchmark_run
    from lvctx.eval.benchmarks.answers import RULES
    from lvctx.eval.benchmarks.benchmark_list import load_benchmark
    from lvctx.eval.benchmarks.protocol import protocol_difference
    from lvctx.eval.benchmarks.score_run import as_responses, score_run

    bench = load_benchmark(name)
    runs = [read_benchmark_run(path, bench) for path in config.runs]
    results = [
        {**score_run(run, bench, seed=config.seed), "run": path.name}
        for path, run in zip(config.runs, runs, strict=True)
    ]
    for result in results:
        if wants_json():
            emit(result)
        else:
            _print(result)
    if len(runs) != 2 or not set(RULES) <= results[0]["rules"].keys():
        return
    a, b = (as_responses(run, name).replies for run in runs)
    versus = {rule: vars(difference(a, b, rule, detect=config.detect / 100)) for rule in RULES}
    differing = protocol_difference(*(result.get("protocol") for result in results))
    warning = f"the protocols differ: {differing}" if differing else ""
    first, second = (result["run"] for result in results)
    if wants_json():
        warnings = [warning] if warning else []
        emit({"schema": SCORE, "first": first, "second": second, "warnings": warnings, "difference": versus})
    else:
        print_difference(first, second, versus, warning, detect=config.detect)


def print_difference(
    first: str,
    second: str,
    versus: dict[str, Any],
    warning: str,
    *,
    detect: float,
    group: str = "rule",
    unit: str = "questions",
) -> None:
    """Print the paired differences of two runs for every `group`: rule, or length of a needle test."""
    from rich.console import Console
    from rich.table import Table

    title = f"{first} minus {second}, same {unit}"
    table = Table(group, title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("difference", "95% interval", "p", unit, f"needed for {detect:g} points"):
        table.add_column(name, justify="right")
    for name, e in versus.items():
        p = "–" if e["p_value"] is None else f"{e['p_value']:.3f}"
        needed = "–" if e["needed"] is None else f"{e['needed']:,}"
        table.add_row(name, percent(e["mean"]), interval(e), p, f"{e['counted']:,}", needed)
    console = Console(markup=False, emoji=False)
    if warning:
        console.print(f"WARNING {first}, {second}: {warning}", style="bold red", highlight=False)
    console.print(table)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)  # names and groups are external text: [x] and :x: are not markup
    for warning in result["warnings"]:
        console.print(f"WARNING {result['run']}: {warning}", style="bold red", highlight=False)
    left_out = f", {result['failed']:,} failed and left out" if result["failed"] else ""
    console.print(f"{result['run']}: {result['questions']:,} questions{left_out}", highlight=False)
    print_protocol(console, result)
    rules = [rule for rule in result["rules"] if rule != "official-2024"]  # only for Video-MME; --json has it
    table = Table("", box=None, pad_edge=False)
    for rule in rules:
        table.add_column(f"{rule}, %", justify="right")
    table.add_row("all", *(estimate(result["rules"][rule]) for rule in rules))
    for column in (key for key in result if key.startswith("by_")):
        for value, estimates in result[column].items():
            table.add_row(f"{column[3:].replace('_', ' ')}: {value}", *(estimate(estimates[rule]) for rule in rules))
    for average in ("macro", "pooled") if "m_avg" in result else ():
        table.add_row(f"M-Avg, {average}", *(percent(result["m_avg"][rule][average]) for rule in rules))
    console.print(table)
    print_sources(console, rules)
    if "official" in result:
        official = result["official"]
        own = Table("its own rule", "%", box=None, pad_edge=False)
        for score, value in official["scores"].items():
            own.add_row(score, estimate(value))
        console.print(own)
        console.print(f"its own rule: {official['rule']}; chance {percent(official['chance'])}", highlight=False)
    if "guessing" in result:
        guessing = result["guessing"]
        line = (
            f"its own rule: {estimate(guessing)}, {guessing['guessed']:,} replies guessed with seed {guessing['seed']}"
        )
        console.print(line, highlight=False)
    if "effective_length" in result:
        console.print(f"effective length: {result['effective_length']:,} images (60% right)", highlight=False)
    if result.get("generated"):
        console.print(f"{result['generated']:,} generated answers, exported for their judge", highlight=False)
    print_costs(result["run"], result)


def print_sources(console: Any, rules: Iterable[str]) -> None:
    """Print the scorer and version of each rule."""
    from lvctx.eval.benchmarks.answers import RULE_SOURCES

    for rule in rules:
        if rule in RULE_SOURCES:
            console.print(f"{rule}: {RULE_SOURCES[rule]}", highlight=False)
