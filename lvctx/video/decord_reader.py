"""The alternative decoder decord, for the exact pixels of LongVA's own scripts.

It is not the default: its last release is from 2021 and for x86 only, it does not support AV1, repeats neighbouring
frames for damaged ones, miscounts frames with a varying rate or with an edit list that hides frames, seeks to wrong
frames in transport streams, ignores mirroring, and selects the largest of several video streams. It is therefore used
only for constant rates and for codecs and containers that it reads correctly; timestamps are read from the packets.
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
"""Number of frames decoded in one call."""
DECORD_CODECS = ("h264", "hevc", "vp9")
"""Codecs whose packets we can count and that decord decodes."""
TURNS = ((), (("transpose", "clock"),), (("transpose", "cclock"),), (("hflip",), ("vflip",)))
"""The rotations that decord applies to frames."""


def require_decord() -> Any:
    """The decord package. Raises MissingError if it is not installed."""
    try:
        import decord
    except ImportError as e:
        raise MissingError("decord is not installed", fix="pip install decord, or --decoder pyav") from e
    return decord


def check_decord(path: Path, index: PacketIndex | None) -> PacketIndex:
    """The index. Raises InputError if decord would give wrong frames of this video."""
    if reason := _why_not(index) or _why_not_file(path):
        raise InputError(f"decord would not read it correctly: {reason}", where=path, fix="--decoder auto")
    assert index is not None
    return index


def _why_not(index: PacketIndex | None) -> str:
    if index is None or index.codec not in DECORD_CODECS:
        return "the codec is unsupported or its frames cannot be counted"
    if not index.constant_rate:
        return "the frame rate varies"
    if (index.flags_N & HIDDEN).any():
        return "an edit list hides frames"
    return ""


def _why_not_file(path: Path) -> str:
    container, stream = open_video(path)
    with container:
        if container.format.flags & av.format.Flags.ts_discont.value:
            return "decord seeks to wrong frames in a transport stream"
        if len(container.streams.video) > 1:
            return "decord selects another of several video streams"
        first = None
        with contextlib.suppress(av.FFmpegError):
            first = next(container.decode(stream), None)
        display_matrix = first.side_data.get("DISPLAYMATRIX") if first else None
    return (
        ""
        if display_matrix is None or upright(bytes(display_matrix)) in TURNS
        else "decord rotates frames but does not mirror them"
    )


def read_with_decord(
    path: Path, index: PacketIndex, frame_indices: Sequence[int], facts: dict[str, Any]
) -> Iterator[tuple[int, np.ndarray]]:
    """(frame, RGB image) for ascending, distinct `frame_indices` of a video that `check_decord` accepts."""
    decord = require_decord()
    decord.logging.set_level(decord.logging.QUIET)
    try:
        # A relative name with a colon in it would be read as a protocol.
        reader = decord.VideoReader(str(path.absolute()), ctx=decord.cpu(0))
        if len(reader) != len(index):
            raise InputError(f"decord counts {len(reader)} frames, not {len(index)}", where=path, fix="--decoder auto")
        todo = iter(frame_indices)
        while chunk := list(islice(todo, DECORD_BATCH)):
            yield from zip(chunk, reader.get_batch(chunk).asnumpy(), strict=True)
    except (decord.DECORDError, RuntimeError) as e:
        raise InputError("decord cannot read it", where=path, fix="--decoder auto") from e
    facts["decoder"] = f"decord {version('decord')}"
