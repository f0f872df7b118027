"""`lvctx niah report`, and with it the group of the commands of `niah.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import lvctx.cli.niah  # noqa: F401 (declares the group and its other commands)
from lvctx.cli.options import OutputOptions, command, given
from lvctx.cli.output import emit, wants_json
from lvctx.cli.tables import Detect, Threshold, print_costs, print_needle_tables, report_difference, run_costs
from lvctx.config import Flag
from lvctx.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The runs to report, and the output."""

    runs: Annotated[tuple[Path, ...], Flag(argument=True, metavar="RUN...")]
    """Results directories, or LongVA's all_accuracies.json."""
    out: Annotated[Path | None, Flag(names=("-o", "--out"))] = None
    """.png or .svg: heatmaps side by side; .json: numbers; all_accuracies.json: LongVA's format."""
    threshold: Threshold = 0.9
    """Minimum accuracy of a length for the effective length."""
    training_length: Annotated[int | None, Flag(min=1)] = None
    """Training length in tokens of an all_accuracies.json's model, drawn as a line."""
    detect: Detect = 2.0
    """For two runs: a difference in points; prints how many cells would find it at p < 0.05 with power 0.8."""


@command("niah report", "lvctx niah report niah", "lvctx niah report niah niah -o both.png --json")
def report(ctx: typer.Context, config: ReportConfig, output: OutputOptions) -> None:
    """Tabulate accuracy by length and draw runs side by side on one scale. Needs only the results, no model.

    Two runs with the same needles are also compared by pairs: difference, 95% interval and p-value. Without -o
    each run's summary and heatmap are rewritten.
    """
    from lvctx.artifacts.store import write_json
    from lvctx.eval.niah.heatmap import draw_heatmaps, write_report
    from lvctx.eval.niah.longva_format import LONGVA_FILE, read_longva, write_longva
    from lvctx.eval.niah.results import read_needle_results

    out, threshold = config.out, config.threshold
    if out is not None and out.suffix not in (".png", ".svg", ".json"):
        raise UsageError(f"-o {out}: the name has to end in .png, .svg or .json")
    if out is not None and out.name == LONGVA_FILE and len(config.runs) > 1:
        raise UsageError(f"-o {out}: LongVA's format holds a single run")
    if "detect" in given(ctx) and len(config.runs) != 2:
        raise UsageError("--detect is about the difference of two runs", fix="give two runs, or drop --detect")
    results = [
        read_longva(run, trained_length=config.training_length) if run.suffix == ".json" else read_needle_results(run)
        for run in config.runs
    ]
    if out is None:
        for run, result in zip(config.runs, results, strict=True):
            if run.suffix != ".json":
                write_report(run, result, threshold=threshold)
    elif out.name == LONGVA_FILE:
        write_longva(out, results[0])
    elif out.suffix == ".json":
        write_json(out, [result.to_dict(threshold) for result in results])
    else:
        draw_heatmaps(results, out, threshold=threshold)
    if not wants_json():
        print_needle_tables(results, threshold=threshold, stderr=False)
    for run, result in zip(config.runs, results, strict=True):
        if wants_json():
            emit({**result.to_dict(threshold), **run_costs(run)})
        else:
            print_costs(result.name, run_costs(run))
    if len(config.runs) == 2 and all(run.suffix != ".json" for run in config.runs):
        _compare(config)


def _compare(config: ReportConfig) -> None:
    """Print or emit the paired difference of two runs that have cells in common."""
    from lvctx.artifacts.result_log import read_results
    from lvctx.eval.niah.compare import compare_needles, comparison_warnings

    a, b = (list(read_results(run).values()) for run in config.runs)
    differences = compare_needles(a, b, detect=config.detect / 100)
    if differences:
        versus, warnings = {name: vars(e) for name, e in differences.items()}, comparison_warnings(a, b, differences)
        names = [str(run) for run in config.runs]
        report_difference(names, versus, warnings, detect=config.detect, group="length", unit="cells")
