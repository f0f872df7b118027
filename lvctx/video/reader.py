"""Frames of a video by time: the same frames, pixels and timestamps as FFmpeg, one at a time.

A frame is identified by its number in the order of presentation and by its presentation timestamp (pts). Three ways to
sample: every frame; a rate, which takes at t_k = first pts + k / rate the frame on display, that is the last whose
pts <= t_k; or a number of frames spread as LongVA's linspace(0, n - 1, N) over the n frames of the video.

PyAV (FFmpeg's own libraries) is the default. Where packets tell what is in them (`packets.py`), only what the sampled
frames need is decoded (`planned.py`); elsewhere the video is read front to back. Only sampled frames become RGB.
"""

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from lvctx.errors import InputError, UsageError
from lvctx.video.container import check_whole, decoder_errors, demux, open_video, probe
from lvctx.video.frame_selection import (
    DecodedFrame,
    due_ticks,
    frame_numbers,
    nearest_key_frames,
    numbers_between,
    spread,
    take_numbered,
    take_sampled,
)
from lvctx.video.packet_index import PacketIndex, read_packets
from lvctx.video.sampling import VideoSampling
from lvctx.video.segment_decoder import Converter, Prepare, Tally, read_planned
from lvctx.video.timestamps import Clock, frame_ticks, in_order
from lvctx.video.truncation import ends_inside_packet

CORRUPT_LIMIT = 0.01
"""Share of frames that may be damaged before the video is refused."""


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
    """The frames asked for; once exhausted, `facts` has what was found while decoding."""

    def __init__(self, frames: Iterator[Frame], facts: dict[str, Any], path: Path) -> None:
        self._frames, self._path = frames, path
        self.facts = facts
        """width, height, source_frames, duration (seconds), corrupt (damaged frames), decoder (with versions);
        and `partial`, true, for a video that is cut short or of which more than 1% is damaged."""

    def __next__(self) -> Frame:
        with decoder_errors(self._path):
            frame = next(self._frames, None)
        if frame is None:
            raise StopIteration
        return frame


def read_video(
    path: Path,
    sampling: VideoSampling,
    *,
    wanted: Sequence[int] | None = None,
    prepare: Prepare | None = None,
    threads: int | None = None,
    tally: Tally | None = None,
) -> FrameReader:
    """Read the frames that `sampling` takes of `path`, or those numbered in ascending `wanted`.

    `prepare` is what to make of each RGB image, called in several threads; `threads` is the number of cores unless
    given; `tally` shows how far the decoder is. Pixels in memory do not grow with the length of the video. The
    resolution in `sampling` is not used, nor its `max_frames`: see `bounded`.

    Raises InputError for a file that is missing, empty, not a video or without a frame, also between `start` and
    `end`; and unless `allow_partial` for one that is truncated, or of which more than 1% is damaged: frames that do not
    decode are left out and counted, never made up. MissingError where decord is asked for and not installed.
    """
    if sum(given is not None for given in (sampling.fps, sampling.frames, wanted)) != 1:
        raise UsageError("give either a rate or a number of frames")
    facts: dict[str, Any] = {} if check_whole(path, allow_partial=sampling.allow_partial) else {"partial": True}
    job = _Job(path=path, sampling=sampling, wanted=wanted, prepare=prepare, threads=threads or (os.cpu_count() or 1))
    return FrameReader(_read(job, facts, tally or Tally()), facts, path)


def bounded(path: Path, sampling: VideoSampling) -> VideoSampling:
    """The sampling, or `max_frames` evenly spread where its rate gives more of this video. Raises as `read_video`."""
    bound = sampling.max_frames
    if bound is None or sampling.frames is not None or count_frames(path, sampling, decode=False).frames <= bound:
        return sampling
    return replace(sampling, fps=None, frames=bound, max_frames=None)


@dataclass(frozen=True, kw_only=True)
class Count:
    """What a sampling finds in a video."""

    frames: int
    """Frames that `read_video` gives, if none is damaged."""
    exact: bool
    """False: an estimate, since only decoding gives the number."""
    width: int
    """Pixels across once upright; where nothing was decoded as the container states it, before rotation."""
    height: int
    """Pixels down, likewise."""
    duration: float
    """Seconds from the first frame to the end of the last."""
    partial: bool = False
    """Whether the video is cut short or damaged; known only where it was decoded."""


