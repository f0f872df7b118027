"""The other decoder: decord, for the exact pixels of LongVA's own scripts.

It is no default: its last release is of 2021 and x86 only, it knows no AV1, repeats neighbours where frames are
damaged, counts wrong where the rate varies or an edit list hides frames, seeks to other frames in transport streams,
mirrors nothing, and of several video streams takes the largest. So it is let at constant rates, codecs and containers
it knows only, and which frame is shown when is read from the packets, not from it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np

from lvctx.errors import InputError, MissingError
from lvctx.video.container import open_video
from lvctx.video.packet_index import HIDDEN, PacketIndex
from lvctx.video.pixel_conversion import upright

DECORD_BATCH = 16
"""Frames decoded in one call."""
DECORD_CODECS = ("h264", "hevc", "vp9")
"""Codecs whose packets we can count and that decord decodes."""
TURNS = ((), (("transpose", "clock"),), (("transpose", "cclock"),), (("hflip",), ("vflip",)))
"""What decord does to a frame that is not upright."""


def require_decord() -> Any:
    """The decord package. Raises MissingError where it is not installed."""
    try:
        import decord
    except ImportError as e:
        raise MissingError("decord is not installed", fix="pip install decord, or --decoder pyav") from e
    return decord


def check_decord(path: Path, index: PacketIndex | None) -> PacketIndex:
    """The index. Raises InputError where decord would not give the right frames of the video."""
    if reason := _why_not(index) or _why_not_file(path):
        raise InputError(f"decord is not exact here: {reason}", where=path, fix="--decoder auto")
    assert index is not None
    return index


def _why_not(index: PacketIndex | None) -> str:
    if index is None or index.codec not in DECORD_CODECS:
        return "a codec it does not know or whose frames cannot be counted"
    if not index.constant_rate:
        return "its rate varies"
    if (index.flags_N & HIDDEN).any():
        return "an edit list hides frames"
    return ""


def _why_not_file(path: Path) -> str:
    container, stream = open_video(path)
    with container:
        if container.format.flags & av.format.Flags.ts_discont.value:
            return "in a transport stream it seeks to other frames"
        if len(container.streams.video) > 1:
            return "of several video streams it takes another"
        first = None
        with contextlib.suppress(av.FFmpegError):
            first = next(container.decode(stream), None)
        display_matrix = first.side_data.get("DISPLAYMATRIX") if first else None
    return (
        ""
        if display_matrix is None or upright(bytes(display_matrix)) in TURNS
        else "it turns pictures, but mirrors none"
    )


def read_with_decord(
    path: Path, index: PacketIndex, frame_indices: Sequence[int], facts: dict[str, Any]
) -> Iterator[tuple[int, np.ndarray]]:
    """(frame, RGB picture) for ascending, distinct `frame_indices` of a video that `check_decord` lets pass."""
    decord = require_decord()
    decord.logging.set_level(decord.logging.QUIET)
    try:
        # A relative name with a colon in it would be taken for a protocol.
        reader = decord.VideoReader(str(path.absolute()), ctx=decord.cpu(0))
        if len(reader) != len(index):
            raise InputError(f"decord counts {len(reader)} frames of {len(index)}", where=path, fix="--decoder auto")
        todo = iter(frame_indices)
        while chunk := list(islice(todo, DECORD_BATCH)):
            yield from zip(chunk, reader.get_batch(chunk).asnumpy(), strict=True)
    except (decord.DECORDError, RuntimeError) as e:
        raise InputError("decord cannot read it", where=path, fix="--decoder auto") from e
    facts["decoder"] = f"decord {version('decord')}"
