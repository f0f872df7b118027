"""Predicts the memory and time of a training run per device, with flags that help if it does not fit."""

import os
from bisect import bisect_left
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

from lvctx.device import resolve_dtype
from lvctx.errors import InputError, UsageError
from lvctx.models.loading import read_config
from lvctx.training.decoder_shape import PLANNED_TYPES, DecoderShape, read_shape
from lvctx.training.memory_model import (
    DEVICES,
    GIB,
    Device,
    Recomputation,
    Spread,
    flops,
    known_device,
    least_recomputation,
    longest,
    memory,
    remedies,
    rows_together,
)
from lvctx.training.parallel_config import CPU_TOKENS, GPU_TOKENS
from lvctx.training.plan_config import DeviceKind, PlanConfig

if TYPE_CHECKING:
    from lvctx.training.extend import ExtendJob
    from lvctx.training.parallel_config import Checkpointing, ParallelConfig


def predict(config: PlanConfig) -> dict[str, Any]:
    """Bytes per device and part, host bytes, operations, hours, longest row. Raises UsageError and InputError.

    `fits` states whether it fits; see `refuse`.
    """
    if config.world % config.cp:
        raise UsageError(f"--cp {config.cp} does not divide --world {config.world}")
    if config.cp == 1 and config.cp_kind != "ring":
        raise UsageError(f"--cp-kind {config.cp_kind} has no effect with --cp 1", fix="raise --cp, or drop it")
    rows = max(1, config.batch_tokens // config.seq_len)
    spread = Spread(
        world=config.world,
        cp=config.cp,
        cp_kind=config.cp_kind,
        rows=-(-rows * config.cp // config.world),
        offload=config.offload,
        offload_activations=config.offload_activations,
        lora=config.lora,
        compute_bytes=4 if config.dtype == "float32" else 2,
    )
    shape = read_shape(read_config(config.model), where=config.model)
    if shape.sliding_layers and spread.ring(shape.key_heads) > 1:
        raise InputError("its attention has a sliding window", where=config.model, fix="give --cp-kind ulysses")
    if config.cp_kind == "ulysses" and shape.heads % config.cp:
        what = f"--cp {config.cp} does not divide its {shape.heads} attention heads"
        raise InputError(what, where=config.model, fix="give a --cp that divides them, or --cp-kind ring")
    preset = DEVICES[config.device]
    device = replace(preset, memory=config.device_memory or preset.memory)
    together = _rows_of_a_forward(config, shape, spread, device)
    spread, farthest = _recomputation(config.checkpoint_activations, shape, spread, together * config.seq_len, device)
    parts, peak, host = memory(shape, spread, together * config.seq_len, runtime=device.runtime)
    tokens = rows * config.seq_len
    work = flops(shape, config.seq_len, tokens, lora=bool(spread.lora))
    speed = spread.world * device.flops * config.mfu
    return {
        "parameters": shape.parameters,
        "trained": shape.lora(spread.lora) if spread.lora else shape.parameters,
        "seq_len": config.seq_len,
        "tokens_a_step": tokens,
        "rows_a_forward": together,
        **asdict(spread),
        "device": config.device,
        "device_memory": device.memory,
        "bytes": parts,
        "peak_bytes": peak,
        "host_bytes": host * spread.world,
        "fits": peak <= device.memory,
        "longest": longest(shape, farthest, device),
        "longest_with_full_logits": longest(shape, replace(farthest, full_logits=True), device),
        "flops_a_step": work,
        "mfu": config.mfu,
        "seconds_a_step": round(work / speed, 2) if speed else None,
        "hours": round(config.steps * work / speed / 3600, 2) if speed else None,
        "helps": _helps(shape, spread, together * config.seq_len, device) if peak > device.memory else [],
    }


def _rows_of_a_forward(config: PlanConfig, shape: DecoderShape, spread: Spread, device: Device) -> int:
    """`rows_together` of the given tokens, or of the default's.

    By default on a GPU they fit into the usable memory, and no more is recomputed than for one row.
    """
    on_gpu = config.device != "cpu"
    most = rows_together(config.seq_len, config.micro_tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS), spread.rows)
    if config.micro_tokens or not on_gpu:
        return most

    def found(rows: int) -> Spread:
        return _recomputation(config.checkpoint_activations, shape, spread, rows * config.seq_len, device)[0]

    def is_too_much(rows: int) -> bool:
        if found(rows) != found(1):
            return True
        peak = memory(shape, found(1), rows * config.seq_len, runtime=device.runtime)[1]
        return peak > device.usable * device.memory

    return 1 + bisect_left(range(2, most + 1), True, key=is_too_much)


def _recomputation(
    choice: "Checkpointing", shape: DecoderShape, spread: Spread, seq_len: int, device: Device
) -> tuple[Spread, Spread]:
    """The spread with what the backward pass recomputes at this length, and at the longest that fits."""
    tiles = replace(spread, recomputation=Recomputation(mlp_tiles=True))
    if choice == "auto":
        return replace(spread, recomputation=least_recomputation(shape, spread, seq_len, device)), tiles
    if choice == "tiles":
        return tiles, tiles
    found = replace(spread, recomputation=Recomputation(kept_layers=shape.layers if choice == "none" else 0))
    return found, found


def predict_extend(job: "ExtendJob", parallel: "ParallelConfig", *, world: int) -> dict[str, Any] | None:
    """`predict` for a checked run on this machine's devices; None without training or for an unsupported model.

    The bytes of a stage are those for its own rows.
    """
    config = job.config
    raw = read_config(job.model)
    if job.data is None or raw.get("model_type") not in PLANNED_TYPES:
        return None
    name, capacity = _this_device(parallel.device, world)
    return predict(
        PlanConfig(
            model=str(job.model),
            seq_len=job.data.seq_len,
            batch_tokens=config.batch_tokens,
            steps=config.steps,
            world=world,
            cp=parallel.cp,
            cp_kind=parallel.cp_kind,
            checkpoint_activations=parallel.checkpoint_activations,
            offload=parallel.offload,
            offload_activations=parallel.offload_activations,
            lora=config.lora,
            dtype=resolve_dtype(parallel.dtype, name),
            device=name,
            device_memory=capacity,
            micro_tokens=1 if config.doc_mask else parallel.micro_tokens,
            mfu=0.35,
        )
    )


def _this_device(device: str, world: int) -> tuple[DeviceKind, int]:
    """Key of `training.memory_model.DEVICES` and bytes of a run's device; an unknown GPU counts as an A100.

    Processes on CPUs count as processes of one machine, which share its memory.
    """
    from lvctx.device import resolve_device

    device = resolve_device(device)
    if not device.startswith("cuda"):
        return "cpu", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // world
    import torch

    properties = torch.cuda.get_device_properties(torch.device(device))
    kind = cast(DeviceKind | None, known_device(properties.name))
    return kind or "a100", int(properties.total_memory)


def _helps(shape: Any, spread: Spread, seq_len: int, device: Device) -> list[dict[str, Any]]:
    peaks = remedies(shape, spread, seq_len, device)
    return [{"flag": flag, "peak_bytes": peak, "fits": peak <= device.memory} for flag, peak in peaks]


def refuse(prediction: dict[str, Any]) -> None:
    """Raise InputError for a run that does not fit, naming flags that help."""
    if prediction["fits"]:
        return
    needed, there = prediction["peak_bytes"] / GIB, prediction["device_memory"] / GIB
    helps = prediction["helps"]
    enough = [remedy for remedy in helps if remedy["fits"]]
    flags = [f"{remedy['flag']} ({remedy['peak_bytes'] / GIB:.1f} GiB)" for remedy in enough or helps]
    if enough:
        fix = f"it fits with {' or '.join(flags)}"
    elif flags:
        fix = (
            f"one flag is not enough: {', '.join(flags)}; the longest row that fits has {prediction['longest']} tokens"
        )
    else:
        fix = f"the longest row that fits has {prediction['longest']} tokens"
    raise InputError(
        f"{prediction['seq_len']} tokens per row need {needed:.1f} GiB per device, which has {there:.1f}", fix=fix
    )
