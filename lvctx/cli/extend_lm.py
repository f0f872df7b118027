"""`lvctx extend-lm`: a language model in, the same model with a longer context out."""

from dataclasses import asdict
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
    rope_theta: Annotated[float, typer.Option(help="New RoPE base.", min=1.0)] = 1e9,
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
    doc_mask: Annotated[bool, typer.Option(help="Tokens attend in their own document only.")] = False,
    cp: Annotated[int, typer.Option(help="Processes that share a row (context parallelism; torchrun).", min=1)] = 1,
    offload: Annotated[bool, typer.Option(help="Keep parameters and optimizer state in host memory.")] = False,
    offload_activations: Annotated[bool, typer.Option(help="Keep the layers' inputs in host memory.")] = False,
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
    from lvctx.stages.extend import Machine, plan_extend, run_extend

    plan = plan_extend(
        model=model,
        data=data,
        rope_theta=rope_theta,
        context=context,
        steps=steps,
        batch_tokens=batch_tokens,
        lr=lr,
        lora=lora,
        checkpoint_activations=checkpoint_activations,
        doc_mask=doc_mask,
        seed=seed,
    )
    facts = {"original_context": plan.original_context, **asdict(plan.config)}
    if dry_run:
        emit({"dry_run": True, "path": str(out), **facts, "rows": len(plan.data) if plan.data else 0})
        return
    machine = Machine(device=device, cp=cp, offload=offload, offload_activations=offload_activations)
    with progress("extend-lm", quiet=quiet) as report:
        run_extend(plan, out, resume=resume, force=force, machine=machine, report=report)
    emit({"schema": schemas.MODEL, "path": str(out), "sha256": sha256_file(out / MANIFEST), **facts})
