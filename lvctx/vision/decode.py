"""Frames of a video by time: the same frames, pixels and timestamps as FFmpeg, one at a time.

A frame is identified by its number in the order of presentation and by its presentation timestamp (pts). Three ways to
sample: every frame; a rate, which takes at t_k = first pts + k / rate the frame on display, that is the last whose
pts <= t_k; or a number of frames spread as LongVA's linspace(0, n - 1, N) over the n frames of the video.

PyAV (FFmpeg's own libraries) is the default. Where packets tell what is in them (`packets.py`), only what the sampled
frames need is decoded (`planned.py`); elsewhere the video is read front to back. Only sampled frames become RGB.
"""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from lvctx.errors import InputError, UsageError
from lvctx.vision.clock import Clock, in_order
from lvctx.vision.container import check_exists, check_whole, demux, open_video, probe
from lvctx.vision.packets import PacketIndex, read_packets
from lvctx.vision.planned import Converter, Prepare, Tally, read_planned

Rate = float | Literal["native"]
"""Frames a second, or every frame."""
Decoder = Literal["auto", "decord", "pyav"]
Sampling = Literal["exact", "keyframe"]
"""`keyframe` takes for each sampled frame the key frame shown nearest to it: other pictures, a fraction of the time."""

CORRUPT_LIMIT = 0.01
"""Share of frames that may be damaged before the video is refused."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One sampled frame."""

    index: int
    """Number in the source, in the order of presentation, from 0."""
    pts: float
    """Presentation timestamp in seconds, as FFmpeg says it: the first frame's need not be 0."""
    image: np.ndarray
    """uint8 (H, W, 3), RGB, upright."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A frame of the source that is not converted yet: what sampling decides on."""

    index: int
    """As in `Frame`."""
    pts: Fraction
    """Exact seconds."""
    end: Fraction
    """When the next frame is due; equal to `pts` where the container does not say."""
    data: Any = field(default=None, repr=False)
    """The decoder's own frame."""


class FrameReader(Iterator[Frame]):
    """The frames asked for; once exhausted, `facts` says what was seen on the way."""

    def __init__(self, frames: Iterator[Frame], facts: dict[str, Any]) -> None:
        self._frames = frames
        self.facts = facts
        """width, height, source_frames, duration (seconds), corrupt (damaged frames), decoder (with versions)."""

    def __next__(self) -> Frame:
        return next(self._frames)


def read_frames(
    path: Path,
    *,
    fps: Rate | None = None,
    frames: int | None = None,
    wanted: Sequence[int] | None = None,
    decoder: Decoder = "auto",
    sampling: Sampling = "exact",
    allow_partial: bool = False,
    prepare: Prepare | None = None,
    threads: int | None = None,
    tally: Tally | None = None,
) -> FrameReader:
    """Read frames of `path`: at a rate `fps`, `frames` of them evenly spread, or those numbered in ascending `wanted`.

    `prepare` is what to make of each RGB picture, called in several threads; `threads` is the number of cores unless
    given; `tally` shows how far the decoder is. Pixels in memory do not grow with the length of the video.

    Raises InputError for a file that is missing, empty, not a video or without a picture; and unless `allow_partial`
    for one that is cut short, or of which more than 1% is damaged: frames that do not decode are left out and counted,
    never made up. MissingError where decord is asked for and not installed.
    """
    if sum(given is not None for given in (fps, frames, wanted)) != 1:
        raise UsageError("give either a rate or a number of frames")
    if allow_partial:
        check_exists(path)
    else:
        check_whole(path)
    facts: dict[str, Any] = {}
    job = _Job(path, fps, frames, wanted, decoder, sampling, allow_partial, prepare, threads or (os.cpu_count() or 1))
    return FrameReader(_read(job, facts, tally or Tally()), facts)


