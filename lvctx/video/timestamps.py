"""Continuous times for packets of a stream whose clock jumps, and for frames with missing or wrong timestamps.

In transport and program streams joined from several recordings, times restart or jump ahead at every joint. The
ffmpeg program makes them continuous (fftools/ffmpeg_demux.c, `ts_discontinuity_detect`), and so does `Clock`.

A decoder returns frames in the order of presentation, regardless of the container. AVI stores no presentation times,
so timestamps there, and in files remuxed from it, are in decoding order or missing. `in_order` corrects them.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av

AHEAD, BACK = 10, Fraction(1, 10)
"""Seconds that the clock of a stream made for broadcast may jump before it is corrected, as in ffmpeg."""
AHEAD_ELSEWHERE, BACK_ELSEWHERE = 30 * 3600, 1
"""The same in other containers: ffmpeg's 30 hours; ffmpeg drops packets that are earlier than the ones before."""
REORDERED = 16
"""Frames that a decoder may hold back for reordering: the maximum of H.264 and HEVC."""


class Clock:
    """Shifts the times of a stream's packets, taken in file order, so that times that jump become continuous."""

    def __init__(self, container: Any, stream: Any) -> None:
        tick, self._frame = Fraction(stream.time_base), frame_ticks(stream)
        if container.format.flags & av.format.Flags.ts_discont.value:
            self._ahead, self._back = int(AHEAD / tick), int(BACK / tick)
        else:
            self._ahead, self._back = int(AHEAD_ELSEWHERE / tick), int(BACK_ELSEWHERE / tick)
            if container.format.name.startswith("mov,"):
                self._back = self._ahead  # an edit list may repeat packets that precede a segment
        self._apart = max(self._ahead, REORDERED * self._frame)
        self._last = self._due = 0
        self._started = False
        self.jumps = 0
        """How often the clock has jumped."""
        self.offset = 0
        """Ticks by which packets are currently shifted."""

    def mend(self, packet: Any) -> None:
        """Correct the times of the next packet."""
        dts, pts = packet.dts, packet.pts
        if dts is None:
            return
        dts += self.offset
        if self._started and (abs(dts - self._due) > self._ahead or dts + self._back < self._last):
            self.jumps, self.offset, dts = self.jumps + 1, self.offset + self._due - dts, self._due
        if self.offset:
            packet.dts = dts
            if pts is not None:
                packet.pts = pts = pts + self.offset
        if pts is not None and abs(pts - dts) > self._apart:
            packet.pts = None  # from another recording than its neighbours
        self._started, self._last, self._due = True, dts, dts + (packet.duration or self._frame)


class Timed(NamedTuple):
    """A frame and its start and end in ticks."""

    data: Any
    start: int
    end: int


def in_order(frames: Iterable[Any], stream: Any) -> Iterator[Timed]:
    """The times of a decoder's frames, in order: none is earlier than the one before.

    Timestamps of nearby frames are sorted. A frame without one starts when the one before it ends, as in ffmpeg.
    """
    a_frame = frame_ticks(stream)
    pending: deque[tuple[Any, bool]] = deque()
    stamps: list[int] = []
    before: Timed | None = None

    def leave() -> Timed:
        data, stamped = pending.popleft()
        start = heapq.heappop(stamps) if stamped else before.end if before else 0
        if before:
            start = max(start, before.start)
        return Timed(data, start, start + (data.duration or a_frame))

    for frame in frames:
        stamp = frame.dts if frame.pts is None else frame.pts
        pending.append((frame, stamp is not None))
        if stamp is not None:
            heapq.heappush(stamps, stamp)
        # If no frame is ever held back, timestamps are in order; decoders may set has_b_frames while decoding.
        if len(pending) > (REORDERED if stream.codec_context.has_b_frames else 0):
            yield (before := leave())
    while pending:
        yield (before := leave())


def frame_ticks(stream: Any) -> int:
    """Duration of a frame for which none is stored: 0 if the rate is not known either."""
    rate = stream.average_rate or stream.guessed_rate
    return int(1 / Fraction(rate) / Fraction(stream.time_base)) if rate else 0
