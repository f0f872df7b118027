"""Configuration of a drawn haystack."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lvctx.config import Flag
from lvctx.video.sampling import Rate, parse_rate


@dataclass(frozen=True, kw_only=True)
class HaystackConfig:
    """The settings that decide every pixel."""

    clips: Annotated[tuple[Path, ...], Flag(argument=True, metavar="[CLIP]...")] = ()
    """Openly licensed videos, each used once, after a scene, until all frames are used."""
    frames: Annotated[int, Flag(min=1)] = 3600
    """Total number of frames, one second apart."""
    side: Annotated[int, Flag(min=16, max=4096)] = 336
    """Side of a drawn frame, in pixels; an odd number is rounded up."""
    fps: Annotated[Rate, Flag(parse=parse_rate, metavar="RATE|native")] = 1.0
    """Sampled frames per second of a clip."""
    allow_partial: bool = False
    """Use what can be decoded of truncated or damaged clips."""
    seed: int = 0
    """Seed of the scenes, and of the order of the clips."""
