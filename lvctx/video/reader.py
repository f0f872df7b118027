"""Frames of a video by time: the same frames, pixels and timestamps as FFmpeg, one at a time.

A frame is identified by its number in the order of presentation and by its presentation timestamp (pts). There are
four ways to sample: every frame; a rate, which takes at t_k = first pts + k / rate the frame on display, i.e. the last
with pts <= t_k; a number of frames spread as LongVA's linspace(0, n - 1, N) over the n frames of the video; or frames
that a file states (`frame_list.py`).

PyAV (FFmpeg's own libraries) is the default. If packets can be indexed (`packet_index.py`), only what the sampled
frames need is decoded (`segment_decoder.py`); otherwise the whole video is. Only sampled frames are converted to RGB.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from lvctx.errors import InputError, UsageError
from lvctx.video.container import check_complete, decoder_errors
from lvctx.video.frame_selection import (
    chosen_numbers,
    frame_numbers,
    nearest_key_frames,
    numbers_between,
    spread,
    take_numbered,
    take_sampled,
)
from lvctx.video.packet_index import read_packets
from lvctx.video.sampling import VideoSampling
from lvctx.video.segment_decoder import Converter, DecodeStats, Prepare, read_planned
from lvctx.video.sequential_decoder import ReadJob, check_damage, decode_all, no_frame


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One sampled frame."""

    index: int
    """Number in the source, in the order of presentation, from 0."""
    pts: float
    """Presentation timestamp in seconds, as in FFmpeg: the first frame's need not be 0."""
    image: np.ndarray
    """uint8 (H, W, 3), RGB, upright."""


class FrameReader(Iterator[Frame]):
    """The requested frames; once exhausted, `facts` has what was found while decoding."""

    def __init__(self, frames: Iterator[Frame], facts: dict[str, Any], path: Path, stats: DecodeStats) -> None:
        self._frames, self._path, self._stats = frames, path, stats
        self.facts = facts
        """width, height, source_frames, duration (seconds), corrupt (damaged frames), decoder (with versions);
        and `partial`, true, for a video that is truncated or of which more than 1% is damaged."""

    def __next__(self) -> Frame:
        with decoder_errors(self._path):
            frame = next(self._frames, None)
        if frame is None:
            raise StopIteration
        return frame

    @property
    def decoded(self) -> int:
        """Frames that the decoder returned so far, also those that only other frames needed; of decord its frames."""
        return self._stats.decoded


def read_video(
    path: Path,
    sampling: VideoSampling,
    *,
    frame_indices: Sequence[int] | None = None,
    prepare: Prepare | None = None,
    threads: int | None = None,
    stats: DecodeStats | None = None,
) -> FrameReader:
    """Read the frames that `sampling` takes of `path`, or those numbered in ascending `frame_indices`.

    `prepare` is applied to each RGB image, in several threads; `threads` is the number of cores by default; `stats`
    reports the decoder's progress. Memory for pixels does not grow with the length of the video. The resolution and
    `max_frames` of `sampling` are not used: see `bounded`.

    Raises InputError for a file that is missing, empty, not a video or without a frame, also between `start` and
    `end`; and unless `allow_partial` for one that is truncated, or of which more than 1% is damaged: frames that do not
    decode are left out and counted, never replaced. MissingError if decord is requested and not installed.
    """
    choices = (sampling.fps, sampling.frames, sampling.frames_from, frame_indices)
    if sum(option is not None for option in choices) != 1:
        raise UsageError("give either a rate or a number of frames")
    facts: dict[str, Any] = {} if check_complete(path, allow_partial=sampling.allow_partial) else {"partial": True}
    job = ReadJob(
        path=path,
        sampling=sampling,
        frame_indices=frame_indices,
        prepare=prepare,
        threads=threads or (os.cpu_count() or 1),
    )
    stats = stats or DecodeStats()
    return FrameReader(_read(job, facts, stats), facts, path, stats)


