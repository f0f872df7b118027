"""`lvctx bench NAME score`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lvctx.cli.output import emit, wants_json
from lvctx.cli.tables import (
    Detect,
    estimate,
    number_table,
    open_console,
    percent,
    print_costs,
    print_heading,
    print_sources,
    report_difference,
)
from lvctx.config import Flag

if TYPE_CHECKING:
    from lvctx.eval.benchmarks.answers import BenchmarkReply


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which runs."""

    runs: Annotated[tuple[Path, ...], Flag(argument=True, metavar="DIR...")]
    """Results directories of `bench NAME run`."""
    seed: int = 0
    """Seed of the random letters of LongVideoBench's and EgoSchema's rules."""
    detect: Detect = 2.0
    """For two runs: a difference in points; prints how many questions would find it at p < 0.05 with power 0.8."""


def score_runs(name: str, config: ScoreConfig) -> None:
    """Print the scores of runs of a benchmark; of two runs also their difference."""
    from lvctx.eval.benchmarks.accuracy import read_benchmark_run
    from lvctx.eval.benchmarks.answers import RULES
    from lvctx.eval.benchmarks.benchmark_list import load_benchmark
    from lvctx.eval.benchmarks.score_run import as_responses, score_run

    bench = load_benchmark(name)
    runs = [read_benchmark_run(path, bench) for path in config.runs]
    names = [path.name for path in config.runs]
    scores = [score_run(run, bench, seed=config.seed) | {"run": n} for run, n in zip(runs, names, strict=True)]
    for score in scores:
        if wants_json():
            emit(score)
        else:
            _print(score)
    if len(runs) == 2 and set(RULES) <= scores[0]["rules"].keys():
        replies = [as_responses(run, name).replies for run in runs]
        compare_rules(names, replies, [score.get("protocol") for score in scores], detect=config.detect)


def compare_rules(
    names: Sequence[str],
    replies: "Sequence[Sequence[BenchmarkReply]]",
    protocols: Sequence[dict[str, Any] | None],
    *,
    detect: float,
) -> None:
    """Print or emit the difference of two runs under each rule, with a warning if their protocols differ."""
    from lvctx.eval.benchmarks.accuracy import difference
    from lvctx.eval.benchmarks.answers import RULES
    from lvctx.eval.benchmarks.protocol import protocol_difference

    first, second = replies
    versus = {rule: vars(difference(first, second, rule, detect=detect / 100)) for rule in RULES}
    differing = protocol_difference(*protocols)
    report_difference(names, versus, [f"the protocols differ: {differing}"] if differing else [], detect=detect)


def _print(result: dict[str, Any]) -> None:
    console = open_console()
    print_heading(console, result["run"], f"{result['questions']:,} questions", result)
    rules = [rule for rule in result["rules"] if rule != "official-2024"]  # only for Video-MME; --json has it
    table = number_table("", [f"{rule}, %" for rule in rules])
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
        own = number_table("its own rule", ["%"])
        for score, value in official["scores"].items():
            own.add_row(score, estimate(value))
        console.print(own)
        console.print(f"its own rule: {official['rule']}; chance {percent(official['chance'])}")
    if "guessing" in result:
        guessing = result["guessing"]
        guessed = f"{guessing['guessed']:,} replies guessed with seed {guessing['seed']}"
        console.print(f"its own rule: {estimate(guessing)}, {guessed}")
    if "effective_length" in result:
        console.print(f"effective length: {result['effective_length']:,} images (60% right)")
    if result.get("generated"):
        console.print(f"{result['generated']:,} generated answers, exported for their judge")
    print_costs(result["run"], result)