def count_frames(path: Path, sampling: VideoSampling, *, decode: bool = True) -> Count:
    """How many frames `read_video` gives, by the packets; the first frame is decoded for its size.

    Where packets do not tell (see `packets.py`), and with `allow_partial`, everything is decoded, or without `decode`
    nothing at all and the count is near. Raises as `read_video`.
    """
    check_whole(path, allow_partial=sampling.allow_partial)
    job = _Job(path=path, sampling=sampling, threads=os.cpu_count() or 1)
    with decoder_errors(path):
        if sampling.allow_partial and decode:
            return _count_readable(job)
        index = read_packets(path)
        wanted = frame_numbers(index, sampling) if index is not None else []
        if index is not None and not wanted:
            raise _nothing(job)
        if index is None or index.stretches(sorted(set(wanted))) is None:
            return _count_all(job) if decode else _count_about(job)
        duration = float(index.end * index.time_base - index.time(0))
        facts = probe(path)
        width, height = facts["width"], facts["height"]
        if decode:
            height, width = _upright_size(job, index, wanted)
        # What cannot be decoded is left out then.
        return Count(
            frames=len(wanted), exact=not sampling.allow_partial, width=width, height=height, duration=duration
        )


def _count_readable(job: "_Job") -> Count:
    reader = read_video(job.path, job.sampling)
    found = sum(1 for _ in reader)
    facts = reader.facts
    return Count(
        frames=found,
        exact=True,
        width=facts["width"],
        height=facts["height"],
        duration=facts["duration"],
        partial=facts.get("partial", False),
    )


def _upright_size(job: "_Job", index: PacketIndex, wanted: list[int]) -> tuple[int, int]:
    """Height and width of the first of the wanted frames that can be decoded."""
    for some in (wanted[:1], sorted(set(wanted))):
        stretches = index.stretches(some) or []
        read: Any = read_planned(job.path, index, stretches, prepare=None, threads=job.threads, tally=Tally())
        with contextlib.closing(read):
            for _, size, _ in read:
                return size
    raise InputError("not one frame could be decoded", where=job.path)


def _count_all(job: "_Job") -> Count:
    facts: dict[str, Any] = {}
    tally = Tally()
    decoded = _decode_all(job, facts, tally)
    first = next(decoded, None)
    if first is None:
        raise InputError("not one frame could be decoded", where=job.path)
    (height, width), _ = Converter(None)(first.data)
    frames = itertools.chain([first], decoded)
    if job.sampling.frames is None:
        taken = sum(1 for _ in take_sampled(frames, job.sampling))
    else:
        low, high = numbers_between([frame.pts - first.pts for frame in frames], job.sampling)
        taken = job.sampling.frames if low < high else 0
    if not taken:
        raise _nothing(job)
    _check_damage(job, facts, tally.damaged, tally.decoded + tally.damaged)
    return Count(
        frames=taken,
        exact=True,
        width=width,
        height=height,
        duration=facts["duration"],
    )


def _count_about(job: "_Job") -> Count:
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
    elif sampling.fps == "native":
        low, high = numbers_between(sorted(start - first for start, _ in spans), sampling, tick=tick)
        frames = high - low
    else:
        frames = len(due_ticks(first, last, end, tick, sampling))
    duration = float((end - first) * tick)
    exact = sampling.frames is not None and not sampling.allow_partial
    return Count(frames=frames, exact=exact, width=width, height=height, duration=duration)


