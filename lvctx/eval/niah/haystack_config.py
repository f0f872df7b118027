"""What decides every pixel of a drawn haystack."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lvctx.config import Flag
from lvctx.video.sampling import Rate, parse_rate


@dataclass(frozen=True, kw_only=True)
class HaystackConfig:
    """What decides every pixel."""

    clips: Annotated[tuple[Path, ...], Flag(argument=True, metavar="[CLIP]...")] = ()
    """Openly licensed videos, each shown once, after a scene, while frames are left."""
    frames: Annotated[int, Flag(min=1)] = 3600
    """Frames in all, one second apart."""
    side: Annotated[int, Flag(min=16, max=4096)] = 336
    """Side of a drawn frame, in pixels; an odd number is rounded up."""
    fps: Annotated[Rate, Flag(parse=parse_rate, metavar="RATE|native")] = 1.0
    """Frames per second that are taken of a clip."""
    allow_partial: bool = False
    """Use what can be decoded of truncated or damaged clips."""
    seed: int = 0
    """Seed of the scenes, and of the order of the clips."""
