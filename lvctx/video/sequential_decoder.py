"""Decode every frame of a video front to back; the arguments and errors of reading a video."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from lvctx.errors import InputError
from lvctx.video.container import demux, open_video
from lvctx.video.frame_selection import (
    DecodedFrame,
)
from lvctx.video.sampling import VideoSampling
from lvctx.video.segment_decoder import DecodeStats, Prepare
from lvctx.video.timestamps import Clock, in_order
from lvctx.video.truncation import ends_inside_packet

CORRUPT_LIMIT = 0.01
"""Share of frames that may be damaged before the video is refused."""


@dataclass(frozen=True, kw_only=True)
class ReadJob:
    """The arguments of `read_video`."""

    path: Path
    sampling: VideoSampling
    frame_indices: Sequence[int] | None = None
    prepare: Prepare | None = None
    threads: int


def no_frame(job: ReadJob) -> InputError:
    """The error for a sampling that takes no frame of a video."""
    if job.sampling.start is None and job.sampling.end is None:
        return InputError("not one frame could be decoded", where=job.path)
    return InputError("no frame between --start and --end", where=job.path, fix="check them against the duration")


def check_damage(job: ReadJob, facts: dict[str, Any], damaged: int, frames: int) -> None:
    """Raise InputError if too much is damaged, unless `allow_partial`; record the damage in `facts` in any case."""
    if damaged <= CORRUPT_LIMIT * frames or damaged <= ends_inside_packet(job.path):
        return
    facts["partial"] = True
    if not job.sampling.allow_partial:
        fix = "get the video again, or use its intact frames with --allow-partial"
        raise InputError(f"{damaged} of {frames} decoded frames are damaged or missing", where=job.path, fix=fix)


def decode_all(job: ReadJob, facts: dict[str, Any], stats: DecodeStats) -> Iterator[DecodedFrame]:
    """Every frame in the order of presentation."""
    container, stream = open_video(job.path)
    stream.codec_context.thread_count = 0 if job.threads > 1 else 1
    tick = Fraction(stream.time_base)
    first = last = Fraction(0)
    with container:
        for frame, start, end in in_order(_decode(container, stream, stats), stream):
            first = start * tick if stats.decoded == 0 else first
            last = end * tick
            stats.damaged += bool(frame.is_corrupt)
            yield DecodedFrame(index=stats.decoded, pts=start * tick, end=last, data=frame)
            stats.decoded += 1
    facts["source_frames"], facts["duration"] = stats.decoded, float(last - first)


def _decode(container: Any, stream: Any, stats: DecodeStats) -> Iterator[Any]:
    clock = Clock(container, stream)
    for packet in demux(container, stream):
        clock.mend(packet)
        stats.packets += 1
        try:
            yield from packet.decode()
        except av.EOFError:
            return
        except MemoryError:  # frames that do not fit are not damaged
            raise
        except av.FFmpegError:
            stats.damaged += 1
    with contextlib.suppress(av.FFmpegError):
        yield from stream.decode(None)
