"""`lvctx videomme run` and `lvctx bench NAME run`: one engine for all benchmarks of long video."""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from lvctx.cli.bench_score import ScoreConfig, score_runs
from lvctx.cli.endpoint import open_endpoint, refuse_unused_options
from lvctx.cli.options import OutputOptions, RunOptions, command, given, group
from lvctx.cli.output import emit, is_quiet, progress, say, say_errors, wants_json
from lvctx.cli.protocols import protocol_facts, protocol_presets
from lvctx.cli.tables import open_console
from lvctx.config import Flag
from lvctx.errors import EXIT_SAMPLES_FAILED, UsageError, library_errors
from lvctx.eval.benchmarks.benchmark_list import BENCHMARKS, load_benchmark
from lvctx.inference.endpoint_config import ConcurrentEndpointConfig
from lvctx.inference.engine_config import EngineConfig
from lvctx.inference.sampling_params import BenchmarkSamplingParams
from lvctx.video.sampling import VideoSampling

if TYPE_CHECKING:
    from lvctx.inference.engine import Engine
    from lvctx.parallel.context import ParallelContext

TEMPLATES = {
    "videomme": "official, lmms-eval or vlmevalkit",
    "videomme-v2": "official, reasoning or lmms-eval",
    "lvbench": "official, which is lmms-eval's since the authors publish none, or videochat-flash",
    "mlvu": "official or lmms-eval",
}
"""Prompt templates of a benchmark that has several."""
OF_VIDEOS = ("feature_cache", "send", "frame_times")
"""Options, beside those of sampling, without effect on images."""

