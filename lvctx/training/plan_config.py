"""Configuration of `plan`: a training whose memory and time are predicted."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from lvctx.config import Flag
from lvctx.device import CpKind
from lvctx.training.parallel_config import Checkpointing

DeviceKind = Literal["a100", "h100", "h200", "cpu"]
"""Devices whose memory and peak speed are known; see `training.memory_model.DEVICES`."""


def parse_bytes(text: str) -> int:
    """`80GiB` or `24GB`. Raises ValueError."""
    units = {"GiB": 1 << 30, "GB": 10**9, "MiB": 1 << 20, "MB": 10**6}
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GiB|GB|MiB|MB)", text)
    if match is None:
        raise ValueError("write it as 80GiB or 24GB")
    return int(float(match[1]) * units[match[2]])


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A training on devices of one kind."""

    model: str
    """Model directory, config.json or hub id; weights are not read."""
    seq_len: Annotated[int, Flag(min=2)]
    """Tokens per row."""
    world: Annotated[int, Flag(min=1)] = 1
    """Number of devices."""
    cp: Annotated[int, Flag(min=1)] = 1
    """Devices that share a row (context parallelism)."""
    cp_kind: CpKind = "ring"
    """How they compute attention, as in extend-lm: ring, ulysses or both."""
    batch_tokens: Annotated[int, Flag(min=1)] = 1_000_000
    """Tokens per step over all devices, rounded down to whole rows, at least one."""
    micro_tokens: Annotated[int | None, Flag(min=1)] = None
    """Tokens per forward pass, in whole rows and at least one. Default: 4096 on a CPU; on a GPU up to 32768, if the
    backward pass need not recompute more for them than for one row."""
    steps: Annotated[int, Flag(min=1)] = 1000
    """Optimizer steps."""
    lora: Annotated[int, Flag(min=0)] = 0
    """Rank of LoRA on the attention projections; 0 trains all parameters."""
    checkpoint_activations: Checkpointing = "auto"
    """What the backward pass recomputes. none: nothing. layers: every layer. tiles: every layer, and its MLP for 4,096
    tokens at a time. auto: as little as fits."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the matrix products."""
    offload: bool = False
    """Keep parameters and optimizer state in host memory."""
    offload_activations: bool = False
    """Keep the inputs of the layers in host memory."""
    device: DeviceKind = "a100"
    """Device whose memory and peak speed are used."""
    device_memory: Annotated[int | None, Flag(parse=parse_bytes, metavar="SIZE")] = None
    """Memory of one device, such as 80GiB or 24GB. Default: that of --device."""
    mfu: Annotated[float, Flag(min=0.01, max=1.0)] = 0.35
    """Fraction of the peak speed that the model's operations reach (LongVA's predecessor reports 0.28 to 0.38)."""
