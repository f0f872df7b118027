"""Configuration of `doctor`."""

from dataclasses import dataclass
from typing import Annotated

from lvctx.config import Flag, Seed
from lvctx.device import CpKind


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """The model and processes to compare."""

    model: str
    """Language model: directory or hub id."""
    cp: Annotated[int, Flag(min=1)] = 2
    """Processes that share a row, as in extend-lm."""
    cp_kind: CpKind = "ring"
    """How these processes compute attention, as in extend-lm: ring, ulysses or both."""
    length: Annotated[int, Flag(min=8)] = 501
    """Tokens of the row."""
    device: str = "auto"
    """Device under torchrun: cuda, mps or cpu. auto: CUDA if there is one, else MPS, else the CPU."""
    seed: Seed = 0
    """Seed of the row's tokens."""
