"""`lvctx extend-lm`: a language model in, the same model with a longer context out."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lvctx.cli.common import (
    PIPELINE,
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
)


class Rope(StrEnum):
    """How positions change."""

    theta = "theta"
    pi = "pi"
    ntk = "ntk"
    yarn = "yarn"
    none = "none"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "extend-lm",
        rich_help_panel=PIPELINE,
        epilog=examples(
            "lvctx extend-lm --model lm --rope-theta 250000 --context 32768 --steps 0 -o lm-rope",
            "lvctx extend-lm --model lm --data packed --rope-theta 250000 --steps 1 --dry-run -o lm-long",
        ),
    )(extend_lm)


def extend_lm(
    model: Annotated[str, typer.Option(help="Language model: directory or hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the extended model.")],
    data: Annotated[Path | None, typer.Option(help="Packed rows to train on (pack-text).")] = None,
    rope: Annotated[
        Rope,
        typer.Option(help="Positions: a new base (theta), stretched (pi, ntk, yarn), or as they are (none)."),
    ] = Rope.theta,
    rope_theta: Annotated[
        float | None, typer.Option(help="RoPE base. Default: 1e9 with --rope theta, else the model's.", min=1.0)
    ] = None,
    factor: Annotated[
        float | None,
        typer.Option(help="Times the pretrained length (pi, ntk, yarn). Default: up to --context.", min=1.0),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Positions config.json promises. Default: the longer of model and rows.", min=2)
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps; 0 changes the base only.", min=0)] = 1000,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a step, in whole rows.", min=1)] = 1_000_000,
    lr: Annotated[float, typer.Option(help="Learning rate (constant).", min=0.0)] = 1e-5,
    lora: Annotated[int, typer.Option(help="Rank of LoRA on attention; 0 trains all parameters.", min=0)] = 0,
    checkpoint_activations: Annotated[
        bool, typer.Option(help="Recompute layers in the backward pass to save memory.")
    ] = True,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda.")] = "cpu",
    recipe: RecipeOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = Resume.auto,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Give a language model a longer context: a new RoPE base, then training on long packed text."""
    from lvctx.artifacts import schemas
    from lvctx.artifacts.manifest import MANIFEST
    from lvctx.artifacts.store import sha256_file
    from lvctx.stages.extend import plan_extend, run_extend

    plan = plan_extend(
        model=model,
        data=data,
        rope=rope.value,
        rope_theta=rope_theta,
        factor=factor,
        context=context,
        steps=steps,
        batch_tokens=batch_tokens,
        lr=lr,
        lora=lora,
        checkpoint_activations=checkpoint_activations,
        seed=seed,
    )
    facts = {"original_context": plan.original_context, **asdict(plan.config)}
    if dry_run:
        emit({"dry_run": True, "path": str(out), **facts, "rows": len(plan.data) if plan.data else 0})
        return
    with progress("extend-lm", quiet=quiet) as report:
        run_extend(plan, out, resume=resume, force=force, device=device, report=report)
    emit({"schema": schemas.MODEL, "path": str(out), "sha256": sha256_file(out / MANIFEST), **facts})
