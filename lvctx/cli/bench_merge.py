"""`lvctx bench merge`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lvctx.cli.benchmarks import load_benchmark
from lvctx.cli.options import OutputOptions, command
from lvctx.cli.output import emit, say
from lvctx.config import Flag
from lvctx.errors import EXIT_SAMPLES_FAILED


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """The shards, and the output."""

    runs: Annotated[tuple[Path, ...], Flag(argument=True, metavar="DIR...")]
    """Results directories of the shards."""
    out: Annotated[Path, Flag(names=("-o", "--out"))]
    """Results directory of the whole run."""
    force: bool = False
    """Overwrite the output of another run."""


@command(
    "bench merge",
    "lvctx bench merge shard-1 shard-2 -o merged",
    "lvctx bench merge shard-1 shard-2 -o merged && lvctx videomme score merged",
)
def merge_shards(config: MergeConfig, output: OutputOptions) -> None:
    """Merge the shards of a benchmark's run (--shard of videomme run and bench NAME run) into one run.

    Every question has one row, in the order of the run that is not sharded. Shards of different runs are refused, and
    questions that are missing are counted: the exit code is then 4, as it is for questions that failed.
    """
    from lvctx.artifacts import schemas
    from lvctx.eval.benchmarks.shards import read_shards, write_merged

    merged, count = read_shards(config.runs)
    write_merged(merged, load_benchmark(merged.bench), config.out, force=config.force)
    missing, failed, shards = merged.missing, merged.failed, merged.missing_of_shards(count)
    total = len(merged.questions)
    row = {
        "schema": schemas.MERGED,
        "path": str(config.out),
        "bench": merged.bench,
        "questions": total,
        "answered": total - len(missing) - len(failed),
        "failed": len(failed),
        "missing": missing,
        "missing_shards": shards,
    }
    emit(row, f"{config.out}: {row['answered']:,} of {total:,} questions answered")
    if shards:
        say(f"lvctx: no row of shard {', '.join(shards)}")
    if missing:
        more = ", ..." if len(missing) > 8 else ""
        say(f"lvctx: {len(missing):,} questions are missing: {', '.join(missing[:8])}{more}")
    if failed:
        say(f"lvctx: {len(failed):,} questions failed; run their shards again, then merge")
    if missing or failed:
        raise typer.Exit(EXIT_SAMPLES_FAILED)
