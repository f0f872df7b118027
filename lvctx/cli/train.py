"""Commands that train models: `extend-lm`, `align` and `mrope-extend`."""

import os
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvctx.artifacts import schemas
from lvctx.cli.options import RunOptions, card_command, command
from lvctx.cli.output import artifact_row, emit, progress, say
from lvctx.cli.tables import number_table, open_console
from lvctx.cli.tracking import TrackingOptions, tracker
from lvctx.config import hashed_fields
from lvctx.errors import InputError, UsageError
from lvctx.training.align_config import AlignConfig
from lvctx.training.extend_config import BaseSearchConfig, ExtendConfig
from lvctx.training.mrope_config import MropeConfig
from lvctx.training.parallel_config import ParallelConfig, RunControl

if TYPE_CHECKING:
    from lvctx.training.mrope_verify import Verified


@command(
    "extend-lm",
    "lvctx extend-lm --model lm --rope-theta 250000 --context 32768 --steps 0 -o lm-rope",
    "lvctx extend-lm --model lm --data packed --rope yarn --steps 1 --batch-tokens 2048 --dry-run -o lm-long",
)
def extend_lm(
    config: ExtendConfig, search: BaseSearchConfig, parallel: ParallelConfig, tracking: TrackingOptions, run: RunOptions
) -> None:
    """Extend the context of a language model: a new RoPE base, then training on long packed rows of text."""
    from lvctx.training.extend import resolve_extend
    from lvctx.training.progressive import resolve_stages, run_stages, stage_configs

    facts: dict[str, Any] = {}
    if search.search_base:
        from lvctx.eval.niah.base_search import best, resolve_search, run_search, search_facts

        if _processes() > 1:
            raise UsageError("--search-base runs in one process", fix="search first, then give torchrun --rope-theta")
        base_search = resolve_search(config, search, device=parallel.device)
        if run.dry_run:
            emit({"dry_run": True, "path": str(config.out), "bases": base_search.bases, **base_search.niah.costs()})
            return
        with progress("extend-lm --search-base") as on_progress:
            rows = run_search(base_search, config.out, device=parallel.device, force=run.force, on_progress=on_progress)
        config, facts = replace(config, rope_theta=best(rows)), {"search": search_facts(base_search, rows)}
    if config.adapter and config.stages:
        raise UsageError("--adapter has no effect with --stage, which starts from earlier results", fix="drop one")
    configs = stage_configs(config)
    jobs = [replace(job, facts=facts) for job in resolve_stages(resolve_extend, configs)]
    facts = {"original_context": jobs[0].original_context, **hashed_fields(jobs[-1].config), **facts}
    if config.stages:
        facts["stages"] = [hashed_fields(job.config) for job in jobs]
    if run.dry_run:
        from lvctx.training.plan import predict_extend, refuse

        sizes = [{"rows": len(job.data or ()), "epochs": round(job.epochs, 3)} for job in jobs]
        facts |= {key: [size[key] for size in sizes] if config.stages else sizes[0][key] for key in sizes[0]}
        longest = max(jobs, key=lambda job: job.config.seq_len or 0)
        predicted = predict_extend(longest, parallel, world=max(_processes(), parallel.cp))
        emit({"dry_run": True, "path": str(config.out), **facts, "predicted": predicted})
        if predicted:
            refuse(predicted)
        return
    with ExitStack() as stack:
        control = _control(stack, "extend-lm", card_command("extend-lm", config), config.out, tracking, run)
        run_stages(configs, jobs, resolve_extend, parallel, control)
    emit(artifact_row(schemas.MODEL, config.out, facts))


