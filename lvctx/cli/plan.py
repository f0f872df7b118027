"""`lvctx plan`: what a training run needs on each device and how long it takes, before it runs."""

import re
from enum import StrEnum
from typing import Annotated, Any

import typer

from lvctx.cli.common import TOOLS, QuietOption, RecipeOption, emit, examples, say
from lvctx.errors import UsageError


class Stage(StrEnum):
    """Commands that can be planned."""

    extend_lm = "extend-lm"


class Hardware(StrEnum):
    """Devices whose memory and peak are known."""

    a100 = "a100"
    h100 = "h100"
    h200 = "h200"
    cpu = "cpu"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "plan",
        rich_help_panel=TOOLS,
        epilog=examples(
            "lvctx plan extend-lm --model lm --seq-len 4096 --device cpu",
            "lvctx plan extend-lm --model lm --seq-len 262144 --world 8 --cp 8 --device-memory 80GiB",
        ),
    )(plan)


def plan(
    stage: Annotated[Stage, typer.Argument(help="What is to run.")],
    model: Annotated[str, typer.Option(help="Directory, config.json or hub id; weights are not read.")],
    seq_len: Annotated[int, typer.Option(help="Tokens of a row.", min=2)],
    world: Annotated[int, typer.Option(help="Devices.", min=1)] = 1,
    cp: Annotated[int, typer.Option(help="Devices that share a row.", min=1)] = 1,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a step, in whole rows.", min=1)] = 1_000_000,
    micro_tokens: Annotated[
        int, typer.Option(help="Tokens of one forward, in whole rows, at least one.", min=1)
    ] = 4096,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 1000,
    lora: Annotated[int, typer.Option(help="Rank of LoRA on attention; 0 trains all parameters.", min=0)] = 0,
    checkpoint_activations: Annotated[bool, typer.Option(help="Layers are recomputed in the backward pass.")] = True,
    offload: Annotated[bool, typer.Option(help="Parameters and optimizer state wait on the host.")] = False,
    offload_activations: Annotated[bool, typer.Option(help="Layers' inputs wait on the host.")] = False,
    device: Annotated[Hardware, typer.Option(help="Whose memory and peak.")] = Hardware.a100,
    device_memory: Annotated[
        str | None, typer.Option(help="Of one device, e.g. 80GiB or 24GB. Default: the device's.")
    ] = None,
    mfu: Annotated[float, typer.Option(help="Share of the device's peak that is reached.", min=0.01, max=1.0)] = 0.35,
    recipe: RecipeOption = None,
    quiet: QuietOption = False,
) -> None:
    """Predict memory, work and time of a run from config.json alone. Exits 3 if it cannot fit, and says what helps."""
    from lvctx.stages.plan import PlanConfig, Spread, predict, refuse

    found = predict(
        PlanConfig(
            model=model,
            seq_len=seq_len,
            batch_tokens=max(batch_tokens, seq_len),
            micro_tokens=micro_tokens,
            steps=steps,
            spread=Spread(
                world=world,
                cp=cp,
                checkpointing=checkpoint_activations,
                offload=offload,
                offload_activations=offload_activations,
                lora=lora,
            ),
            device=device.value,
            device_memory=_bytes(device_memory) if device_memory else None,
            mfu=mfu,
        )
    )
    emit({"stage": stage.value, **found})
    if not quiet:
        _tell(found)
    refuse(found)


def _bytes(text: str) -> int:
    units = {"GiB": 1 << 30, "GB": 10**9, "MiB": 1 << 20, "MB": 10**6}
    match = re.fullmatch(r"([0-9.]+) ?(GiB|GB|MiB|MB)", text)
    if match is None:
        raise UsageError(f"--device-memory {text!r}", fix="write it as 80GiB or 24GB")
    return int(float(match[1]) * units[match[2]])


def _tell(found: dict[str, Any]) -> None:
    for part, size in found["bytes"].items():
        say(f"{part.replace('_', ' '):>24}  {size / (1 << 30):8.2f} GiB")
    peak, there, host = (found[key] / (1 << 30) for key in ("peak_bytes", "device_memory", "host_bytes"))
    say(f"{'peak of one device':>24}  {peak:8.2f} GiB of {there:.0f}")
    say(f"{'host':>24}  {host:8.2f} GiB")
    full = f"{found['longest_with_full_logits']} with full logits"
    say(f"{'longest row that fits':>24}  {found['longest']} tokens ({full})")
    time = "" if found["hours"] is None else f", {found['seconds_a_step']:.0f} s at {100 * found['mfu']:.0f}% MFU"
    say(f"{'a step':>24}  {found['tokens_a_step']} tokens, {found['flops_a_step']:.3g} FLOPs{time}")
    if found["hours"] is not None:
        say(f"{'all steps':>24}  {found['hours']} h")
