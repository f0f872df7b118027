"""Which frames a sampling takes: of numbered times in ticks, or of shots as they come."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from lvctx.vision.packets import PacketIndex

Rate = float | Literal["native"]
"""Frames a second, or every frame."""


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


def choose(index: PacketIndex, fps: Rate | None, frames: int | None) -> list[int]:
    """Numbers of the frames to take, ascending, by the rules above; a frame may be taken several times."""
    if frames is not None:
        return spread(len(index), frames)
    if fps == "native":
        return list(range(len(index)))
    pts_F = index.pts_N[index.packet_F]
    first, last = int(pts_F[0]), int(pts_F[-1])
    due = due_ticks(first, last, index.end, index.time_base, fps)
    return (np.searchsorted(pts_F, due, "right") - 1).tolist()


def due_ticks(first: int, last: int, end: int, tick: Fraction, fps: Any) -> list[int]:
    """Ticks at which a frame is taken, from the first frame's on: before `end`, or when the last frame begins."""
    step = 1 / Fraction(fps).limit_denominator(100_000) / tick
    count = max(math.ceil((end - first) / step), (last - first) // step + 1)
    return [first + k * step.numerator // step.denominator for k in range(count)]


def nearest_key_frames(index: PacketIndex, wanted: list[int]) -> tuple[list[int], dict[str, float]]:
    """For every wanted frame the key frame shown nearest to it (the earlier of two); mean and max error in seconds."""
    pts_F, keys = index.pts_N[index.packet_F], index.key_frames
    after = np.searchsorted(keys, wanted).clip(1, max(1, len(keys) - 1))
    left, right = keys[after - 1], keys[np.minimum(after, len(keys) - 1)]
    off_left, off_right = abs(pts_F[left] - pts_F[wanted]), abs(pts_F[right] - pts_F[wanted])
    taken = np.where(off_left <= off_right, left, right)
    off = np.minimum(off_left, off_right) * float(index.time_base)
    return taken.tolist(), {"mean": round(float(off.mean()), 6), "max": round(float(off.max()), 6)}


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
