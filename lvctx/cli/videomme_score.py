"""`lvctx videomme score`: responses of a run, or an existing responses file, under the common scorers."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lvctx.cli.bench_score import compare_rules
from lvctx.cli.benchmarks import load_benchmark
from lvctx.cli.options import OutputOptions, command, given
from lvctx.cli.output import emit, wants_json
from lvctx.cli.tables import (
    Detect,
    interval,
    number_table,
    open_console,
    percent,
    print_costs,
    print_heading,
    print_sources,
)
from lvctx.config import Flag
from lvctx.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class VideoMMEScoreConfig:
    """The responses to score, and the output."""

    files: Annotated[tuple[Path, ...], Flag(argument=True, metavar="FILE...")]
    """Responses in the official format, or results directories of `videomme run`."""
    rule: Literal["official", "official-2024", "lmms-eval", "strict"] = "official"
    """Scorer for the breakdown and the plot. Default: that of the runs' protocol, else official."""
    csv: Path | None = None
    """Write duration x domain x task, with totals, for every rule."""
    detect: Detect = 2.0
    """For two files: a difference in points; prints how many questions would find it at p < 0.05 with power 0.8."""
    plot: Path | None = None
    """Draw accuracy by duration, or by number of frames for several runs: .png or .svg."""


@command(
    "videomme score",
    "lvctx videomme score videomme --json",
    "lvctx videomme score videomme/responses.json videomme --csv cells.csv --plot both.png",
)
def score_videomme(ctx: typer.Context, config: VideoMMEScoreConfig, output: OutputOptions) -> None:
    """Score responses under four rules with 95% intervals clustered by video; for two files, also their difference.

    official is the authors' current script, official-2024 its earlier version; both exclude replies without a letter
    from the denominator. lmms-eval counts them as wrong, strict requires the reply to begin with the letter. No model
    is needed.
    """
    from lvctx.eval.benchmarks.protocol import protocol_of_rows
    from lvctx.eval.benchmarks.responses import read_responses
    from lvctx.eval.cost_summary import summarize_costs

    videomme = load_benchmark("videomme")
    files, plot = config.files, config.plot
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {plot}: the name has to end in .png or .svg")
    responses = [read_responses(file) for file in files]
    if len({item.name for item in responses}) < len(responses):
        responses = [replace(item, name=str(file)) for item, file in zip(responses, files, strict=True)]
    rows_of_runs = [_read_rows(file) for file in files]
    runs = [_run_facts(rows) for rows in rows_of_runs]
    scores = [videomme.score(item) | {"failed": run[1]} for item, run in zip(responses, runs, strict=True)]
    for row, run in zip(scores, runs, strict=True):
        row["warnings"] = [*run[2], *row["warnings"]]
    protocols = [protocol_of_rows(rows) for rows in rows_of_runs]
    for row, protocol, rows in zip(scores, protocols, rows_of_runs, strict=True):
        row |= {**({"protocol": protocol} if protocol else {}), **summarize_costs(rows)}
    rule = config.rule if "rule" in given(ctx) else _common_rule(protocols) or config.rule
    if config.csv is not None:
        _write_csv(config.csv, [row for item in responses for row in videomme.cells(item)])
    if plot is not None:
        from lvctx.eval.benchmarks.accuracy_plot import draw_accuracy

        frame_counts = [frames for frames, *_ in runs if frames is not None]
        draw_accuracy(scores, frame_counts if len(set(frame_counts)) == len(files) > 1 else None, rule, plot)
    for row, item in zip(scores, responses, strict=True):
        if wants_json():
            emit(row)
        else:
            _print(row, videomme.cells(item, [rule]), rule)
    if len(responses) == 2:
        names = [item.name for item in responses]
        compare_rules(names, [item.replies for item in responses], protocols, detect=config.detect)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a run of lvctx; none for responses of another program."""
    from lvctx.artifacts.result_log import RESULTS, read_results

    folder = path.parent if path.name == "responses.json" else path
    return list(read_results(folder).values()) if (folder / RESULTS).is_file() else []


def _run_facts(rows: list[dict[str, Any]]) -> tuple[int | None, int, list[str]]:
    """Frames of each video that the model was shown, number of questions that failed, and warnings.

    None in place of the frames where videos differ in them, or there are no rows.
    """
    from lvctx.eval.benchmarks.accuracy import CUT, failure_warnings

    frames = {row["frames"] for row in rows if isinstance(row.get("frames"), int)}
    count = frames.pop() if len(frames) == 1 else None
    cut = sum(bool(row.get("cut")) for row in rows)
    warnings = [*failure_warnings(rows), *([CUT.format(cut=cut)] if cut else [])]
    return count, sum("error" in row for row in rows), warnings


def _common_rule(protocols: list[dict[str, Any] | None]) -> str | None:
    """The rule that every run's protocol states."""
    from lvctx.eval.benchmarks.answers import RULES

    values = [protocol.get("values") if protocol else None for protocol in protocols]
    rules = {value.get("rule") if isinstance(value, dict) else None for value in values}
    return next((rule for rule in RULES if rules == {rule}), None)


def _write_csv(target: Path, rows: list[dict[str, Any]]) -> None:
    from lvctx.artifacts.store import atomic_file

    with atomic_file(target) as partial, open(partial, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _print(row: dict[str, Any], cells: list[dict[str, Any]], rule: str) -> None:
    console = open_console()
    print_heading(console, row["file"], f"{row['questions']:,} questions about {row['videos']:,} videos", row)
    for what, count in row["overlooked"].items():
        console.print(f"  overlooked: {count:,} {what}")
    rules = number_table("rule", ("accuracy", "95% interval", "counted", "letter found"))
    for name, e in row["rules"].items():
        rules.add_row(name, percent(e["mean"]), interval(e), f"{e['counted']:,}", percent(e["parsed"]))
    console.print(rules)
    print_sources(console, row["rules"])
    durations = [*row["by_duration"], "all"]
    by_group = {(c["domain"], c["task_type"], c["duration"]): c for c in cells}
    kinds = number_table("domain, task", durations, title=f"{rule} rule, % (questions counted)")
    domains = dict.fromkeys(domain for domain, _, _ in by_group)
    for domain in domains:
        tasks = dict.fromkeys(task for task_domain, task, _ in by_group if task_domain == domain)
        for task in sorted(tasks, key=lambda t: (t != "all", t)):
            values = (by_group.get((domain, task, duration)) for duration in durations)
            columns = (f"{percent(c['mean'])} ({c['counted']})" if c else "" for c in values)
            kinds.add_row(domain if task == "all" else f"  {task}", *columns, style="bold" if task == "all" else "")
    console.print(kinds)
    print_costs(row["file"], row)