def _read(job: ReadJob, facts: dict[str, Any], stats: DecodeStats) -> Iterator[Frame]:
    index = read_packets(job.path)
    frame_indices = list(job.frame_indices or ())
    if index is not None:
        numbers = frame_numbers(index, job.sampling, job.path) if job.frame_indices is None else frame_indices
        frame_indices = [n for n in numbers if n < len(index)]
        if not frame_indices:
            raise no_frame(job)
    if index is not None and job.sampling.seek == "keyframe":
        frame_indices, facts["time_error"] = nearest_key_frames(index, frame_indices)
    times = Counter(frame_indices)
    versions = (f"{name} {'.'.join(map(str, av.library_versions[name]))}" for name in ("libavcodec", "libswscale"))
    facts["decoder"] = f"PyAV {av.__version__} ({', '.join(versions)})"
    seek_ranges = index.seek_ranges(times) if index is not None else None
    if job.sampling.seek == "keyframe" and seek_ranges is None:
        raise InputError("key frames cannot be identified in this video", where=job.path, fix="--seek exact")
    read: Any
    if job.sampling.decoder == "decord":
        from lvctx.video.decord_reader import check_decord, read_with_decord

        index = check_decord(job.path, index)
        images = read_with_decord(job.path, index, list(times), facts)
        read = ((number, image.shape[:2], job.prepare(image) if job.prepare else image) for number, image in images)
    elif seek_ranges is None or index is None:
        yield from _read_everything(job, facts, stats)
        return
    else:
        read = read_planned(job.path, index, seek_ranges, prepare=job.prepare, threads=job.threads, stats=stats)
    decoded_count = 0
    with contextlib.closing(read):
        for number, (facts["height"], facts["width"]), image in read:
            assert index is not None, "decord refuses a video without an index before its first frame"
            decoded_count += 1
            for _ in range(times[number]):
                yield Frame(index=number, pts=float(index.time(number)), image=image)
    if decoded_count == 0 or index is None:
        raise InputError("not one frame could be decoded", where=job.path)
    if job.sampling.decoder == "decord":  # which does not tell how many it decodes for these
        stats.decoded = decoded_count
    check_damage(job, facts, stats.damaged, stats.decoded)
    check_damage(job, facts, len(times) - decoded_count, len(times))
    facts["source_frames"] = len(index)
    facts["duration"] = float(index.end * index.time_base - index.time(0))
    facts["corrupt"] = stats.damaged


def _read_everything(job: ReadJob, facts: dict[str, Any], stats: DecodeStats) -> Iterator[Frame]:
    """Decode every frame, front to back: for packets that cannot be indexed."""
    frame_indices = job.frame_indices
    if job.sampling.frames is not None or job.sampling.frames_from is not None:
        spans = [(frame.pts, frame.end) for frame in decode_all(job, {}, DecodeStats())]
        stats.packets = 0
        times = [pts - spans[0][0] for pts, _ in spans]
        if job.sampling.frames is not None:
            low, high = numbers_between(times, job.sampling)
            frame_indices = [low + n for n in spread(high - low, job.sampling.frames)]
        elif spans:
            frame_indices = chosen_numbers(times, spans[-1][1] - spans[0][0], job.sampling, job.path)
    convert = Converter(job.prepare)
    last: Frame | None = None
    decoded = decode_all(job, facts, stats)
    for frame in (
        take_sampled(decoded, job.sampling) if frame_indices is None else take_numbered(decoded, frame_indices)
    ):
        if last is None or last.index != frame.index:
            (facts["height"], facts["width"]), image = convert(frame.data)
            last = Frame(index=frame.index, pts=float(frame.pts), image=image)
        yield last
    if last is None:
        raise no_frame(job)
    facts["corrupt"] = stats.damaged
    check_damage(job, facts, stats.damaged, stats.decoded + stats.damaged)
