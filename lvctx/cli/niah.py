"""`lvctx niah`: its commands text, video, haystack and report."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lvctx.cli.endpoint import open_endpoint, refuse_unused_options
from lvctx.cli.options import OutputOptions, RunOptions, command, given, group
from lvctx.cli.output import emit, is_quiet, progress, say, say_errors, wants_json
from lvctx.cli.tables import Detect, Threshold, print_costs, print_needle_tables, report_difference, run_costs
from lvctx.config import Flag, refuse_options
from lvctx.errors import EXIT_SAMPLES_FAILED, UsageError
from lvctx.eval.niah.haystack_config import HaystackConfig
from lvctx.eval.niah.niah_config import OF_NEEDLES, WHOLE_TEXT, NiahConfig, TextNiahConfig, VideoNiahConfig
from lvctx.inference.endpoint_config import (
    ConcurrentEndpointConfig,
    EndpointConfig,
    TextEndpointConfig,
    VideoEndpointConfig,
)
from lvctx.inference.engine_config import CachePlacement, DeviceConfig, VideoDeviceConfig
from lvctx.video.sampling import VideoSampling

if TYPE_CHECKING:
    from lvctx.eval.niah.endpoint_job import EndpointNiahJob
    from lvctx.eval.niah.job import NiahJob

LOCAL_OPTIONS = ("kv_cache", "rope")
"""Options, beside those of the device, that decide how a model runs in this process."""

group(
    "niah",
    "Needle-in-a-haystack test over context lengths and needle depths, in text or in video.",
    "lvctx niah text --model lm --haystack essays --lengths 256 --depths 0,1 --trials 1 -o needles",
    "lvctx niah report niah -o heatmap.png",
)


@dataclass(frozen=True, kw_only=True)
class NiahRunOptions(RunOptions):
    """Options of a run."""

    out: Annotated[Path, Flag(names=("-o", "--out"))]
    """Results directory; with several --rope, one subdirectory for each."""
    kv_cache: CachePlacement = "device"
    """Placement of the KV cache: on the device, on the host, or on the device in 8 bits (not exact)."""
    threshold: Threshold = 0.9
    """Minimum accuracy of a length for the effective length."""


@command(
    "niah text",
    "lvctx niah text --model lm --haystack essays --lengths 256 --depths 0,1 --trials 1 -o needles",
    "lvctx niah text --model lm --haystack essays --lengths 128,256 --depths nested --dry-run -o needles",
)
def text(
    ctx: typer.Context, config: TextNiahConfig, device: DeviceConfig, server: TextEndpointConfig, run: NiahRunOptions
) -> None:
    """Needle-in-a-haystack test in text: a magic number among essays, or a task of RULER.

    On a pipe there is one JSON line for each cell.
    """
    if config.task in WHOLE_TEXT:
        refuse_options(given(ctx), OF_NEEDLES, there=f"with --task {config.task}")
    if server.endpoint is not None:
        from lvctx.eval.niah.endpoint_job import plan_endpoint_text

        shown = VideoEndpointConfig(**{f.name: getattr(server, f.name) for f in fields(EndpointConfig)})
        refuse_unused_options(given(ctx), shown, DeviceConfig, more=LOCAL_OPTIONS)
        engine = open_endpoint(shown, config.model, jobs=server.jobs)
        _run_endpoint("niah text", plan_endpoint_text(config, server, engine), run)
        return
    from lvctx.eval.niah.job import plan_text

    plan = partial(plan_text, dtype=device.weights_dtype, kv_cache=run.kv_cache)
    _run("niah text", config, plan, device, run)


@command(
    "niah video",
    "lvctx niah video --model vlm --haystack frames/bikes.frames.safetensors --lengths 2,4 --trials 1 -o needles-video",
    "lvctx niah video --model vlm --haystack frames/bikes.frames.safetensors --lengths 4 --question when --trials 1 "
    "-o needles-when",
)
def video(
    ctx: typer.Context,
    config: VideoNiahConfig,
    sampling: VideoSampling,
    device: VideoDeviceConfig,
    server: ConcurrentEndpointConfig,
    run: NiahRunOptions,
) -> None:
    """Needle-in-a-haystack test in video (V-NIAH): an image among the frames of a video.

    A video file is encoded first if the model needs it, and its features are kept in --feature-cache.
    On a pipe there is one JSON line for each cell.
    """
    if server.endpoint is not None:
        from lvctx.eval.niah.endpoint_job import plan_endpoint_video

        refuse_unused_options(given(ctx), server, VideoDeviceConfig, more=(*LOCAL_OPTIONS, "as_images"))
        engine = open_endpoint(server, config.model, jobs=server.jobs)
        _run_endpoint("niah video", plan_endpoint_video(config, server, sampling, engine), run)
        return
    from lvctx.device import resolve_device
    from lvctx.eval.niah.job import plan_video
    from lvctx.inference.open_engine import open_checked_vlm

    vlm = open_checked_vlm(config.model, resolve_device(device.device), device.features_folder, given(ctx))
    plan = partial(plan_video, vlm=vlm, sampling=sampling, dtype=device.weights_dtype, kv_cache=run.kv_cache)
    _run("niah video", config, plan, device, run)


def _run(
    name: str, config: NiahConfig, plan: Callable[..., "NiahJob"], device: DeviceConfig, run: NiahRunOptions
) -> None:
    from lvctx.eval.niah.heatmap import draw_heatmaps
    from lvctx.eval.niah.results import read_needle_results
    from lvctx.eval.niah.run import NiahRun, run_niah
    from lvctx.parallel.context import SHARED_WORK_TIMEOUT, open_context

    with progress(name, "reading the haystack") as on_progress:
        folders = {run.out / f"{scheme}-{n:g}": replace(config, rope=((scheme, n),)) for scheme, n in config.rope}
        jobs = {target: plan(niah_config) for target, niah_config in (folders or {run.out: config}).items()}
        if run.dry_run:
            for target, job in jobs.items():
                emit({"dry_run": True, "path": str(target), **job.run_facts, **job.costs(device.cp)})
            return
        errors: list[str] = []
        opened = open_context(device=device.device, cp=device.cp, timeout=SHARED_WORK_TIMEOUT)
        with opened as parallel:
            settings = NiahRun(
                parallel=parallel,
                prefill_chunk=device.prefill_chunk,
                reuse=device.reuse,
                resume=run.resume,
                force=run.force,
                on_progress=on_progress,
                threshold=run.threshold,
            )
            for target, job in jobs.items():
                errors += _emit_rows(run_niah(job, target, settings))[0]
            errors = max(parallel.gather(errors), key=len)
    if parallel.rank == 0 and config.rope:
        results = [read_needle_results(target) for target in jobs]
        draw_heatmaps(results, run.out / "heatmap.png", threshold=run.threshold)
    _finish(jobs if parallel.rank == 0 else (), run, errors)


def _run_endpoint(name: str, job: "EndpointNiahJob", run: NiahRunOptions) -> None:
    """The same on a server."""
    from lvctx.eval.niah.endpoint_job import run_endpoint_niah

    if run.dry_run:
        emit({"dry_run": True, "path": str(run.out), **job.run_facts, "cells": len(job.cells)})
        return
    with progress(name, "asking the server") as on_progress:
        rows = run_endpoint_niah(
            job, run.out, resume=run.resume, force=run.force, threshold=run.threshold, on_progress=on_progress
        )
        errors, cut = _emit_rows(rows)
    _finish([run.out], run, errors, cut)


def _emit_rows(rows: Iterable[dict[str, Any]]) -> tuple[list[str], int]:
    """Emit rows as they are done; returns the errors of failed ones, and the number of wrong replies that were cut."""
    errors, cut = [], 0
    for row in rows:
        cut += bool(row.get("cut") and not row["correct"])
        if "error" in row:
            errors.append(row["error"])
        if wants_json():
            emit(row)
    return errors, cut


def _finish(folders: Iterable[Path], run: NiahRunOptions, errors: list[str], cut: int = 0) -> None:
    """Print errors and tables of finished runs. The exit code is 4 if cells failed."""
    from lvctx.eval.niah.results import read_needle_results

    say_errors(errors, "cell")
    if cut:
        say(f"lvctx: {cut:,} wrong replies were cut at the largest number of tokens")
    if not (is_quiet() and wants_json()):
        results = [read_needle_results(folder) for folder in folders]
        print_needle_tables(results, threshold=run.threshold, stderr=wants_json())
    if errors:
        raise typer.Exit(EXIT_SAMPLES_FAILED)


@dataclass(frozen=True, kw_only=True)
class HaystackRunOptions(OutputOptions):
    """The output of a haystack."""

    out: Annotated[Path, Flag(names=("-o", "--out"))] = Path("haystack")
    """NAME.frames.safetensors (with --model), NAME.mp4, or a directory of images."""
    model: str | None = None
    """VLM or vision tower that encodes the frames: directory or hub id."""
    pixels: Path | None = None
    """A .pixels.txt file of hashes that the frames must match."""
    batch: Annotated[int, Flag(min=1, needs=("model",))] = 64
    """Frames per forward pass of the vision tower."""
    device: str = "auto"
    """Device: cpu, cuda or mps. auto takes the first GPU, else the CPU."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Continue an unfinished output: if there is one, never, or fail if there is none."""
    force: bool = False
    """Overwrite the output of another run."""


