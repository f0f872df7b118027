"""`lvctx videomme run|score` and `lvctx bench NAME run|score`: one engine for all benchmarks of long video."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from lvctx.cli.options import OutputOptions, RunOptions, command, given, group
from lvctx.cli.output import emit, is_quiet, progress, say, wants_json
from lvctx.config import Flag
from lvctx.errors import EXIT_SAMPLES_FAILED, InputError, UsageError
from lvctx.inference.engine_config import EngineConfig
from lvctx.video.sampling import VideoSampling

BENCHMARKS = {
    "mlvu": "MLVU: nine tasks on long videos; generation tasks are exported for a judge.",
    "longvideobench": "LongVideoBench: referred reasoning; a random letter where none is found.",
    "nextqa": "NExT-QA, multiple choice: causal, temporal, descriptive.",
    "vhs": "Visual Haystacks, single needle: yes or no about one image among many.",
}
TEMPLATES = {"videomme": "official, lmms-eval or vlmevalkit", "mlvu": "official or lmms-eval"}
"""Prompt templates of a benchmark that has several."""

group(
    "videomme",
    "Video-MME: run a model on its questions, and score it or anyone's responses.",
    "lvctx videomme run --model vlm --videos videos --questions questions.json --frames 8 -o videomme",
    "lvctx videomme score videomme --plot accuracy.png",
)
group(
    "bench",
    "Other benchmarks of long video: run a model on their questions, and score it.",
    "lvctx bench nextqa run --model vlm --videos clips --questions nextqa.csv --frames 4 -o nextqa",
    "lvctx bench nextqa score nextqa",
)


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What to ask."""

    model: str
    """VLM: directory or hub id."""
    videos: Path
    """Folder of the videos, or of the images."""
    questions: Annotated[str, Flag(metavar="FILE")]
    """Questions as released: Parquet, JSON, JSONL, CSV, a folder of them, `hub`, or ORG/NAME/FILE of a hub dataset."""
    out: Annotated[Path, Flag(names=("-o", "--out"))]
    """Results directory."""
    prompt: str = "official"
    """Prompt template: official, or another that the help of the command lists."""
    subtitles: Path | None = None
    """Folder of .srt or .vtt files (Video-MME); the subtitles at the sampled frames are shown."""
    max_new_tokens: Annotated[int, Flag(min=1)] = 16
    """Longest reply, in tokens."""


def _declare(name: str, prefix: str, what: str) -> None:
    """The `run` command of a benchmark, and `score` where it is not declared by itself."""
    if prefix != name:
        group(prefix, what)

    def run(
        ctx: typer.Context, config: BenchmarkOptions, sampling: VideoSampling, engine: EngineConfig, run: RunOptions
    ) -> None:
        _run(name, given(ctx), config, sampling, engine, run)

    def score(config: ScoreConfig, output: OutputOptions) -> None:
        _score(name, config)

    run.__doc__ = f"""Ask a model the benchmark's questions: 128 frames of each video, unless a rate is given.

    Writes OUT/results.jsonl, from which scores are made, and the file that the benchmark's own scorer reads. Features
    of videos are kept in --feature-cache, by default OUT/frames. Prompt templates: {TEMPLATES.get(name, "official")}. A
    video that is missing or broken is an error row; the model is never asked about a video that it is not shown.
    """
    score.__doc__ = "Score runs: accuracy with 95% intervals clustered by video, in all and by group. Needs no model."
    command(f"{prefix} run")(run)
    if prefix != name:
        command(f"{prefix} score")(score)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which runs."""

    runs: Annotated[tuple[Path, ...], Flag(argument=True, metavar="DIR...")]
    """Results directories of run."""
    seed: int = 0
    """Seed of the letters that LongVideoBench's own rule draws."""


_declare("videomme", "videomme", "")
for _name, _what in BENCHMARKS.items():
    _declare(_name, f"bench {_name}", _what)


def load_benchmark(name: str) -> ModuleType:
    """A benchmark: one module of `bench`."""
    return import_module(f"lvctx.eval.benchmarks.{name}")


