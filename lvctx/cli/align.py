"""`lvctx align`: a language model and a tower in, a vision-language model out."""

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


class Stage(StrEnum):
    """What is trained."""

    projector = "projector"
    full = "full"
    dpo = "dpo"


class Encoding(StrEnum):
    """How an image becomes tokens."""

    unires = "unires"
    anyres = "anyres"
    single = "single"


class Rule(StrEnum):
    """Which UniRes: the released code's or the paper's."""

    code = "code"
    paper = "paper"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "align",
        rich_help_panel=PIPELINE,
        epilog=examples(
            "lvctx align --lm lm-32k --tower tower --data shapes/projector.json --images shapes --steps 2 -o vlm-0",
            "lvctx align --stage full --init vlm --data shapes/full.json --images shapes --lora 16 --dry-run -o vlm-1",
        ),
    )(align)


def align(
    data: Annotated[
        Path,
        typer.Option(
            help="LLaVA rows or OpenAI messages, or for dpo preference pairs: JSON, JSONL, Parquet, a folder that "
            "`datasets` saved, or a hub id. Pictures in the rows are written to --images."
        ),
    ],
    images: Annotated[Path, typer.Option(help="Folder that the image paths are relative to.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the aligned model.")],
    stage: Annotated[
        Stage,
        typer.Option(help="projector: the MLP alone. full: the whole model. dpo: the same, on preferences."),
    ] = Stage.projector,
    lm: Annotated[str | None, typer.Option(help="Language model: directory or hub id.")] = None,
    tower: Annotated[str | None, typer.Option(help="CLIP or SigLIP tower: directory or hub id.")] = None,
    init: Annotated[str | None, typer.Option(help="VLM to go on from, instead of --lm and --tower.")] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="adapter/ of an earlier run with --lora, to start from; the later one wins."),
    ] = None,
    grid: Annotated[
        Encoding | None,
        typer.Option(
            help="unires: its grids, each like a video's frame. anyres: a base and at most 4 grids "
            "(LLaVA-NeXT). single: one grid. Default: what --init says, else unires."
        ),
    ] = None,
    grid_rule: Annotated[
        Rule | None,
        typer.Option(help="UniRes as the released code or as the paper. Default: what --init says, else code."),
    ] = None,
    max_grids: Annotated[
        int | None,
        typer.Option(help="UniRes's grids an image at most. Default: what --init says, else LongVA's 49.", min=2),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", min=1)] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. Default: 1, dpo 3.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Samples a step. Default: 128 projector, 32 full, 128 dpo.", min=1)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak rate. Default: 1e-3 projector, 1e-5 full, 5e-7 dpo.")] = None,
    projector_lr: Annotated[
        float | None, typer.Option(help="Projector's peak rate in full and dpo; 0 freezes it. Default: --lr.", min=0)
    ] = None,
    tower_lr: Annotated[
        float | None, typer.Option(help="Tower's peak rate; 0 freezes it. Default: 2e-6 in stage full, else 0.", min=0)
    ] = None,
    warmup: Annotated[float, typer.Option(help="Fraction of the steps before the decay.", min=0, max=1)] = 0.03,
    lora: Annotated[int, typer.Option(help="Rank of LoRA on the LM in full and dpo; 0 trains all.", min=0)] = 0,
    beta: Annotated[float | None, typer.Option(help="Of dpo: how firmly to stay near --init. Default: 0.1.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens after which a sample is cut.", min=2)] = 32_768,
    pose: Annotated[
        bool,
        typer.Option("--pose", help="Short samples stand for all of the LM's context: cut in two, moved apart (PoSE)."),
    ] = False,
    micro_tokens: Annotated[int, typer.Option(help="Tokens of one forward (speed, memory).", min=1)] = 4096,
    checkpoint_activations: Annotated[
        bool, typer.Option(help="Recompute the LM's layers in the backward pass: less memory, a third more time.")
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
    """Teach a language model to see with single images: the projector first, then the whole model or LoRA.

    Answers and the end of their turn are learned, or what the chat template marks as generated; a template that
    rewrites earlier turns is refused. The text of a special token in a turn (<|im_end|>), and <image> in a row
    without images, is encoded as plain text. An assistant turn before the first question is left out.

    Stage dpo then reads rows of "image" (or "images", or neither), "prompt" (or "conversations"), "chosen" and
    "rejected", each text or messages.
    """
    from lvctx.artifacts import schemas
    from lvctx.artifacts.manifest import MANIFEST
    from lvctx.artifacts.store import sha256_file
    from lvctx.stages.align import run_align
    from lvctx.stages.align_plan import count_tokens, plan_align

    plan = plan_align(
        stage=stage.value,
        lm=lm,
        tower=tower,
        init=init,
        adapters=adapter or (),
        data=data,
        images=images,
        grid=grid.value if grid else None,
        grid_rule=grid_rule.value if grid_rule else None,
        max_grids=max_grids,
        steps=steps,
        epochs=epochs,
        batch=batch,
        lr=lr,
        projector_lr=projector_lr,
        tower_lr=tower_lr,
        warmup=warmup,
        lora=lora,
        beta=beta,
        max_length=max_length,
        pose=pose,
        seed=seed,
    )
    facts = {"samples": len(plan.rows), **asdict(plan.config)}
    if dry_run:
        with progress("align: count", quiet=quiet) as report:
            emit({"dry_run": True, "path": str(out), **facts, **count_tokens(plan, report)})
        return
    with progress(f"align {stage.value}", quiet=quiet) as report:
        run_align(
            plan,
            out,
            resume=resume,
            force=force,
            micro_tokens=micro_tokens,
            checkpoint_activations=checkpoint_activations,
            device=device,
            report=report,
        )
    emit({"schema": schemas.MODEL, "path": str(out), "sha256": sha256_file(out / MANIFEST), **facts})
