"""`lvctx mrope-extend`: a Qwen-VL checkpoint in, the same weights with positions that reach further out."""

import os
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvctx.cli.common import (
    VIDEO,
    AllowPartialOption,
    DryRunOption,
    ForceOption,
    QuietOption,
    RecipeOption,
    Resume,
    ResumeOption,
    SeedOption,
    VerboseOption,
    emit,
    examples,
    progress,
    say,
)
from lvctx.vision.hybrid import Hybrid, HybridMode
from lvctx.vision.sampling import VideoSampling

if TYPE_CHECKING:
    from lvctx.stages.mrope_verify import Verified


CountOptions = "Tokens and positions of a video"
TrainOptions = "Training"


class RampChoice(StrEnum):
    """How height goes over from time to width."""

    linear = "index"
    wavelength = "wavelength"
    ntk = "ntk"


class MethodChoice(StrEnum):
    """Ways to stretch."""

    mrope_pp = "mrope++"
    pi = "pi"
    ntk = "ntk"
    yarn = "yarn"
    none = "none"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "mrope-extend",
        rich_help_panel=VIDEO,
        epilog=examples(
            "lvctx mrope-extend --model qwen2-vl --scale 4 --verify -o qwen2-vl-4x",
            "lvctx mrope-extend --model qwen2-vl --scale 2 --data shapes/full.json --media shapes --seq-len 1024 "
            "--steps 1 -o qwen2-vl-2x",
        ),
    )(mrope_extend)


