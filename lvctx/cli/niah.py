"""`lvctx niah text`, `niah video`, `niah haystack` and `niah report`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lvctx.cli.costs import print_costs, run_costs
from lvctx.cli.endpoint import open_endpoint, refuse_unused_options
from lvctx.cli.options import OutputOptions, RunOptions, command, given, group
from lvctx.cli.output import emit, is_quiet, progress, say, wants_json
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
from lvctx.inference.engine_config import FEATURE_CACHE, CachePlacement, DeviceConfig, VideoDeviceConfig
from lvctx.video.sampling import VideoSampling

if TYPE_CHECKING:
    from lvctx.eval.niah.endpoint_job import EndpointNiahJob
    from lvctx.eval.niah.job import NiahJob
    from lvctx.eval.niah.results import NeedleResults

LOCAL_OPTIONS = ("kv_cache", "rope")
"""Options, beside those of the device, that decide how a model runs in this process."""
Threshold = Annotated[float, Flag(min=0, max=1)]

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

    _run(
        "niah text",
        config,
        lambda niah_config: plan_text(niah_config, dtype=device.weights_dtype, kv_cache=run.kv_cache),
        device,
        run,
    )


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
    from lvctx.inference.open_engine import check_options
    from lvctx.vlm.registry import open_vlm

    cache = (device.feature_cache or FEATURE_CACHE).expanduser()
    vlm = open_vlm(config.model, device=resolve_device(device.device), feature_cache=cache)
    check_options(vlm, given(ctx))
    _run(
        "niah video",
        config,
        lambda niah_config: plan_video(niah_config, vlm, sampling, dtype=device.weights_dtype, kv_cache=run.kv_cache),
        device,
        run,
    )


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
        failed = 0
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
                for row in run_niah(job, target, settings):
                    failed += "error" in row
                    if wants_json():
                        emit(row)
            failed = max(parallel.gather(failed))
    if parallel.rank == 0:
        results = [read_needle_results(target) for target in jobs]
        if config.rope:
            draw_heatmaps(results, run.out / "heatmap.png", threshold=run.threshold)
        if not (is_quiet() and wants_json()):
            print_tables(results, threshold=run.threshold, stderr=wants_json())
    if failed:
        raise typer.Exit(EXIT_SAMPLES_FAILED)


def _run_endpoint(name: str, job: "EndpointNiahJob", run: NiahRunOptions) -> None:
    """The same on a server."""
    from lvctx.eval.niah.endpoint_job import run_endpoint_niah
    from lvctx.eval.niah.results import read_needle_results

    if run.dry_run:
        emit({"dry_run": True, "path": str(run.out), **job.run_facts, "cells": len(job.cells)})
        return
    errors: list[str] = []
    cut = 0
    with progress(name, "asking the server") as on_progress:
        rows = run_endpoint_niah(
            job, run.out, resume=run.resume, force=run.force, threshold=run.threshold, on_progress=on_progress
        )
        for row in rows:
            cut += bool(row.get("cut") and not row["correct"])
            if "error" in row:
                errors.append(row["error"])
            if wants_json():
                emit(row)
    for error in dict.fromkeys(errors):
        say(f"lvctx: {error}")
    if cut:
        say(f"lvctx: {cut:,} wrong replies were cut at the largest number of tokens")
    if not (is_quiet() and wants_json()):
        print_tables([read_needle_results(run.out)], threshold=run.threshold, stderr=wants_json())
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


@command("niah report", "lvctx niah report niah", "lvctx niah report niah niah -o both.png --json")
def report(config: ReportConfig, output: OutputOptions) -> None:
    """Tabulate accuracy by length and draw runs side by side on one scale. Needs only the results, no model.

    Without -o each run's summary and heatmap are rewritten.
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
        print_tables(results, threshold=threshold, stderr=False)
    for run, result in zip(config.runs, results, strict=True):
        if wants_json():
            emit({**result.to_dict(threshold), **run_costs(run)})
        else:
            print_costs(result.name, run_costs(run))


def print_tables(results: "Sequence[NeedleResults]", *, threshold: float, stderr: bool) -> None:
    """A table for text and one for video: a row per length, a column per run, then mean and effective length."""
    from rich.console import Console
    from rich.table import Table

    from lvctx.eval.niah.results import wilson

    for modality in ("text", "video"):
        chosen = [result for result in results if result.modality == modality]
        if not chosen:
            continue
        tokens = {n: t for result in chosen for n, t in zip(result.lengths, result.tokens, strict=True)}
        guessing = f", {chosen[0].guessing}" if chosen[0].guessing else ""
        table = Table(title=f"{modality}: accuracy{guessing}", title_justify="left")
        for name in (
            chosen[0].unit,
            *(("tokens",) if modality == "video" else ()),
            *(result.name for result in chosen),
        ):
            table.add_column(name, justify="right")
        for n in sorted(tokens):
            shares = [
                _share(result.by_length(result.lengths.index(n)) if n in result.lengths else None) for result in chosen
            ]
            table.add_row(f"{n:,}", *((f"{tokens[n]:,}",) if modality == "video" else ()), *shares)
        table.add_section()
        lead = ("",) if modality == "video" else ()
        intervals = [wilson(*result.total) for result in chosen]
        table.add_row("mean", *lead, *(_share(result.mean) for result in chosen))
        table.add_row("95 %", *lead, *("–" if i is None else f"{i[0]:.2f} to {i[1]:.2f}" for i in intervals))
        table.add_row(f"effective at {threshold:g}", *lead, *(_effective(result, threshold) for result in chosen))
        Console(stderr=stderr).print(table)


def _effective(results: "NeedleResults", threshold: float) -> str:
    i = results.effective(threshold)
    if i is None:
        return f"< {results.lengths[0]:,}"
    return f"{'≥ ' if i == len(results.lengths) - 1 else ''}{results.lengths[i]:,}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
