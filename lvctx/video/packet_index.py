"""The index of a video's packets, read before anything is decoded: when each frame is shown, and what it depends on.

One pass over the container gives every frame's number and time, so the sampling is decided first, and then only the
packets that the sampled frames need are decoded. This is exact because of three facts:

- Decoding may begin at an entry: a packet such that nothing shown at or after it refers to earlier packets
  (IDR in H.264; IDR, BLA and CRA in HEVC; key frames in VP9 and AV1). A container's key frame flag alone is not enough
  for H.264: it is also set where a picture only begins to refresh.
- A spare packet is one that no other frame refers to (nal_ref_idc 0 in H.264; in HEVC a sub-layer non-reference picture
  of the highest temporal layer), so it is decoded only if its frame is wanted. VP9 and AV1 have none: every frame
  passes its entropy contexts on to later frames.
- Packets after the last wanted one of a seek range, in decoding order, are not needed.

Suffixes: N packets in the order of decoding, F frames in the order of presentation, E entries.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lvctx.video.container import demux, open_video
from lvctx.video.timestamps import Clock

PLANNED = ("h264", "hevc", "vp9", "av1")
"""Codecs with one frame per packet; VP8 and old AVIs hide frames or put several into a packet."""
HIDDEN, ENTRY, SPARE = 1, 2, 4
MERGE = 128
"""Largest number of packets for which adjacent seek ranges are joined: a new seek costs about a frame."""


class SeekRange(NamedTuple):
    """A range of packets to decode after one seek."""

    start: int
    """The entry, in the order of decoding."""
    stop: int
    """One past the last packet that is needed."""
    frames: list[int]
    """Numbers of the wanted frames, in the order of presentation."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PacketIndex:
    """A video's packets; 17 bytes of memory each: 1.5 MB per hour at 25 frames per second."""

    codec: str
    """One of `PLANNED`."""
    time_base: Fraction
    """Seconds per tick."""
    pts_N: np.ndarray
    """int64: ticks at which each packet's frame is shown."""
    flags_N: np.ndarray
    """uint8: of HIDDEN (decoded but not shown: before an edit list's start), ENTRY, SPARE."""
    packet_F: np.ndarray
    """int64: the packet of each frame."""
    entry_dts: dict[int, int]
    """Entry -> the tick to seek to."""
    end: int
    """Tick at which the last frame ends."""
    jumps: bool = False
    """Whether the clock jumps: then times differ from the packets' own, and seeking by them does not work."""

    def __len__(self) -> int:
        """Frames."""
        return len(self.packet_F)

    def time(self, frame: int) -> Fraction:
        """Seconds at which a frame is shown."""
        return int(self.pts_N[self.packet_F[frame]]) * self.time_base

    @property
    def key_frames(self) -> np.ndarray:
        """Numbers of the frames at which decoding may begin, ascending."""
        return np.flatnonzero(self.flags_N[self.packet_F] & ENTRY)

    @property
    def constant_rate(self) -> bool:
        """Whether all frames are shown for equal durations, as far as the clock's ticks allow."""
        gaps = np.diff(self.pts_N[self.packet_F])
        return len(gaps) == 0 or int(gaps.max() - gaps.min()) <= 1

    def seek_ranges(self, frames: Iterable[int]) -> list[SeekRange] | None:
        """The seek ranges for these frames (ascending, distinct); None if the packets are not in the expected order."""
        entries_E = np.fromiter(self.entry_dts, np.int64)
        ranges: list[SeekRange] = []
        before = -1
        for frame in frames:
            packet = int(self.packet_F[frame])
            e = int(np.searchsorted(entries_E, packet, "right")) - 1
            # Packets that follow an entry but are shown before it refer to packets before the entry.
            while e >= 0 and self.pts_N[entries_E[e]] > self.pts_N[packet]:
                e -= 1
            if e < 0 or (entry := int(entries_E[e])) < before:
                return None
            last = ranges[-1] if ranges else SeekRange(-MERGE, -1, [])
            if entry == before or (entry <= last.stop and packet - last.start < MERGE):
                ranges[-1] = SeekRange(last.start, max(last.stop, packet + 1), [*last.frames, frame])
            else:
                ranges.append(SeekRange(entry, packet + 1, [frame]))
            before = entry
        return ranges


