"""`lvctx extend-lm`: a language model in, the same model with a longer context out."""

import os
from dataclasses import asdict, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

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
    numbers,
    progress,
)
from lvctx.cli.tracking import Tracker, tracked
from lvctx.errors import UsageError

SEARCH = "Search for the base"


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
            "lvctx extend-lm --model lm --data packed --rope yarn --steps 1 --batch-tokens 2048 --dry-run -o lm-long",
        ),
    )(extend_lm)


def extend_lm(
    model: Annotated[str, typer.Option(help="Language model, or a VLM with one: directory or hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the extended model.")],
    data: Annotated[Path | None, typer.Option(help="Packed rows to train on (pack-text).")] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Cut rows into pieces of this length. Default: whole rows.", min=2)
    ] = None,
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
    attention_factor: Annotated[
        float | None,
        typer.Option(help="Sharper attention (yarn): cos and sin times this. Default: 0.1 ln(factor) + 1.", min=0.1),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Positions config.json promises. Default: the longer of model and rows.", min=2)
    ] = None,
    original_length: Annotated[
        int | None,
        typer.Option(
            help="Pretrained length in tokens (pi, ntk, yarn), where config.json does not have it. "
            "Default: as config.json has it.",
            min=2,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps; 0 changes the base only.", min=0)] = 1000,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a step, in whole rows.", min=1)] = 1_000_000,
    lr: Annotated[float, typer.Option(help="Learning rate (constant).", min=0.0)] = 1e-5,
    lora: Annotated[int, typer.Option(help="Rank of LoRA on attention; 0 trains all parameters.", min=0)] = 0,
    adapter: Annotated[
        Path | None, typer.Option(help="LoRA to start from: adapter/ of an earlier run; with --lora.")
    ] = None,
    checkpoint_activations: Annotated[
        bool, typer.Option(help="Recompute layers in the backward pass to save memory.")
    ] = True,
    doc_mask: Annotated[bool, typer.Option(help="Tokens attend in their own document only.")] = False,
    pose: Annotated[
        bool, typer.Option("--pose", help="Short rows stand for all of --context: cut in two, moved apart (PoSE).")
    ] = False,
    micro_tokens: Annotated[
        int, typer.Option(help="Tokens of one forward, in whole rows, at least one (speed, memory).", min=1)
    ] = 4096,
    cp: Annotated[int, typer.Option(help="Processes that share a row (context parallelism; torchrun).", min=1)] = 1,
    offload: Annotated[bool, typer.Option(help="Keep parameters and optimizer state in host memory.")] = False,
    offload_activations: Annotated[bool, typer.Option(help="Keep the layers' inputs in host memory.")] = False,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda.")] = "cpu",
    stages: Annotated[
        list[str] | None,
        typer.Option(
            "--stage",
            metavar="KEY=VALUE,...",
            help="One of several runs, each from the one before: seq-len, context, rope-theta, factor, steps, lr, "
            "batch-tokens, data. Repeat; a recipe writes [[extend-lm.stages]].",
        ),
    ] = None,
    search_base: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="Find --rope-theta: needles in --haystack.", rich_help_panel=SEARCH),
    ] = None,
    search_points: Annotated[int, typer.Option(help="Bases to try.", min=2, rich_help_panel=SEARCH)] = 5,
    search_lengths: Annotated[
        str, typer.Option(help="Tokens, comma-separated. Default: --context.", rich_help_panel=SEARCH)
    ] = "",
    search_depths: Annotated[
        str, typer.Option(help="Where needles go, 0 to 1.", rich_help_panel=SEARCH)
    ] = "0,0.25,0.5,0.75,1",
    search_trials: Annotated[int, typer.Option(help="Needles a cell.", min=1, rich_help_panel=SEARCH)] = 1,
    haystack: Annotated[
        list[Path] | None, typer.Option(help="Text to hide needles in: files or folders.", rich_help_panel=SEARCH)
    ] = None,
    log: Annotated[Tracker | None, typer.Option(help="Send curves there too; metrics.jsonl has them always.")] = None,
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
    from lvctx.stages.plan import predict_extend, refuse
    from lvctx.stages.progressive import parse_stage, plan_stages, run_stages

    make_plan = partial(
        plan_extend,
        model=model,
        data=data,
        rope=rope.value,
        rope_theta=rope_theta,
        factor=factor,
        attention_factor=attention_factor,
        context=context,
        original_length=original_length,
        seq_len=seq_len,
        steps=steps,
        batch_tokens=batch_tokens,
        lr=lr,
        lora=lora,
        adapter=adapter,
        checkpoint_activations=checkpoint_activations,
        doc_mask=doc_mask,
        pose=pose,
        seed=seed,
    )
    machine = Machine(
        device=device, cp=cp, offload=offload, offload_activations=offload_activations, micro_tokens=micro_tokens
    )
    world = int(os.environ.get("WORLD_SIZE", 1))
    found: dict[str, Any] = {}
    if search_base:
        if world > 1:
            raise UsageError("--search-base runs in one process", fix="search first, then give torchrun --rope-theta")
        if rope != Rope.theta or rope_theta or stages:
            raise UsageError("--search-base is for --rope theta alone", fix="drop --rope, --rope-theta and --stage")
        from lvctx.stages.search import best, plan_search, run_search

        lengths = search_lengths or str(context or "")
        search = plan_search(
            model=model,
            span=search_base,
            points=search_points,
            haystack=haystack or [],
            lengths=[int(n) for n in numbers("--search-lengths", lengths)],
            depths=numbers("--search-depths", search_depths),
            trials=search_trials,
            seed=seed,
        )
        if dry_run:
            emit({"dry_run": True, "path": str(out), "bases": search.bases, **search.niah.costs()})
            return
        with progress("extend-lm --search-base", quiet=quiet) as report:
            table = run_search(search, out, device=device, force=force, report=report)
        make_plan = partial(make_plan, rope_theta=best(table))
        shown = ("base", "accuracy", "log_prob")
        found = {"search": {"lengths": lengths, "table": [{key: row[key] for key in shown} for row in table]}}
    if adapter and stages:
        raise UsageError("--adapter is where one run starts, and each stage starts from the one before", fix="drop one")
    flags = [parse_stage(stage) for stage in stages] if stages else [{}]
    plans = plan_stages(make_plan, flags, seed=seed)
    facts = {"original_context": plans[0].original_context, **asdict(plans[-1].config), **found}
    if stages:
        facts["stages"] = [asdict(plan.config) for plan in plans]
    if dry_run:
        rows: dict[str, list[Any]] = {
            "rows": [len(p.data) if p.data else 0 for p in plans],
            "epochs": [round(p.epochs, 3) for p in plans],
        }
        facts |= rows if stages else {key: value[0] for key, value in rows.items()}
        farthest = max(plans, key=lambda p: p.config.seq_len)
        predicted = predict_extend(farthest, machine, world=max(world, cp))
        emit({"dry_run": True, "path": str(out), **facts, "predicted": predicted})
        if predicted:
            refuse(predicted)
        return
    how: dict[str, Any] = {"resume": resume, "force": force, "machine": machine}
    with progress("extend-lm", quiet=quiet) as shown_there, tracked(shown_there, log, out) as report:
        if stages:
            run_stages(make_plan, flags, out, seed=seed, report=report, **how)
        else:
            run_extend(replace(plans[0], found=found), out, report=report, **how)
    emit({"schema": schemas.MODEL, "path": str(out), "sha256": sha256_file(out / MANIFEST), **facts})