group(
    "videomme",
    "Video-MME: run a model on its questions, and score it or existing responses.",
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
    """The model, videos and questions."""

    model: str
    """VLM: directory or hub id; with --endpoint its name on the server."""
    videos: Path
    """Folder of the videos, or of the images."""
    questions: Annotated[str, Flag(metavar="FILE")]
    """Questions as released: Parquet, JSON, JSONL, CSV, a folder of them, `hub`, or ORG/NAME/FILE of a hub dataset."""
    out: Annotated[Path, Flag(names=("-o", "--out"))]
    """Results directory."""
    prompt: str = "official"
    """Prompt template: official, or another one listed in the command's help."""
    protocol: Annotated[str | None, Flag(metavar="NAME")] = None
    """Take defaults from a published evaluation, such as longva or qwen2.5-vl; `lvctx bench protocols` lists them."""
    subtitles: Path | None = None
    """Folder of .srt or .vtt files (Video-MME), whose lines at the sampled frames are added to the prompt, or of .jsonl
    files with one JSON object per word (Video-MME-v2), which are added as a whole."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkRunOptions(RunOptions):
    """Options of a run."""

    shard: Annotated[str | None, Flag(metavar="I/N", in_hash=False)] = None
    """Ask about every N-th video only, such as 1/4: for N machines or GPUs, each with its own -o, without torchrun.
    `lvctx bench merge` makes one run of them."""


def _declare(name: str, prefix: str, what: str) -> None:
    """The `run` command of a benchmark, and `score` unless it is declared separately."""
    if prefix != name:
        group(prefix, what)

    def run(
        ctx: typer.Context,
        config: BenchmarkOptions,
        params: BenchmarkSamplingParams,
        sampling: VideoSampling,
        engine: EngineConfig,
        server: ConcurrentEndpointConfig,
        run: BenchmarkRunOptions,
    ) -> None:
        set_by_user = given(ctx)
        _check_options(name, set_by_user, config, server)
        if sampling.has_default_rate and server.send != "file-url":
            sampling = replace(sampling, frames=128)
        _run(name, config, params, sampling, engine, server, run, set_by_user)

    def score(config: ScoreConfig, output: OutputOptions) -> None:
        score_runs(name, config)

    run.__doc__ = f"""Ask a model the benchmark's questions: with 128 frames of each video, unless a rate is given.

    Writes OUT/results.jsonl, from which scores are computed, and the input file of the benchmark's own scorer. Video
    features are kept in --feature-cache, by default OUT/frames. Prompt templates: {TEMPLATES.get(name, "official")}. A
    video that is missing or broken is an error row; no question is asked without its video.
    """
    score.__doc__ = "Score runs: accuracy with 95% intervals clustered by video, overall and by group. Needs no model."
    command(f"{prefix} run", presets=protocol_presets(name))(run)
    if prefix != name:
        command(f"{prefix} score")(score)


_declare("videomme", "videomme", "")
for _name, _info in BENCHMARKS.items():
    if _name != "videomme":
        _declare(_name, f"bench {_name}", f"{_info.title}: {_info.what}")


@command("bench list", "lvctx bench list", "lvctx bench list --json")
def list_benchmarks(output: OutputOptions) -> None:
    """List the benchmarks with the size, licence and dataset id of their questions."""
    from rich.table import Table

    from lvctx.artifacts.schemas import BENCHMARK

    table = Table("", "benchmark", "questions", "videos", "license", "dataset", box=None, pad_edge=False)
    for name, info in BENCHMARKS.items():
        if wants_json():
            emit({"schema": BENCHMARK, "bench": name, **asdict(info), "prompts": list(load_benchmark(name).STYLES)})
        videos = "" if info.videos is None else f"{info.videos:,}"
        table.add_row(name, info.title, f"{info.questions:,}", videos, info.license, info.dataset)
    if not wants_json():
        open_console().print(table)


def _check_options(
    name: str, set_by_user: frozenset[str], config: BenchmarkOptions, server: ConcurrentEndpointConfig
) -> None:
    """Raise UsageError for options that do not go together."""
    bench = load_benchmark(name)
    if config.prompt not in bench.STYLES:
        fix = f"give one of {', '.join(bench.STYLES)}"
        raise UsageError(f"no prompt template {config.prompt!r}", where="--prompt", fix=fix)
    if config.subtitles is not None and not getattr(bench, "SUBTITLES", False):
        raise UsageError(f"{name} has no subtitles", where="--subtitles")
    if name == "vhs" and (flags := sorted(set_by_user & {*VideoSampling.__dataclass_fields__, *OF_VIDEOS})):
        what = ", ".join(f"--{flag.replace('_', '-')}" for flag in flags)
        raise UsageError("vhs uses images, in the encoding that the model was trained with", fix=f"drop {what}")
    if server.endpoint is not None:
        refuse_unused_options(set_by_user, server, EngineConfig)
        if server.send == "file-url" and config.subtitles is not None:
            raise UsageError("--subtitles need the times of frames", fix="drop --send file-url")


def _run(
    name: str,
    config: BenchmarkOptions,
    params: BenchmarkSamplingParams,
    sampling: VideoSampling,
    engine: EngineConfig,
    server: ConcurrentEndpointConfig,
    run: BenchmarkRunOptions,
    set_by_user: frozenset[str],
) -> None:
    from lvctx.device import resolve_device
    from lvctx.eval.benchmarks.run_benchmark import BenchmarkConfig, plan_benchmark, run_benchmark
    from lvctx.eval.benchmarks.shards import Shard, start_shard
    from lvctx.inference.generation_config import resolve_sampling
    from lvctx.parallel.context import SHARED_WORK_TIMEOUT, open_context

    params = resolve_sampling(params, config.model, set_by_user)
    bench, shard = load_benchmark(name), Shard.parse(run.shard) if run.shard else None
    device = "cpu" if server.endpoint else resolve_device(engine.device)
    protocol = protocol_facts(config.protocol, name, config, params, sampling, engine, server)
    with progress(name, "reading the questions") as on_progress:
        benchmark_config = BenchmarkConfig(
            model=config.model,
            videos=config.videos,
            questions=_find_questions(bench, config.questions),
            prompt=config.prompt,
            subtitles=config.subtitles,
            params=params,
            protocol=protocol,
        )
        counts: Counter[str] = Counter()
        failed: dict[str, str] = {}
        opened = open_context(device=device, cp=engine.cp, timeout=SHARED_WORK_TIMEOUT)
        with opened as parallel:
            if parallel.size > 1 and server.endpoint is not None:
                raise UsageError(f"{parallel.size} processes with --endpoint", fix="--jobs, and no torchrun")
            model = _open_engine(config, engine, server, parallel, set_by_user)
            job = plan_benchmark(bench, benchmark_config, model, sampling)
            if shard is not None:
                if parallel.size > 1:
                    raise UsageError(f"{parallel.size} processes with --shard", fix="either torchrun or --shard")
                job = start_shard(job, shard, config.out, force=run.force, dry_run=run.dry_run)
            if run.dry_run:
                videos = len({s.video for s in job.samples})
                sizes = {"questions": len(job.samples), "videos": videos}
                emit({"dry_run": True, "path": str(config.out), **job.run_facts, **sizes})
                return
            rows = run_benchmark(
                job, config.out, model, parallel=parallel, resume=run.resume, force=run.force, on_progress=on_progress
            )
            for row in rows:
                counts["cut"] += bool(row.get("cut"))
                if "error" in row:
                    failed[row["id"]] = row["error"]
                if wants_json():
                    emit(row)
            failed = parallel.gather(failed)[0]
    _summarize(len(job.samples), failed, cut=counts["cut"], params=params)
    if failed:
        raise typer.Exit(EXIT_SAMPLES_FAILED)


def _summarize(total: int, failed: dict[str, str], *, cut: int, params: BenchmarkSamplingParams) -> None:
    """Report failed questions and replies that were cut."""
    say_errors(failed.values(), "question")
    if cut:
        say(f"lvctx: {cut:,} replies were cut at --max-new-tokens {params.max_new_tokens}")
    if not is_quiet() or failed:
        say(f"lvctx: {total - len(failed):,} of {total:,} questions answered; scores count only these")


def _open_engine(
    config: BenchmarkOptions,
    engine: EngineConfig,
    server: ConcurrentEndpointConfig,
    parallel: "ParallelContext",
    set_by_user: frozenset[str],
) -> "Engine":
    """The model in this process, or on a server."""
    if server.endpoint is not None:
        return open_endpoint(server, config.model, jobs=server.jobs)
    from lvctx.inference.open_engine import open_checked_vlm, open_engine

    cache = engine.feature_cache or config.out / "frames"
    vlm = open_checked_vlm(config.model, parallel.device, cache, set_by_user)
    return open_engine(vlm, replace(engine, device=parallel.device), ring=parallel.ring)


def _find_questions(bench: ModuleType, questions: str) -> Path:
    """A local path, or a file of a dataset on the hub or in its cache: `hub`, ORG/NAME, or ORG/NAME/FILE."""
    hub_file: tuple[str, str] = getattr(bench, "HUB", ("", ""))
    parts = questions.split("/", 2)
    if questions in ("hub", hub_file[0]) and hub_file[0]:
        repository, file = hub_file
    elif len(parts) < 3 or parts[0] in ("", ".", "..", "~") or Path(questions).exists():
        return Path(questions)
    else:
        repository, file = f"{parts[0]}/{parts[1]}", parts[2]
    from huggingface_hub import hf_hub_download, logging

    logging.set_verbosity_error()  # its retries print many lines, and the outcome is reported here
    what = "neither a local file nor a file of a dataset that could be downloaded"
    fix = "check name and network, or download the questions and give the file"
    with library_errors(what, where=questions, fix=fix):
        return Path(hf_hub_download(repository, file, repo_type="dataset"))


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