def choose(index: PacketIndex, fps: Rate | None, frames: int | None) -> list[int]:
    """Numbers of the frames to take, ascending, by the rules above; a frame may be taken several times."""
    if frames is not None:
        return spread(len(index), frames)
    if fps == "native":
        return list(range(len(index)))
    pts_F = index.pts_N[index.packet_F]
    first, last = int(pts_F[0]), int(pts_F[-1])
    step = 1 / Fraction(fps).limit_denominator(100_000) / index.time_base  # type: ignore[arg-type]
    count = max(math.ceil((index.end - first) / step), (last - first) // step + 1)
    due = [first + k * step.numerator // step.denominator for k in range(count)]
    return (np.searchsorted(pts_F, due, "right") - 1).tolist()


def nearest_key_frames(index: PacketIndex, wanted: list[int]) -> tuple[list[int], dict[str, float]]:
    """For every wanted frame the key frame shown nearest to it (the earlier of two); mean and max error in seconds."""
    pts_F, keys = index.pts_N[index.packet_F], index.key_frames
    after = np.searchsorted(keys, wanted).clip(1, max(1, len(keys) - 1))
    left, right = keys[after - 1], keys[np.minimum(after, len(keys) - 1)]
    off_left, off_right = abs(pts_F[left] - pts_F[wanted]), abs(pts_F[right] - pts_F[wanted])
    taken = np.where(off_left <= off_right, left, right)
    off = np.minimum(off_left, off_right) * float(index.time_base)
    return taken.tolist(), {"mean": round(float(off.mean()), 6), "max": round(float(off.max()), 6)}


def count_at_rate(path: Path, fps: float) -> tuple[int, int, float, int]:
    """Width and height once upright, duration in seconds, and how many frames `read_frames` gives at a rate `fps`.

    Only the first frame is decoded where the container says its duration; else all are. Raises as `read_frames`.
    """
    reader = read_frames(path, fps=fps, decoder="pyav")
    first = next(reader, None)
    if first is None:
        raise InputError("not one frame could be decoded", where=path)
    height, width = first.image.shape[:2]
    duration = float(probe(path)["duration"])
    if duration <= 0:
        frames = 1 + sum(1 for _ in reader)
        return width, height, float(reader.facts["duration"]), frames
    return width, height, duration, max(1, math.ceil(round(duration * fps, 4)))


def _read(job: "_Job", facts: dict[str, Any], tally: Tally) -> Iterator[Frame]:
    index = read_packets(job.path)
    wanted = list(job.wanted or ())
    if index is not None:
        wanted = choose(index, job.fps, job.frames) if job.wanted is None else [n for n in wanted if n < len(index)]
    if index is not None and job.sampling == "keyframe":
        wanted, facts["time_error"] = nearest_key_frames(index, wanted)
    times = Counter(wanted)
    versions = (f"{name} {'.'.join(map(str, av.library_versions[name]))}" for name in ("libavcodec", "libswscale"))
    facts["decoder"] = f"PyAV {av.__version__} ({', '.join(versions)})"
    stretches = index.stretches(times) if index is not None else None
    if job.sampling == "keyframe" and stretches is None:
        raise InputError("key frames cannot be told apart here", where=job.path, fix="--sampling exact")
    read: Any
    if job.decoder == "decord":
        from lvctx.vision.decord import check_decord, read_with_decord

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
    _refuse_damage(job, tally.damaged, tally.decoded)
    _refuse_damage(job, len(times) - found, len(times))
    facts["source_frames"] = len(index)
    facts["duration"] = float(index.end * index.time_base - index.time(0))
    facts["corrupt"] = tally.damaged


def _refuse_damage(job: "_Job", damaged: int, frames: int) -> None:
    if damaged > CORRUPT_LIMIT * frames and not job.allow_partial:
        fix = "get the video again, or encode-video --allow-partial takes what there is"
        raise InputError(f"{damaged} of {frames} decoded frames are damaged or missing", where=job.path, fix=fix)


def sample(shots: Iterable[Shot], *, fps: Rate | None, wanted: Iterable[int] = ()) -> Iterator[Shot]:
    """The shots to take, in order: at the rate `fps`, or where `fps` is None those numbered in ascending `wanted`.

    A shot that stays on display over several sampling times is taken several times.
    """
    if fps is None:
        todo = iter(wanted)
        want = next(todo, None)
        for shot in shots:
            while want == shot.index:
                yield shot
                want = next(todo, None)
        return
    if fps == "native":
        yield from shots
        return
    step = 1 / Fraction(fps).limit_denominator(100_000)
    shown: Shot | None = None
    due = Fraction(0)
    for shot in shots:
        if shown is None:
            due = shot.pts
        while shown is not None and due < shot.pts:
            yield shown
            due += step
        shown = shot
    while shown is not None and (due < shown.end or due == shown.pts):
        yield shown
        due += step


def spread(count: int, frames: int) -> list[int]:
    """Numbers of `frames` frames evenly spread over `count`, both ends included: LongVA's linspace, rounded down."""
    return np.linspace(0, count - 1, frames, dtype=int).tolist()


@dataclass(frozen=True)
class _Job:
    """The arguments of `read_frames`."""

    path: Path
    fps: Rate | None
    frames: int | None
    wanted: Sequence[int] | None
    decoder: Decoder
    sampling: Sampling
    allow_partial: bool
    prepare: Prepare | None
    threads: int


def _read_everything(job: _Job, facts: dict[str, Any], tally: Tally) -> Iterator[Frame]:
    """Front to back, every frame decoded: where packets do not tell what is in them."""
    count = 0
    if job.frames is not None:
        count = sum(1 for _ in _shots(job, {}, Tally()))
        tally.packets = 0
    wanted = spread(count, job.frames) if job.frames is not None and count else job.wanted or ()
    convert = Converter(job.prepare)
    last: Frame | None = None
    for shot in sample(_shots(job, facts, tally), fps=job.fps, wanted=wanted):
        if last is None or last.index != shot.index:
            (facts["height"], facts["width"]), image = convert(shot.data)
            last = Frame(index=shot.index, pts=float(shot.pts), image=image)
        yield last
    if last is None:
        raise InputError("not one frame could be decoded", where=job.path)
    facts["corrupt"] = tally.damaged
    _refuse_damage(job, tally.damaged, tally.decoded + tally.damaged)


def _shots(job: _Job, facts: dict[str, Any], tally: Tally) -> Iterator[Shot]:
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
            yield Shot(index=tally.decoded, pts=start * tick, end=last, data=frame)
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
