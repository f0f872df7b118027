"""The number of frames that a sampling takes of a video, from its packets if they determine it."""

import contextlib
import itertools
import math
import os
import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from lvctx.errors import InputError
from lvctx.video.container import check_complete, decoder_errors, demux, open_video, probe
from lvctx.video.frame_selection import (
    chosen_numbers,
    due_ticks,
    frame_numbers,
    numbers_between,
    take_sampled,
)
from lvctx.video.packet_index import PacketIndex, read_packets
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.video.segment_decoder import Converter, DecodeStats, read_planned
from lvctx.video.sequential_decoder import ReadJob, check_damage, decode_all, no_frame
from lvctx.video.timestamps import Clock, frame_ticks


def bounded(path: Path, sampling: VideoSampling) -> VideoSampling:
    """The sampling, or `max_frames` evenly spread if its rate gives more of this video. Raises as `read_video`."""
    bound = sampling.max_frames
    if bound is None or sampling.frames is not None:
        return sampling
    count = count_frames(path, sampling, decode=False)
    if not count.exact and count.frames > bound / 2:
        count = count_frames(path, sampling)
    if count.frames <= bound:
        return sampling
    return replace(sampling, fps=None, frames=bound, max_frames=None)


@dataclass(frozen=True, kw_only=True)
class Count:
    """The frames that a sampling takes of a video."""

    frames: int
    """Number of frames that `read_video` gives, if none is damaged."""
    exact: bool
    """False: the number is an estimate, since only decoding gives the exact one."""
    width: int
    """Width in pixels, upright; if nothing was decoded, the container's width before rotation."""
    height: int
    """Height in pixels, likewise."""
    duration: float
    """Seconds from the first frame to the end of the last."""
    partial: bool = False
    """Whether the video is truncated or damaged; known only if it was decoded."""


def count_frames(path: Path, sampling: VideoSampling, *, decode: bool = True) -> Count:
    """Number of frames that `read_video` gives, from the packets; the first frame is decoded for its size.

    If packets do not determine it (see `packet_index.py`), and with `allow_partial`, everything is decoded; without
    `decode` nothing is decoded and the count is an estimate. Raises as `read_video`.
    """
    check_complete(path, allow_partial=sampling.allow_partial)
    job = ReadJob(path=path, sampling=sampling, threads=os.cpu_count() or 1)
    with decoder_errors(path):
        if sampling.allow_partial and decode:
            return _count_readable(job)
        index = read_packets(path)
        frame_indices = frame_numbers(index, sampling, path) if index is not None else []
        if index is not None and not frame_indices:
            raise no_frame(job)
        if index is None or index.seek_ranges(sorted(set(frame_indices))) is None:
            return _count_all(job) if decode else _count_about(job)
        duration = float(index.end * index.time_base - index.time(0))
        facts = probe(path)
        width, height = facts["width"], facts["height"]
        if decode:
            height, width = _upright_size(job, index, frame_indices)
        # Frames that cannot be decoded are then left out.
        return Count(
            frames=len(frame_indices), exact=not sampling.allow_partial, width=width, height=height, duration=duration
        )


def _count_readable(job: ReadJob) -> Count:
    reader = read_video(job.path, job.sampling)
    count = sum(1 for _ in reader)
    facts = reader.facts
    return Count(
        frames=count,
        exact=True,
        width=facts["width"],
        height=facts["height"],
        duration=facts["duration"],
        partial=facts.get("partial", False),
    )


def _upright_size(job: ReadJob, index: PacketIndex, frame_indices: list[int]) -> tuple[int, int]:
    """Height and width of the first of the wanted frames that can be decoded."""
    for some in (frame_indices[:1], sorted(set(frame_indices))):
        seek_ranges = index.seek_ranges(some) or []
        read: Any = read_planned(job.path, index, seek_ranges, prepare=None, threads=job.threads, stats=DecodeStats())
        with contextlib.closing(read):
            for _, size, _ in read:
                return size
    raise InputError("not one frame could be decoded", where=job.path)


def _count_all(job: ReadJob) -> Count:
    facts: dict[str, Any] = {}
    stats = DecodeStats()
    decoded = decode_all(job, facts, stats)
    first = next(decoded, None)
    if first is None:
        raise InputError("not one frame could be decoded", where=job.path)
    (height, width), _ = Converter(None)(first.data)
    frames = itertools.chain([first], decoded)
    if job.sampling.frames_from is not None:
        spans = [(frame.pts, frame.end) for frame in frames]
        times = [pts - first.pts for pts, _ in spans]
        count = len(chosen_numbers(times, spans[-1][1] - first.pts, job.sampling, job.path))
    elif job.sampling.frames is None:
        count = sum(1 for _ in take_sampled(frames, job.sampling))
    else:
        low, high = numbers_between([frame.pts - first.pts for frame in frames], job.sampling)
        count = job.sampling.frames if low < high else 0
    if not count:
        raise no_frame(job)
    check_damage(job, facts, stats.damaged, stats.decoded + stats.damaged)
    return Count(
        frames=count,
        exact=True,
        width=width,
        height=height,
        duration=facts["duration"],
    )


def _count_about(job: ReadJob) -> Count:
    container, stream = open_video(job.path)
    with container:
        clock, a_frame = Clock(container, stream), frame_ticks(stream)
        spans: list[tuple[int, int]] = []
        for packet in demux(container, stream):
            clock.mend(packet)
            if not packet.is_discard:
                stamp = packet.dts if packet.pts is None else packet.pts
                start = stamp if stamp is not None else spans[-1][1] if spans else 0
                spans.append((start, start + (packet.duration or a_frame)))
        tick, width, height = Fraction(stream.time_base), stream.width, stream.height
    if not spans:
        raise InputError("not one frame could be decoded", where=job.path)
    first, last, end = min(spans)[0], max(spans)[0], max(end for _, end in spans)
    sampling = job.sampling
    if sampling.frames is not None:
        frames = sampling.frames
    elif sampling.frames_from is not None:
        frames = len(sampling.frames_from.of(job.path).values)
    elif sampling.fps == "native":
        low, high = numbers_between(sorted(start - first for start, _ in spans), sampling, tick=tick)
        frames = high - low
    else:
        frames = len(due_ticks(first, last, end, tick, sampling))
    duration = float((end - first) * tick)
    exact = sampling.frames is not None and not sampling.allow_partial
    return Count(frames=frames, exact=exact, width=width, height=height, duration=duration)


def rough_count(path: Path, sampling: VideoSampling) -> int:
    """An estimate of the number of sampled frames for progress, without reading the file first."""
    chosen = sampling.frames_from.of(path).values if sampling.frames_from is not None else ()
    if count := sampling.frames or len(chosen):
        return count
    facts = probe(path)
    rate = facts["source_fps"] if sampling.fps == "native" else sampling.fps
    seconds = min(facts["duration"], sampling.end or math.inf) - (sampling.start or 0)
    return max(1, min(math.ceil(seconds * rate), sampling.max_frames or sys.maxsize))
