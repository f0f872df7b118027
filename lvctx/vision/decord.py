"""The other decoder: decord, for those who want the frames that LongVA's own scripts read.

It is no default: its last release is of 2021 and x86 only, it knows no AV1, repeats neighbours where frames are
damaged, and finds other frames than FFmpeg in videos of variable rate. Timestamps are its own.
"""

from collections.abc import Iterator
from fractions import Fraction
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvctx.errors import InputError, MissingError
from lvctx.vision.decode import Frame, Rate, Shot, sample, spread

if TYPE_CHECKING:
    import numpy as np

CHUNK = 16
"""Frames decoded in one call."""


def require_decord() -> Any:
    """The decord package. Raises MissingError where it is not installed."""
    try:
        import decord
    except ImportError as e:
        raise MissingError("decord is not installed", fix="pip install decord, or --decoder pyav") from e
    return decord


def read_with_decord(path: Path, fps: Rate | None, frames: int | None, facts: dict[str, Any]) -> Iterator[Frame]:
    """As `decode.read_frames`, which has checked the file; fills `facts`."""
    decord = require_decord()
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0))
        count = len(reader)
        times_F2: np.ndarray = reader.get_frame_timestamp(range(count))
    except (decord.DECORDError, RuntimeError) as e:
        raise InputError("not a video that decord can open", where=path, fix="try --decoder pyav") from e
    # Its timestamps are float32: what they print as is nearer to the container's than what they hold.
    times = [(Fraction(str(start)), Fraction(str(end))) for start, end in times_F2]
    shots = (Shot(index=i, pts=start, end=end) for i, (start, end) in enumerate(times))
    wanted = spread(count, frames) if frames is not None else ()
    taken = sample(shots, fps=fps, wanted=wanted)
    while chunk := list(islice(taken, CHUNK)):
        try:
            images_NHW3 = reader.get_batch([shot.index for shot in chunk]).asnumpy()
        except (decord.DECORDError, RuntimeError) as e:
            raise InputError(f"decord failed near frame {chunk[0].index}", where=path, fix="try --decoder pyav") from e
        for shot, image in zip(chunk, images_NHW3, strict=True):
            facts["height"], facts["width"] = image.shape[:2]
            yield Frame(index=shot.index, pts=float(shot.pts), image=image)
    facts["source_frames"], facts["duration"] = count, float(times[-1][1] - times[0][0])
    facts["decoder"] = f"decord {version('decord')}"
