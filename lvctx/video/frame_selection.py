"""Which frames a sampling takes: from a list of times in ticks, or from a stream of decoded frames."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.errors import InputError
from lvctx.video.packet_index import PacketIndex
from lvctx.video.sampling import VideoSampling


@dataclass(frozen=True, kw_only=True)
class DecodedFrame:
    """A decoded frame of the source, not yet converted, that sampling accepts or skips."""

    index: int
    """Number in the source, in the order of presentation, from 0."""
    pts: Fraction
    """Exact seconds."""
    end: Fraction
    """When the next frame is due; equal to `pts` if the container does not store it."""
    data: Any = field(default=None, repr=False)
    """The decoder's own frame."""


def frame_numbers(index: PacketIndex, sampling: VideoSampling, path: Path) -> list[int]:
    """Numbers of the frames to take, ascending; a frame may be taken several times.

    Raises InputError for a file of chosen frames without this video, or with a frame that it does not have.
    """
    pts_F = index.pts_N[index.packet_F]
    first, last = int(pts_F[0]), int(pts_F[-1])
    if sampling.frames_from is not None:
        times = (pts_F - first).tolist()
        return chosen_numbers(times, index.end - first, sampling, path, tick=index.time_base)
    if sampling.frames is not None or sampling.fps == "native":
        low, high = numbers_between((pts_F - first).tolist(), sampling, tick=index.time_base)
        count = high - low
        return [low + n for n in (range(count) if sampling.frames is None else spread(count, sampling.frames))]
    due = due_ticks(first, last, index.end, index.time_base, sampling)
    return (np.searchsorted(pts_F, due, "right") - 1).tolist()


def chosen_numbers(
    times: Sequence[int | Fraction],
    end: int | Fraction,
    sampling: VideoSampling,
    path: Path,
    *,
    tick: Fraction = Fraction(1),
) -> list[int]:
    """Numbers of the frames that `frames_from` states for a video.

    `times` are all frames' in ascending ticks from the first frame, `end` is when the last one ends. Raises InputError
    without an entry for the video, or for a frame that it does not have.
    """
    assert sampling.frames_from is not None
    chosen = sampling.frames_from.of(path)
    if chosen.unit == "frames":
        if chosen.values[-1] >= len(times):
            what = f"frame {chosen.values[-1]} was chosen in {sampling.frames_from.file}, of {len(times):,} from 0"
            raise InputError(what, where=path, fix="check that the frames are of this video")
        return [int(n) for n in chosen.values]
    moments = [_exact(seconds) / tick for seconds in chosen.values]
    if moments[-1] >= end and moments[-1] > times[-1]:
        what = f"{chosen.values[-1]:g} s was chosen in {sampling.frames_from.file}, of {float(end * tick):.3f} s"
        raise InputError(what, where=path, fix="check that the times are of this video, from its first frame")
    return [bisect_right(times, moment) - 1 for moment in moments]


def numbers_between(
    times: Sequence[int | Fraction], sampling: VideoSampling, *, tick: Fraction = Fraction(1)
) -> tuple[int, int]:
    """The half-open range of numbers of the times, ascending ticks from the first frame, between `start` and `end`."""
    low = bisect_left(times, _exact(sampling.start or 0) / tick)
    return low, len(times) if sampling.end is None else max(low, bisect_left(times, _exact(sampling.end) / tick))


def due_ticks(first: int, last: int, end: int, tick: Fraction, sampling: VideoSampling) -> list[int]:
    """Ticks at which a rate takes a frame: from the first frame or `start`, before the end of the video or `end`."""
    step = _step(sampling) / tick
    begin = first + _exact(sampling.start or 0) / tick
    count = max(math.ceil((end - begin) / step), (last - begin) // step + 1)
    if sampling.end is not None:
        count = min(count, math.ceil((first + _exact(sampling.end) / tick - begin) / step))
    # begin + k * step, rounded down: in integers, since there may be a hundred thousand.
    base, part = begin.numerator * step.denominator, begin.denominator * step.numerator
    return [(base + k * part) // (begin.denominator * step.denominator) for k in range(count)]


def _exact(seconds: float) -> Fraction:
    """The decimal number that was given: as a float, 0.44 is slightly larger."""
    return Fraction(seconds).limit_denominator(1_000_000)


def _step(sampling: VideoSampling) -> Fraction:
    """Seconds from one sampling time to the next."""
    return 1 / Fraction(sampling.fps or 1).limit_denominator(100_000)


def nearest_key_frames(index: PacketIndex, frame_indices: list[int]) -> tuple[list[int], dict[str, float]]:
    """For every wanted frame the key frame shown nearest to it (the earlier of two); mean and max error in seconds."""
    pts_F, keys = index.pts_N[index.packet_F], index.key_frames
    after = np.searchsorted(keys, frame_indices).clip(1, max(1, len(keys) - 1))
    left, right = keys[after - 1], keys[np.minimum(after, len(keys) - 1)]
    error_left, error_right = abs(pts_F[left] - pts_F[frame_indices]), abs(pts_F[right] - pts_F[frame_indices])
    nearest = np.where(error_left <= error_right, left, right)
    errors = np.minimum(error_left, error_right) * float(index.time_base)
    return nearest.tolist(), {"mean": round(float(errors.mean()), 6), "max": round(float(errors.max()), 6)}


def take_numbered(frames: Iterable[DecodedFrame], frame_indices: Iterable[int]) -> Iterator[DecodedFrame]:
    """The frames numbered in ascending `frame_indices`, each as often as it occurs."""
    numbers = iter(frame_indices)
    number = next(numbers, None)
    for frame in frames:
        while number == frame.index:
            yield frame
            number = next(numbers, None)


def take_sampled(frames: Iterable[DecodedFrame], sampling: VideoSampling) -> Iterator[DecodedFrame]:
    """The frames that a rate takes, in order; a frame on display at several sampling times is repeated."""
    native = sampling.fps == "native"
    begin = _exact(sampling.start or 0)
    until: Fraction | float = math.inf
    due = Fraction(0)
    previous: DecodedFrame | None = None
    for frame in frames:
        if previous is None:
            due = frame.pts + begin
            until = math.inf if sampling.end is None else frame.pts + _exact(sampling.end)
            begin = due
        if native and begin <= frame.pts < until:
            yield frame
        while not native and previous is not None and due < min(frame.pts, until):
            yield previous
            due += _step(sampling)
        previous = frame
    while not native and previous is not None and due < until and (due < previous.end or due == previous.pts):
        yield previous
        due += _step(sampling)


def spread(count: int, frames: int) -> list[int]:
    """Numbers of `frames` frames evenly spread over `count`, both ends included: LongVA's linspace, rounded down."""
    return np.linspace(0, count - 1, frames, dtype=int).tolist() if count else []