def read_packets(path: Path) -> PacketIndex | None:
    """The index of a video; None if packets are not sufficient: for other codecs, and for times that are missing,
    repeated or in another order than the frames'.

    Raises InputError for a file that is not a video.
    """
    container, stream = open_video(path)
    with container:
        codec = stream.codec_context.codec.canonical_name
        if codec not in PLANNED:
            return None
        time_base = Fraction(stream.time_base)  # not available once the container is closed
        size = _length_size(codec, stream.codec_context.extradata or b"")
        pts, flags, layers = array("q"), array("B"), array("B")
        entry_dts: dict[int, int] = {}
        reorders, clock = stream.codec_context.has_b_frames, Clock(container, stream)
        end, latest = 0, -(1 << 63)
        highest = latest  # of all packets; latest is of the shown ones only
        for packet in demux(container, stream):
            jumps = clock.jumps
            clock.mend(packet)
            if packet.pts is None:
                return None
            flag = HIDDEN if packet.is_discard else 0
            layer = 0
            if codec == "h264":
                unit_flags, backward = _classify_h264(units(packet, size), bare=not size)
                if backward and packet.pts > highest:
                    return None  # a picture between others has a timestamp after all of them
                flag |= unit_flags
            elif codec == "hevc":
                unit_flags, layer = _classify_hevc(units(packet, size), bare=not size)
                flag |= unit_flags
            elif packet.is_keyframe:
                flag |= ENTRY
            if clock.jumps > jumps and not flag & ENTRY:
                return None  # a recording that begins with frames that cannot be decoded
            if flag & ENTRY:
                entry_dts[len(pts)] = packet.pts if packet.dts is None else packet.dts
            if not flag & HIDDEN and packet.pts > latest:
                latest, end = packet.pts, packet.pts + (packet.duration or 0)
            highest = max(highest, packet.pts)
            pts.append(packet.pts)
            flags.append(flag)
            layers.append(layer)
    pts_N, flags_N, layers_N = np.array(pts), np.array(flags), np.array(layers)
    displayed_N = np.flatnonzero(~flags_N & HIDDEN)
    packet_F = displayed_N[np.argsort(pts_N[displayed_N], kind="stable")]
    if len(displayed_N) == 0 or 0 not in entry_dts or (np.diff(pts_N[packet_F]) == 0).any():
        return None
    if not _ordered(pts_N, np.fromiter(entry_dts, np.int64), codec):
        return None
    if codec == "hevc" and reorders and len(pts_N) > 1 and (np.diff(pts_N) > 0).all():
        return None  # timestamps in decoding order, as in an AVI
    flags_N[layers_N < layers_N.max()] &= ~np.uint8(SPARE)
    return PacketIndex(
        codec=codec,
        time_base=time_base,
        pts_N=pts_N,
        flags_N=flags_N,
        packet_F=packet_F,
        entry_dts=entry_dts,
        end=end,
        jumps=clock.jumps > 0,
    )


def _ordered(pts_N: np.ndarray, entries_E: np.ndarray, codec: str) -> bool:
    """Whether no time before an entry is later than it and, in H.264, none after it is earlier, as decoders assume."""
    before = np.maximum.accumulate(pts_N)[entries_E[1:] - 1]
    after = np.minimum.accumulate(pts_N[::-1])[::-1][entries_E]
    behind = after < pts_N[entries_E]
    # Leading pictures follow an entry and are shown before it, except in H.264; the first entry has none.
    return bool((before < pts_N[entries_E[1:]]).all()) and not (behind if codec == "h264" else behind[:1]).any()


def _length_size(codec: str, extradata: bytes) -> int:
    """Bytes of the length before each unit (avcC, hvcC); 0 if start codes separate them."""
    if codec not in ("h264", "hevc") or extradata[:1] != b"\x01":
        return 0
    return (extradata[4 if codec == "h264" else 21] & 3) + 1


def units(packet: Any, size: int) -> Iterator[tuple[int, int]]:
    """First two bytes of every unit (NAL) of a packet of H.264 or HEVC."""
    data = bytes(packet)
    at = 0
    if size:
        while at + size + 2 <= len(data):
            start = at + size
            yield data[start], data[start + 1]
            at = start + int.from_bytes(data[at:start], "big")
        return
    while (at := data.find(b"\0\0\1", at)) >= 0 and at + 5 <= len(data):
        yield data[at + 3], data[at + 4]
        at += 3


def _classify_h264(nal_units: Iterator[tuple[int, int]], *, bare: bool) -> tuple[int, bool]:
    """Flags, and whether the picture refers to later ones (its first slice is of type B)."""
    kinds, used, backward = set(), 0, False
    for head, second in nal_units:
        kinds.add(head & 31)
        if head & 31 in (1, 2, 5):
            used |= head >> 5 & 3
            # Exponential Golomb codes: first_mb_in_slice 0 is 1, slice_type B is 010 or 00111.
            backward |= second >> 4 == 0b1010 or second >> 2 == 0b100111
    # If parameter sets are sent within the stream, an entry comes with its own.
    if 5 in kinds and (7 in kinds or not bare):
        return ENTRY, backward
    return (SPARE if kinds & {1, 2} and not used and not kinds & {5, 7, 8} else 0), backward


def _classify_hevc(nal_units: Iterator[tuple[int, int]], *, bare: bool) -> tuple[int, int]:
    """Flags and temporal layer."""
    kinds, layer = set(), 0
    for first, second in nal_units:
        kind = first >> 1 & 63
        kinds.add(kind)
        if kind < 32:
            layer = max(0, (second & 7) - 1)
    slice_kinds = {kind for kind in kinds if kind < 32}
    if slice_kinds and slice_kinds <= set(range(16, 22)) and (33 in kinds or not bare):
        return ENTRY, layer
    spare = slice_kinds and all(kind < 15 and kind % 2 == 0 for kind in slice_kinds) and not kinds & {32, 33, 34}
    return (SPARE if spare else 0), layer