def mrope_extend(
    model: Annotated[str, typer.Option(help="Qwen2-VL, Qwen2.5-VL or Qwen3-VL: directory or hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the stretched model.")],
    scale: Annotated[float, typer.Option(help="New length over pretrained length; at least 1.")],
    original_length: Annotated[
        int | None, typer.Option(help="Pretrained length, in tokens. Default: what config.json says.", min=2)
    ] = None,
    method: Annotated[
        MethodChoice | None,
        typer.Option(help="none: direct extrapolation. Default: mrope++; yarn for Qwen3-VL."),
    ] = None,
    ramp: Annotated[
        RampChoice, typer.Option(help="mrope++: linear in channel, in wavelength, or as the authors' code.")
    ] = RampChoice.linear,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every channel in transformers with the formula.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw all methods' frequencies to a .png or .svg.")] = None,
    frames: Annotated[
        int | None, typer.Option(help="Count a video of this many frames.", min=1, rich_help_panel=CountOptions)
    ] = None,
    size: Annotated[str, typer.Option(metavar="WxH", help="Its size.", rich_help_panel=CountOptions)] = "1280x720",
    fps: Annotated[float, typer.Option(help="Its frames a second.", min=0.001, rich_help_panel=CountOptions)] = 2.0,
    hybrid: Annotated[
        str | None,
        typer.Option(metavar="L,M,S", help="As for vqa; of training too. [1,240,1]", rich_help_panel=CountOptions),
    ] = None,
    hybrid_mode: Annotated[HybridMode, typer.Option(help="As for vqa.", rich_help_panel=CountOptions)] = "pair",
    data: Annotated[
        Path | None,
        typer.Option(help="Train on this: packed chat, or a JSON/JSONL of chat samples.", rich_help_panel=TrainOptions),
    ] = None,
    media: Annotated[
        Path, typer.Option(help="Folder that the samples' paths are relative to.", rich_help_panel=TrainOptions)
    ] = Path("."),
    allow_partial: AllowPartialOption = False,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens of a row. [the packed rows'; SCALE x length]", rich_help_panel=TrainOptions),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1, rich_help_panel=TrainOptions)] = 100,
    batch: Annotated[int, typer.Option(help="Rows a step.", min=1, rich_help_panel=TrainOptions)] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TrainOptions)] = 1e-4,
    warmup: Annotated[
        float, typer.Option(help="Fraction of the steps.", min=0, max=1, rich_help_panel=TrainOptions)
    ] = 0.03,
    lora: Annotated[
        int, typer.Option(help="Rank; 0 trains the whole language model.", min=0, rich_help_panel=TrainOptions)
    ] = 16,
    checkpoint_activations: Annotated[
        bool, typer.Option(help="Recompute layers in the backward pass.", rich_help_panel=TrainOptions)
    ] = True,
    stages: Annotated[
        list[str] | None,
        typer.Option(
            "--stage",
            metavar="KEY=VALUE,...",
            help="A stage of progressive training: "
            + "scale, data, seq-len, steps, batch, lr. Repeat; a recipe writes [[mrope-extend.stages]].",
            rich_help_panel=TrainOptions,
        ),
    ] = None,
    cp: Annotated[
        int, typer.Option(help="Processes that share a row (torchrun).", min=1, rich_help_panel=TrainOptions)
    ] = 1,
    offload: Annotated[
        bool, typer.Option(help="Keep parameters in host memory.", rich_help_panel=TrainOptions)
    ] = False,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda.", rich_help_panel=TrainOptions)] = "cpu",
    recipe: RecipeOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = Resume.auto,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Stretch the positions of a Qwen-VL model with M-RoPE++ (GIRAFFE). Weights are linked, config.json changes.

    With --data the language model is trained at the new positions on long rows of chat samples; the tower is frozen.
    """
    from lvctx.artifacts import schemas
    from lvctx.artifacts.manifest import MANIFEST
    from lvctx.artifacts.store import sha256_file
    from lvctx.errors import InputError, UsageError
    from lvctx.stages.mrope import plan_mrope, run_mrope
    from lvctx.stages.mrope_verify import draw_curves
    from lvctx.stages.mrope_verify import verify as verify_model

    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise UsageError("--plot draws .png or .svg", where=plot)
    stretch: dict[str, Any] = {
        "model": model,
        "scale": scale,
        "original_length": original_length,
        "method": method.value if method else None,
        "ramp": ramp.value,
    }
    plan = plan_mrope(**stretch, force=force)
    if plan.note:
        say(f"lvctx: {plan.note}")
    facts: dict[str, Any] = {**asdict(plan.stretch), "context": plan.context}
    sampling = VideoSampling(hybrid=Hybrid.parse(hybrid) if hybrid else None, hybrid_mode=hybrid_mode)
    if frames is not None:
        from lvctx.vlm.registry import open_vlm

        try:
            width, height = map(int, size.lower().split("x"))
        except ValueError:
            raise UsageError(f"--size {size!r} is not WxH", fix="write 1280x720") from None
        counted = open_vlm(model).count(frames, width, height, replace(sampling, fps=fps))
        facts["video"] = {"frames": frames, "size": size, **counted}
        say(
            f"lvctx: {frames} frames of {size}: {counted['actual']} visual tokens (nominal {counted['nominal']}) and "
            f"{counted['delimiters']} delimiters, but positions end at {counted['last_position']}"
        )
    train = None
    if allow_partial and (data is None or data.is_dir()):
        raise UsageError("--allow-partial is for videos of samples that are packed here", fix="give it to pack-chat")
    if stages and data is None:
        raise UsageError("--stage is for training", fix="give --data")
    if data is not None and not (dry_run and data.is_file()):
        from lvctx.stages.extend import Machine
        from lvctx.stages.mrope_train import STAGE_KEYS, pack_samples, plan_stage, run_training, unite
        from lvctx.stages.progressive import parse_stage, plan_stages, run_stages

        asked = sampling.resolution
        if data.is_file():
            if "WORLD_SIZE" in os.environ:
                raise UsageError("several processes train on packed chat", fix="lvctx pack-chat first")
            length = seq_len or plan.context
            with progress("mrope-extend, packing", quiet=quiet) as report:
                packing: dict[str, Any] = {
                    "model": model,
                    "media": media,
                    "hybrid": asked,
                    "fps": fps,
                    "allow_partial": allow_partial,
                }
                data = pack_samples(data, out, seq_len=length, seed=seed, report=report, **packing)
        options: dict[str, Any] = {
            **stretch,
            "data": data,
            "media": media,
            "seq_len": seq_len,
            "hybrid": asked,
            "steps": steps,
            "batch": batch,
            "lr": lr,
            "warmup": warmup,
            "lora": lora,
            "checkpoint_activations": checkpoint_activations,
        }

        def planned(**flags: Any) -> Any:
            # A stage goes on from what the one before stretched.
            return plan_stage(**(options | flags), force=force or "model" in flags)

        flags = [parse_stage(stage, STAGE_KEYS) for stage in stages] if stages else [{}]
        runs = plan_stages(planned, flags, seed=seed)
        plan = runs[-1].plan
        trained = [{**asdict(run.training.config), "rows": len(run.training.rows)} for run in runs]
        facts = {**facts, **asdict(plan.stretch), "context": plan.context, **trained[-1]}
        facts |= {"stages": trained} if stages else {}

        def train() -> None:
            machine = Machine(device=device, cp=cp, offload=offload)
            how: dict[str, Any] = {"resume": resume, "force": force, "machine": machine}
            with progress("mrope-extend", quiet=quiet) as report:
                if stages:
                    how |= {"run": run_training, "unite": unite}
                    run_stages(planned, flags, out, seed=seed, report=report, **how)
                else:
                    run_training(runs[0], out, report=report, **how)

    if dry_run:
        emit({"dry_run": True, "path": str(out), **facts, "rope_parameters": plan.rope})
        return
    if train is None:
        run_mrope(plan, out, resume=resume, force=force)
    else:
        train()
    if plot is not None:
        draw_curves(plan.checkpoint.mrope, plan.stretch, plot)
    if verify:
        verified = verify_model(out)
        print_channels(verified)
        facts["largest_relative_error"] = verified.error
        if not verified.holds:
            raise InputError(
                f"this transformers computes other frequencies (relative error {verified.error:.1e})",
                where=out,
                fix="report it with the version of transformers",
            )
    emit({"schema": schemas.MODEL, "path": str(out), "sha256": sha256_file(out / MANIFEST), **facts})


def print_channels(verified: "Verified", *, stderr: bool = True) -> None:
    """A table of wavelengths, a line for each channel."""
    from rich.console import Console
    from rich.table import Table

    table = Table("channel", "axis", box=None, pad_edge=False)
    for name in ("pretrained", "formula", "transformers"):
        table.add_column(name, justify="right")
    for j, channel in enumerate(verified.channels):
        formula = "" if channel.formula is None else f"{channel.formula:,.1f}"
        table.add_row(str(j), channel.axis, f"{channel.plain:,.1f}", formula, f"{channel.wavelength:,.1f}")
    console = Console(stderr=stderr)
    console.print("wavelengths, in positions", highlight=False)
    console.print(table)
    error = "formula not known" if verified.error is None else f"largest relative error {verified.error:.1e}"
    console.print(f"{error}; attention factor {verified.attention:g}", highlight=False)
