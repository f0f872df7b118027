"""Continuous times: of packets where a recording's clock jumps, and of frames with missing or wrong timestamps.

Transport and program streams that were joined from several recordings begin anew, or far ahead, at every joint. The
ffmpeg program lets time go on there (fftools/ffmpeg_demux.c, `ts_discontinuity_detect`), and so does `Clock`.

A decoder gives frames in the order of presentation, whatever the container says. AVI knows no presentation times, so
there, and in what was copied from it, stamps are in the order of decoding or missing. `in_order` mends them.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av

AHEAD, BACK = 10, Fraction(1, 10)
"""Seconds that the clock of a stream made for broadcast may jump before it is mended; ffmpeg's own."""
AHEAD_ELSEWHERE, BACK_ELSEWHERE = 30 * 3600, 1
"""The same in other containers: ffmpeg's 30 hours; and it would leave out what is stamped before what went by."""
REORDERED = 16
"""Frames that a decoder may hold back to bring them in order: the most in H.264 and HEVC."""


class Clock:
    """Shifts the times of a stream's packets, taken in the order of the file, so that they go on where they jump."""

    def __init__(self, container: Any, stream: Any) -> None:
        tick, self._frame = Fraction(stream.time_base), frame_ticks(stream)
        if container.format.flags & av.format.Flags.ts_discont.value:
            self._ahead, self._back = int(AHEAD / tick), int(BACK / tick)
        else:
            self._ahead, self._back = int(AHEAD_ELSEWHERE / tick), int(BACK_ELSEWHERE / tick)
            if container.format.name.startswith("mov,"):
                self._back = self._ahead  # an edit list may decode again what leads to a part
        self._apart = max(self._ahead, REORDERED * self._frame)
        self._last = self._due = 0
        self._started = False
        self.jumps = 0
        """How often the clock has jumped."""
        self.offset = 0
        """Ticks by which packets are shifted since."""

    def mend(self, packet: Any) -> None:
        """Set the times of the next packet."""
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
            packet.pts = None  # of another recording than its neighbours
        self._started, self._last, self._due = True, dts, dts + (packet.duration or self._frame)


class Timed(NamedTuple):
    """A frame and when it is shown, in ticks."""

    data: Any
    start: int
    end: int


def in_order(frames: Iterable[Any], stream: Any) -> Iterator[Timed]:
    """When the frames that leave a decoder are shown: never earlier than the one before.

    Stamps of frames near each other are sorted. A frame without follows when the one before it is over, as in ffmpeg.
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
        # Where no frame is ever held back none can be stamped out of order; decoders may learn it on the way.
        if len(pending) > (REORDERED if stream.codec_context.has_b_frames else 0):
            yield (before := leave())
    while pending:
        yield (before := leave())


def frame_ticks(stream: Any) -> int:
    """How long a frame is shown where that is not stored: 0 if the rate is not known either."""
    rate = stream.average_rate or stream.guessed_rate
    return int(1 / Fraction(rate) / Fraction(stream.time_base)) if rate else 0