@command(
    "niah haystack",
    "lvctx niah haystack --frames 20 --model vlm -o hay.frames.safetensors",
    "lvctx niah haystack clips/bikes.mp4 --frames 20 --seed 1 -o hay-images",
)
def haystack(config: HaystackConfig, run: HaystackRunOptions) -> None:
    """Draw hours of video from a seed and hash every frame; clips, if given, are inserted between its scenes.

    Frames are streamed to the vision tower and no video is stored. With --pixels two machines can verify that their
    haystacks are equal.
    """
    from lvctx.device import resolve_device
    from lvctx.eval.niah.haystack import write_haystack
    from lvctx.vlm.video_encoder import VideoEncoder

    encoder = None
    if run.model is not None:
        sampling = VideoSampling(frame_mode="pad")
        encoder = VideoEncoder.open(run.model, sampling, batch=run.batch, device=resolve_device(run.device))
    with progress("niah haystack") as on_progress:
        row = write_haystack(
            config,
            run.out,
            encoder=encoder,
            pixels=run.pixels,
            resume=run.resume,
            force=run.force,
            on_progress=on_progress,
        )
    emit(row)


@dataclass(frozen=True, kw_only=True)
class NiahReportConfig:
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
def report(ctx: typer.Context, config: NiahReportConfig, output: OutputOptions) -> None:
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


def _compare(config: NiahReportConfig) -> None:
    """Print or emit the paired difference of two runs that have cells in common."""
    from lvctx.artifacts.result_log import read_results
    from lvctx.eval.niah.compare import compare_needles, comparison_warnings

    a, b = (list(read_results(run).values()) for run in config.runs)
    differences = compare_needles(a, b, detect=config.detect / 100)
    if differences:
        versus, warnings = {name: vars(e) for name, e in differences.items()}, comparison_warnings(a, b, differences)
        names = [str(run) for run in config.runs]
        report_difference(names, versus, warnings, detect=config.detect, group="length", unit="cells")
