"""`lvctx bench NAME score`, and how scores are printed."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lvctx.cli.costs import print_costs
from lvctx.cli.output import emit, estimate, percent, wants_json
from lvctx.cli.protocols import print_protocol
from lvctx.config import Flag


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which runs."""

    runs: Annotated[tuple[Path, ...], Flag(argument=True, metavar="DIR...")]
    """Results directories of run."""
    seed: int = 0
    """Seed of the random letters of LongVideoBench's and EgoSchema's rules."""


def score_runs(name: str, config: ScoreConfig) -> None:
    """Print the scores of runs of a benchmark."""
    from lvctx.eval.benchmarks.accuracy import read_benchmark_run
    from lvctx.eval.benchmarks.benchmark_list import load_benchmark
    from lvctx.eval.benchmarks.score_run import score_run

    bench = load_benchmark(name)
    for path in config.runs:
        result = {**score_run(read_benchmark_run(path, bench), bench, seed=config.seed), "run": path.name}
        if wants_json():
            emit(result)
        else:
            _print(result)


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