@command(
    "align",
    "lvctx align --lm lm-32k --tower tower --data shapes/projector.json --images shapes --steps 2 -o vlm-0",
    "lvctx align --stage full --init vlm --data shapes/full.json --images shapes --lora 16 --dry-run -o vlm-1",
)
def align(config: AlignConfig, parallel: ParallelConfig, tracking: TrackingOptions, run: RunOptions) -> None:
    """Train a language model to process images, with a vision tower and a projector.

    The projector is trained first, then the whole model or LoRA. The loss is on answers and the end of their turns, or
    on the text that the chat template marks as generated; a template that rewrites earlier turns is an error. A special
    token in a turn's text (<|im_end|>), and <image> in a row without images, is encoded as text. An assistant turn
    before the first question is left out. A turn's only image or video moves to its front.

    Packed chat (--data, of pack-chat for the model of --init) trains on long rows of several samples: positions count
    through a row, and a token attends to all before it.

    Stage dpo reads rows of "image" or "video" (or "images", "videos", or neither), "prompt" (or "conversations"),
    "chosen" and "rejected", each text or messages.
    """
    from lvctx.training.align_job import resolve_align

    if config.plot is not None and config.plot.suffix not in (".png", ".svg"):
        raise UsageError("--plot needs a .png or .svg file", where=config.plot)
    job = resolve_align(config)
    facts = job.facts
    if run.dry_run:
        from lvctx.training.align_statistics import align_statistics, draw_statistics

        with progress("align: count") as on_progress:
            statistics = align_statistics(job, on_progress)
        emit({"dry_run": True, "path": str(config.out), **facts, **statistics.facts})
        if config.plot is not None:
            draw_statistics(statistics, config.plot)
        return
    from lvctx.training.dpo import align_task
    from lvctx.training.run_training import run_training

    with ExitStack() as stack:
        control = _control(stack, f"align {config.stage}", card_command("align", config), config.out, tracking, run)
        run_training(align_task(job), parallel, control)
    emit(artifact_row(schemas.MODEL, config.out, facts))


@command(
    "mrope-extend",
    "lvctx mrope-extend --model qwen2-vl --scale 4 --verify -o qwen2-vl-4x",
    "lvctx mrope-extend --model qwen2-vl --scale 2 --data shapes/full.json --media shapes --seq-len 1024 --steps 1 "
    "-o qwen2-vl-2x",
)
def mrope_extend(config: MropeConfig, parallel: ParallelConfig, tracking: TrackingOptions, run: RunOptions) -> None:
    """Extend the context of a Qwen-VL model with M-RoPE++.

    This is GIRAFFE's method. Without training the weights are linked, and only config.json changes.

    With --data the language model is trained at the new positions on long rows of chat samples. The tower and the
    merger after it are frozen unless --tower-lr or --merger-lr is given.
    """
    from lvctx.training.mrope_checkpoint import resolve_mrope, run_mrope

    if config.plot is not None and config.plot.suffix not in (".png", ".svg"):
        raise UsageError("--plot needs a .png or .svg file", where=config.plot)
    job = resolve_mrope(config, force=run.force)
    if job.note:
        say(f"lvctx: {job.note}")
    facts = job.describe()
    if config.frames is not None:
        facts["video"] = _count_video(config, config.frames)
    if config.allow_partial and (config.data is None or config.data.is_dir()):
        raise UsageError("--allow-partial is for samples that are not packed yet", fix="give it to pack-chat")
    if config.stages and config.data is None:
        raise UsageError("--stage needs a training", fix="give --data")
    if config.data is not None and not (run.dry_run and config.data.is_file()):
        facts |= _train_mrope(config, job.context, parallel, tracking, run)
    elif not run.dry_run:
        run_mrope(job, config.out, resume=run.resume, force=run.force, command=_mrope_command(config))
    if run.dry_run:
        emit({"dry_run": True, "path": str(config.out), **facts, "rope_parameters": job.rope})
        return
    if config.plot is not None:
        from lvctx.training.mrope_verify import draw_curves

        draw_curves(job.checkpoint.mrope, job.scaling, config.plot)
    if config.verify:
        facts["largest_relative_error"] = _verify(config.out)
    emit(artifact_row(schemas.MODEL, config.out, facts))