def _run(
    name: str,
    set_by_user: frozenset[str],
    config: BenchmarkOptions,
    sampling: VideoSampling,
    engine: EngineConfig,
    run: RunOptions,
) -> None:
    bench = load_benchmark(name)
    if config.prompt not in bench.STYLES:
        fix = f"give one of {', '.join(bench.STYLES)}"
        raise UsageError(f"no prompt template {config.prompt!r}", where="--prompt", fix=fix)
    if config.subtitles is not None and name != "videomme":
        raise UsageError(f"{name} has no subtitles", where="--subtitles")
    if name == "vhs" and (flags := sorted(set_by_user & set(VideoSampling.__dataclass_fields__))):
        what = ", ".join(f"--{flag.replace('_', '-')}" for flag in flags)
        raise UsageError("vhs shows images, as the model was trained to read them", fix=f"drop {what}")
    if sampling.fps is None and sampling.frames is None:
        sampling = replace(sampling, frames=128)
    from lvctx.device import resolve_device
    from lvctx.eval.benchmarks.run_benchmark import BenchmarkConfig, plan_benchmark, run_benchmark
    from lvctx.inference.open_engine import open_engine
    from lvctx.parallel.context import SHARED_WORK_TIMEOUT, open_context
    from lvctx.vlm.registry import open_vlm

    device = resolve_device(engine.device)
    with progress(name, "reading the questions") as on_progress:
        vlm = open_vlm(config.model, device=device, feature_cache=engine.feature_cache or config.out / "frames")
        benchmark_config = BenchmarkConfig(
            model=config.model,
            videos=config.videos,
            questions=_find_questions(bench, config.questions),
            prompt=config.prompt,
            subtitles=config.subtitles,
            max_new_tokens=config.max_new_tokens,
        )
        job = plan_benchmark(bench, benchmark_config, vlm, sampling, dtype=engine.dtype)
        if run.dry_run:
            counts = {"questions": len(job.samples), "videos": len({s.video for s in job.samples})}
            emit({"dry_run": True, "path": str(config.out), **job.run_facts, **counts})
            return
        failed: dict[str, str] = {}
        opened = open_context(device=device, cp=engine.cp, timeout=SHARED_WORK_TIMEOUT)
        with opened as parallel:
            if parallel.dp > 1:
                what = f"{parallel.size} processes for one sequence"
                raise UsageError(what, fix=f"--cp {parallel.size}, or no torchrun")
            model = open_engine(vlm, replace(engine, device=parallel.device), ring=parallel.ring)
            rows = run_benchmark(
                job,
                config.out,
                model,
                parallel=parallel,
                resume=run.resume,
                force=run.force,
                on_progress=on_progress,
            )
            for row in rows:
                if "error" in row:
                    failed[row["id"]] = row["error"]
                if wants_json():
                    emit(row)
            failed = parallel.gather(failed)[0]
    for error in dict.fromkeys(failed.values()):
        say(f"lvctx: {error}")
    total = len(job.samples)
    if not is_quiet() or failed:
        say(f"lvctx: {total - len(failed):,} of {total:,} questions answered; scores count these alone")
    if failed:
        raise typer.Exit(EXIT_SAMPLES_FAILED)


def _find_questions(bench: ModuleType, questions: str) -> Path:
    """A path, or the file of a dataset on the hub or in its cache: `hub`, ORG/NAME of it, or ORG/NAME/FILE of any."""
    hub_file: tuple[str, str] = getattr(bench, "HUB", ("", ""))
    parts = questions.split("/", 2)
    if questions in ("hub", hub_file[0]) and hub_file[0]:
        repository, file = hub_file
    elif len(parts) < 3 or parts[0] in ("", ".", "..", "~") or Path(questions).exists():
        return Path(questions)
    else:
        repository, file = f"{parts[0]}/{parts[1]}", parts[2]
    from huggingface_hub import hf_hub_download, logging

    logging.set_verbosity_error()  # its retries are many lines, and the outcome is one of ours
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as e:  # whatever the hub client raises
        reason = str(e).strip().split("\n")[0] or type(e).__name__
        raise InputError(
            f"neither a file here nor one of a dataset that the hub can give ({reason})",
            where=questions,
            fix="check name and network, or download the questions and give the file",
        ) from e


def _score(name: str, config: ScoreConfig) -> None:
    from lvctx.artifacts.schemas import SCORE
    from lvctx.eval.benchmarks.accuracy import read_benchmark_run

    bench = load_benchmark(name)
    for path in config.runs:
        benchmark_run = read_benchmark_run(path, bench)
        result = (
            bench.score(benchmark_run.rows, seed=config.seed)
            if name == "longvideobench"
            else bench.score(benchmark_run.rows)
        )
        result["warnings"] = [*benchmark_run.warnings, *result["warnings"]]
        result = {"schema": SCORE, "bench": name, "run": path.name, "failed": benchmark_run.failed, **result}
        if wants_json():
            emit(result)
        else:
            _print(result)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)  # names and groups are text of others: [x] and :x: are no markup
    for warning in result["warnings"]:
        console.print(f"WARNING {result['run']}: {warning}", style="bold red", highlight=False)
    left_out = f", {result['failed']:,} failed and left out" if result["failed"] else ""
    console.print(f"{result['run']}: {result['questions']:,} questions{left_out}", highlight=False)
    rules = [rule for rule in result["rules"] if rule != "official-2024"]  # of Video-MME alone; --json has it
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


def print_sources(console: Any, rules: Iterable[str]) -> None:
    """Which version of whose scorer each rule is."""
    from lvctx.eval.benchmarks.answers import RULE_SOURCES

    for rule in rules:
        if rule in RULE_SOURCES:
            console.print(f"{rule}: {RULE_SOURCES[rule]}", highlight=False)


def percent(value: float | None) -> str:
    """`61.2`, or a dash where nothing was counted."""
    return "–" if value is None else f"{100 * value:.1f}"


def interval(e: dict[str, Any]) -> str:
    """`58.9 to 63.5`, or a dash."""
    return "–" if e["low"] is None else f"{100 * e['low']:.1f} to {100 * e['high']:.1f}"


def estimate(e: dict[str, Any]) -> str:
    """`61.2 (58.9 to 63.5; n 2,700)`."""
    return f"{percent(e['mean'])} ({interval(e)}; n {e['counted']:,})"
