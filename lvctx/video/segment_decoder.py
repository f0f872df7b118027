"""Decode only what the wanted frames need, in several threads, in the order of presentation.

Every thread has its own container and decoder and takes seek ranges one after another: it seeks to the entry, skips
unwanted spare packets and stops after the last packet that is needed. A video of one seek range is decoded by one
thread with a multi-threaded decoder. Conversion to RGB and the caller's `prepare` run in a separate thread pool.
"""

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np

from lvctx.video.container import demux, open_video
from lvctx.video.packet_index import HIDDEN, SPARE, PacketIndex, SeekRange
from lvctx.video.pixel_conversion import RgbConverter

AHEAD_BYTES = 200_000_000
"""Limit for RGB bytes waiting for the consumer, over all threads."""
NEAR = 64
"""Up to this many packets are skipped by reading rather than by seeking."""

Prepare = Callable[[np.ndarray], np.ndarray]


@dataclass(kw_only=True)
class DecodeStats:
    """Progress of decoding, over all threads."""

    decoded: int = 0
    """Number of frames that the decoder should have returned."""
    damaged: int = 0
    """Of these, the frames that are missing or marked as corrupt by the decoder."""
    packets: int = 0
    """Number of packets read, which shows that decoding continues."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Converter(threading.local):
    """One `RgbConverter` per thread."""

    def __init__(self, prepare: Prepare | None) -> None:
        self._rgb_converter, self._prepare = RgbConverter(), prepare

    def __call__(self, frame: Any) -> tuple[tuple[int, int], np.ndarray]:
        """(height, width) of the upright image, and the result of `prepare`."""
        image = self._rgb_converter.rgb(frame)
        return image.shape[:2], self._prepare(image) if self._prepare else image


def read_planned(
    path: Path,
    index: PacketIndex,
    seek_ranges: Sequence[SeekRange],
    *,
    prepare: Prepare | None,
    threads: int,
    stats: DecodeStats,
) -> Iterator[tuple[int, tuple[int, int], np.ndarray]]:
    """(frame, (height, width), image) of each wanted frame, ascending; frames that do not decode are left out."""
    work = _Work(path, index, seek_ranges, Converter(prepare), threads, stats)
    with work:
        for number in range(len(seek_ranges)):
            yield from work.results(number)


class _Work:
    def __init__(
        self,
        path: Path,
        index: PacketIndex,
        seek_ranges: Sequence[SeekRange],
        convert: Converter,
        threads: int,
        stats: DecodeStats,
    ) -> None:
        self.path, self.index, self.seek_ranges, self.convert, self.stats = path, index, seek_ranges, convert, stats
        container, stream = open_video(path)
        with container:
            room = max(4, min(128, AHEAD_BYTES // max(1, stream.width * stream.height * 3)))
        dense = max((len(s.frames) for s in seek_ranges), default=1)
        # If a seek range has more wanted frames than may wait, other threads would block: use one with all cores.
        workers = min(threads, len(seek_ranges), max(1, room // dense))
        self.decoder_threads = max(1, threads // workers) if workers > 1 or threads == 1 else 0
        self.open_ranges = max(workers, min(len(seek_ranges), room // dense))
        self.room = max(1, room // self.open_ranges)
        self.queues: dict[int, queue.Queue[Any]] = {}
        self.turn = threading.Semaphore(self.open_ranges)
        self.lock, self.next, self.stop = threading.Lock(), 0, threading.Event()
        self.pool = ThreadPoolExecutor(threads)
        self.workers = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]

    def __enter__(self) -> "_Work":
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.turn.release(len(self.workers) or 1)
        for worker in self.workers:
            worker.join()
        self.pool.shutdown(cancel_futures=True)

    def _queue(self, number: int) -> "queue.Queue[Any]":
        with self.lock:
            return self.queues.setdefault(number, queue.Queue(self.room))

    def results(self, number: int) -> Iterator[tuple[int, tuple[int, int], np.ndarray]]:
        results = self._queue(number)
        while (item := results.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            frame, future = item
            yield frame, *future.result()
        del self.queues[number]
        self.turn.release()

    def _put(self, number: int, item: Any) -> None:
        results = self._queue(number)
        while not self.stop.is_set():
            try:
                return results.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _work(self) -> None:
        reader: _RangeReader | None = None
        while True:
            self.turn.acquire()
            with self.lock:
                number, self.next = self.next, self.next + 1
            if self.stop.is_set() or number >= len(self.seek_ranges):
                break
            end: BaseException | None = None
            try:
                reader = reader or _RangeReader(self.path, self.index, self.decoder_threads, self.stats)
                for frame, decoded in reader.read(self.seek_ranges[number]):
                    self._put(number, (frame, self.pool.submit(self.convert, decoded)))
                    if self.stop.is_set():
                        break
            except BaseException as e:
                end = e
            self._put(number, end)
        if reader is not None:
            reader.close()


class _RangeReader:
    """One thread's container and decoder."""

    def __init__(self, path: Path, index: PacketIndex, threads: int, stats: DecodeStats) -> None:
        self.path, self.index, self.threads, self.stats = path, index, threads, stats
        self.entry_at = {int(index.pts_N[number]): number for number in index.entry_dts}
        self._open()

    def _open(self) -> None:
        self.container, self.stream = open_video(self.path)
        self.stream.codec_context.thread_count = self.threads
        self.packets, self.at = demux(self.container, self.stream), 0

    def close(self) -> None:
        self.container.close()

    def read(self, seek_range: SeekRange) -> Iterator[tuple[int, Any]]:
        """(frame, decoded) of the seek range's wanted frames, in order."""
        index = self.index
        frame_at_pts = {int(index.pts_N[index.packet_F[frame]]): frame for frame in seek_range.frames}
        first = int(index.pts_N[seek_range.start])
        expected = got = corrupt = 0
        for decoded in self._decode(seek_range, frame_at_pts):
            if isinstance(decoded, int):  # the time of a packet sent to the decoder
                expected += decoded >= first
                continue
            # Frames before the entry refer to earlier ones; they are not part of this range.
            if decoded.pts is None or decoded.pts < first:
                continue
            got += 1
            corrupt += bool(decoded.is_corrupt)
            if decoded.pts in frame_at_pts:
                yield frame_at_pts.pop(decoded.pts), decoded
        with self.stats.lock:
            self.stats.decoded += expected
            self.stats.damaged += max(0, expected - got) + corrupt

    def _decode(self, seek_range: SeekRange, frame_at_pts: dict[int, int]) -> Iterator[Any]:
        """The times of the decoded packets that are shown, and the frames that the decoder returns."""
        flags_N, pts_N = self.index.flags_N, self.index.pts_N
        self._go_to(seek_range.start)
        for packet in self.packets:
            number, self.at = self.at, self.at + 1
            self.stats.packets += 1
            if not flags_N[number] & SPARE or int(pts_N[number]) in frame_at_pts:
                if not flags_N[number] & HIDDEN:
                    yield int(pts_N[number])
                if self.index.jumps:
                    packet.pts = int(pts_N[number])
                try:
                    yield from packet.decode()
                except av.EOFError:
                    return
                except MemoryError:  # frames that do not fit are not damaged
                    raise
                except av.FFmpegError:
                    pass  # its frame is missing, and is counted
            if self.at == seek_range.stop:
                break
        with contextlib.suppress(av.FFmpegError):
            yield from self.stream.decode(None)
        self.stream.codec_context.flush_buffers()

    def _go_to(self, start: int) -> None:
        """Position `self.packets` at packet `start`, an entry."""
        if self.index.jumps:
            if start < self.at:
                self._reopen()
        elif not self.at <= start <= self.at + NEAR:
            self._seek(start)
        while self.at < start:
            next(self.packets)
            self.at += 1

    def _seek(self, start: int) -> None:
        """Restart `self.packets` at an entry at or shortly before `start`."""
        entries = [number for number in self.index.entry_dts if number <= start][::-1]
        # Containers differ in whether they seek by presentation or by decoding time.
        for tick in (int(self.index.pts_N[start]), *(self.index.entry_dts[number] for number in entries[:3])):
            try:
                self.container.seek(tick, stream=self.stream)
            except av.FFmpegError:
                break
            packets = demux(self.container, self.stream)
            for packet in packets:
                number = self.entry_at.get(packet.pts)
                if number is not None:
                    break
            else:
                continue
            if number <= start:
                self.packets, self.at = itertools.chain([packet], packets), number
                return
        self._reopen()

    def _reopen(self) -> None:
        self.container.close()
        self._open()