def _train_mrope(
    config: MropeConfig, context: int, parallel: ParallelConfig, tracking: TrackingOptions, run: RunOptions
) -> dict[str, Any]:
    """Pack the samples if needed, and train in one run or in stages; returns facts for the output row."""
    from lvctx.training.mrope_extend import pack_samples_file, resolve_mrope_training
    from lvctx.training.progressive import resolve_stages, run_stages, stage_configs

    if config.data is not None and config.data.is_file():
        if "WORLD_SIZE" in os.environ:
            raise UsageError("several processes need packed chat", fix="run lvctx pack-chat first")
        with progress("mrope-extend, packing") as on_progress:
            config = replace(config, data=pack_samples_file(config, config.seq_len or context, on_progress))

    resolve = partial(resolve_mrope_training, force=run.force)
    configs = stage_configs(config)
    jobs = resolve_stages(resolve, configs)
    stage_facts = [{**hashed_fields(job.config), "rows": len(job.rows)} for job in jobs]
    facts = {**jobs[-1].describe(), **stage_facts[-1], **({"stages": stage_facts} if config.stages else {})}
    if not run.dry_run:
        with ExitStack() as stack:
            control = _control(stack, "mrope-extend", _mrope_command(config), config.out, tracking, run)
            run_stages(configs, jobs, resolve, parallel, control)
    return facts


def _count_video(config: MropeConfig, frames: int) -> dict[str, Any]:
    """Tokens and positions of a video of `frames` frames."""
    from lvctx.video.hybrid import Hybrid
    from lvctx.video.sampling import VideoSampling
    from lvctx.vlm.registry import open_vlm

    try:
        width, height = map(int, config.size.lower().split("x"))
    except ValueError:
        raise UsageError(f"--size {config.size!r} is not WxH", fix="write 1280x720") from None
    hybrid = Hybrid.parse(config.hybrid) if config.hybrid else None
    sampling = VideoSampling(hybrid=hybrid, hybrid_mode=config.hybrid_mode, fps=config.fps)
    counts = open_vlm(config.model).count(frames, width, height, sampling)
    say(
        f"lvctx: {frames} frames of {config.size}: {counts['actual']} visual tokens (nominal {counts['nominal']}) "
        f"and {counts['delimiters']} delimiters, but the last position is {counts['last_position']}"
    )
    return {"frames": frames, "size": config.size, **counts}


def _verify(out: Path) -> float | None:
    """Compare the frequencies that transformers computes with the formula; returns the largest relative error."""
    from lvctx.training.mrope_verify import verify

    verified = verify(out)
    print_channels(verified)
    if not verified.holds:
        raise InputError(
            f"this transformers computes other frequencies (relative error {verified.error:.1e})",
            where=out,
            fix="please report it with the version of transformers",
        )
    return verified.error


def _mrope_command(config: MropeConfig) -> str:
    """The command line for the model card, without options that do not change the model."""
    return card_command("mrope-extend", replace(config, verify=False, plot=None, frames=None, size="1280x720"))


def _control(
    stack: ExitStack, label: str, command: str, out: Path, tracking: TrackingOptions, run: RunOptions
) -> RunControl:
    """The output, resume policy and callbacks of a training, until `stack` closes."""
    on_progress = stack.enter_context(progress(label))
    on_step = stack.enter_context(tracker(tracking, out))
    resume, force = run.resume, run.force
    return RunControl(out=out, resume=resume, force=force, on_progress=on_progress, on_step=on_step, command=command)


def _processes() -> int:
    """Number of processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def print_channels(verified: "Verified", *, stderr: bool = True) -> None:
    """A table of wavelengths, a row per channel."""
    table = number_table("channel", ("axis", "pretrained", "formula", "transformers"))
    for j, channel in enumerate(verified.channels):
        formula = "" if channel.formula is None else f"{channel.formula:,.1f}"
        table.add_row(str(j), channel.axis, f"{channel.plain:,.1f}", formula, f"{channel.wavelength:,.1f}")
    console = open_console(stderr=stderr)
    console.print("wavelengths, in positions")
    console.print(table)
    error = "formula not known" if verified.error is None else f"largest relative error {verified.error:.1e}"
    console.print(f"{error}; attention factor {verified.attention:g}")