def _read(job: "_Job", facts: dict[str, Any], tally: Tally) -> Iterator[Frame]:
    index = read_packets(job.path)
    wanted = list(job.wanted or ())
    if index is not None:
        numbers = frame_numbers(index, job.sampling) if job.wanted is None else wanted
        wanted = [n for n in numbers if n < len(index)]
        if not wanted:
            raise _nothing(job)
    if index is not None and job.sampling.seek == "keyframe":
        wanted, facts["time_error"] = nearest_key_frames(index, wanted)
    times = Counter(wanted)
    versions = (f"{name} {'.'.join(map(str, av.library_versions[name]))}" for name in ("libavcodec", "libswscale"))
    facts["decoder"] = f"PyAV {av.__version__} ({', '.join(versions)})"
    stretches = index.stretches(times) if index is not None else None
    if job.sampling.seek == "keyframe" and stretches is None:
        raise InputError("key frames cannot be identified here", where=job.path, fix="--seek exact")
    read: Any
    if job.sampling.decoder == "decord":
        from lvctx.video.decord_reader import check_decord, read_with_decord

        index = check_decord(job.path, index)
        pictures = read_with_decord(job.path, index, list(times), facts)
        read = ((number, image.shape[:2], job.prepare(image) if job.prepare else image) for number, image in pictures)
    elif stretches is None or index is None:
        yield from _read_everything(job, facts, tally)
        return
    else:
        read = read_planned(job.path, index, stretches, prepare=job.prepare, threads=job.threads, tally=tally)
    found = 0
    with contextlib.closing(read):
        for number, (facts["height"], facts["width"]), image in read:
            assert index is not None, "decord refuses what has no index before its first frame"
            found += 1
            for _ in range(times[number]):
                yield Frame(index=number, pts=float(index.time(number)), image=image)
    if found == 0 or index is None:
        raise InputError("not one frame could be decoded", where=job.path)
    _check_damage(job, facts, tally.damaged, tally.decoded)
    _check_damage(job, facts, len(times) - found, len(times))
    facts["source_frames"] = len(index)
    facts["duration"] = float(index.end * index.time_base - index.time(0))
    facts["corrupt"] = tally.damaged


def _check_damage(job: "_Job", facts: dict[str, Any], damaged: int, frames: int) -> None:
    if damaged <= CORRUPT_LIMIT * frames or damaged <= ends_inside_packet(job.path):
        return
    facts["partial"] = True
    if not job.sampling.allow_partial:
        fix = "get the video again, or --allow-partial takes what there is"
        raise InputError(f"{damaged} of {frames} decoded frames are damaged or missing", where=job.path, fix=fix)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The arguments of `read_video`."""

    path: Path
    sampling: VideoSampling
    wanted: Sequence[int] | None = None
    prepare: Prepare | None = None
    threads: int


def _nothing(job: _Job) -> InputError:
    if job.sampling.start is None and job.sampling.end is None:
        return InputError("not one frame could be decoded", where=job.path)
    return InputError("no frame between --start and --end", where=job.path, fix="check them against the duration")


def _read_everything(job: _Job, facts: dict[str, Any], tally: Tally) -> Iterator[Frame]:
    """Front to back, every frame decoded: where packets do not describe their content."""
    wanted = job.wanted
    if job.sampling.frames is not None:
        seconds = [frame.pts for frame in _decode_all(job, {}, Tally())]
        tally.packets = 0
        low, high = numbers_between([pts - seconds[0] for pts in seconds], job.sampling)
        wanted = [low + n for n in spread(high - low, job.sampling.frames)]
    convert = Converter(job.prepare)
    last: Frame | None = None
    decoded = _decode_all(job, facts, tally)
    for frame in take_sampled(decoded, job.sampling) if wanted is None else take_numbered(decoded, wanted):
        if last is None or last.index != frame.index:
            (facts["height"], facts["width"]), image = convert(frame.data)
            last = Frame(index=frame.index, pts=float(frame.pts), image=image)
        yield last
    if last is None:
        raise _nothing(job)
    facts["corrupt"] = tally.damaged
    _check_damage(job, facts, tally.damaged, tally.decoded + tally.damaged)


def _decode_all(job: _Job, facts: dict[str, Any], tally: Tally) -> Iterator[DecodedFrame]:
    """Every frame in the order of presentation."""
    container, stream = open_video(job.path)
    stream.codec_context.thread_count = 0 if job.threads > 1 else 1
    tick = Fraction(stream.time_base)
    first = last = Fraction(0)
    with container:
        for frame, start, end in in_order(_decode(container, stream, tally), stream):
            first = start * tick if tally.decoded == 0 else first
            last = end * tick
            tally.damaged += bool(frame.is_corrupt)
            yield DecodedFrame(index=tally.decoded, pts=start * tick, end=last, data=frame)
            tally.decoded += 1
    facts["source_frames"], facts["duration"] = tally.decoded, float(last - first)


def _decode(container: Any, stream: Any, tally: Tally) -> Iterator[Any]:
    clock = Clock(container, stream)
    for packet in demux(container, stream):
        clock.mend(packet)
        tally.packets += 1
        try:
            yield from packet.decode()
        except av.EOFError:
            return
        except av.FFmpegError:
            tally.damaged += 1
    with contextlib.suppress(av.FFmpegError):
        yield from stream.decode(None)
