"""Video files from outside: are they whole, do they open, and what do their headers say. Nothing is decoded here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import av

from lvctx.errors import InputError

TS_PACKETS = (188, 192, 204)
"""Sizes of a transport stream's packets: plain, with a Blu-ray time code before, with parity after."""


def check_whole(path: Path) -> None:
    """Raise InputError for a file that is missing or empty, or cut short: MP4, Matroska, AVI or a transport stream.

    A decoder plays what is left of a cut file without a word. The first three say how long they are; a transport stream
    shows it only where the cut goes through a packet.
    """
    size = check_exists(path)
    with open(path, "rb") as f:
        head = f.read(1024)
        if head[4:8] == b"ftyp":
            end = _end_of_mp4(f, size)
        elif head.startswith(b"\x1aE\xdf\xa3"):
            end = _end_of_matroska(head)
        elif head.startswith(b"RIFF"):
            end = _end_of_riff(f, size)
        else:
            end = _end_of_transport_stream(head, size)
    if end > size:
        raise InputError(
            f"the video is cut short at {size:,} bytes", where=path, fix="get it again, or encode-video --allow-partial"
        )


def check_exists(path: Path) -> int:
    """Size of a file in bytes. Raises InputError where there is none or it is empty."""
    if not path.exists():
        raise InputError("no such video", where=path)
    if not path.is_file():
        raise InputError("not a file", where=path, fix="give a video file")
    size = path.stat().st_size
    if size == 0:
        raise InputError("the file is empty", where=path, fix="download or copy it again")
    return size


def _end_of_mp4(f: BinaryIO, size: int) -> int:
    """Where the first box ends that ends beyond `size`, or else `size`."""
    at = 0
    while at < size:
        f.seek(at)
        head = f.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:  # a 64-bit length follows the box's name
            length = int.from_bytes(head[8:16], "big")
        elif length == 0 and len(head) >= 8:  # the last box, up to the end of the file
            return size
        at += max(length, 8)
    return at


def _end_of_riff(f: BinaryIO, size: int) -> int:
    """Where the last of an AVI's RIFF chunks ends (beyond a gigabyte there are several)."""
    at = 0
    while at < size:
        f.seek(at)
        head = f.read(8)
        if not head.startswith(b"RIFF"[: len(head)]):
            return size  # padding, or something a recorder put behind
        length = int.from_bytes(head[4:], "little")
        if length == 0:  # a recorder that never came back to fill it in
            return size
        at += 8 + length
    return at


def _end_of_transport_stream(head: bytes, size: int) -> int:
    """The end of the last packet of `size` bytes, or `size` for what is no transport stream."""
    for length in TS_PACKETS:
        start = 4 if length == 192 else 0
        marks = head[start::length]
        if len(marks) >= 4 and set(marks) == {0x47}:
            return -(-size // length) * length
    return size


def _end_of_matroska(head: bytes) -> int:
    """Where the segment ends that follows the header; 0 where it does not say, as in a recorded live stream."""

    def number(at: int) -> tuple[int, int]:
        width = 9 - head[at].bit_length()  # as many bytes as the first has leading zeros, and one
        value = int.from_bytes(head[at : at + width], "big") & ((1 << 7 * width) - 1)
        return (0 if value == (1 << 7 * width) - 1 else value), at + width

    try:
        length, at = number(4)
        if head[at + length : at + length + 4] != b"\x18S\x80g":
            return 0
        length, at = number(at + length + 4)
    except IndexError:
        return 0
    return at + length if length else 0


def open_video(path: Path) -> tuple[Any, Any]:
    """A container and its video stream, of several the one that the ffmpeg program takes, ready to decode on all cores.

    Raises InputError where there is none.
    """
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise InputError(f"not a video that FFmpeg can open ({reason})", where=path) from e
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover and s.codec_context is not None]
    if not streams:
        container.close()
        raise InputError("no video stream", where=path, fix="give a file with a picture")
    stream = max(streams, key=_preference)  # the first of equals
    stream.thread_type = "AUTO"
    return container, stream


def _preference(stream: Any) -> int:
    """What the ffmpeg program chooses a video stream by (fftools/ffmpeg_mux_init.c, `map_auto_video`).

    The largest picture, and a stream that is marked as default counts as five million pixels more. One without a
    packet is the last choice: there it looks at what it read, here counts what the container says.
    """
    default = bool(stream.disposition & av.stream.Disposition.default)
    return int(stream.width) * int(stream.height) + 5_000_000 * default + 100_000_000 * (stream.frames > 0)


def demux(container: Any, stream: Any) -> Iterator[Any]:
    """The packets of a stream that hold something, up to the end or to where the container is beyond reading."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.FFmpegError):
            return
        if packet.size:
            yield packet


def probe(path: Path) -> dict[str, Any]:
    """width, height and, as far as the container says, duration in seconds and average fps; nothing is decoded."""
    check_exists(path)
    container, stream = open_video(path)
    with container:
        if stream.duration is not None:
            duration = float(stream.duration * stream.time_base)
        else:
            duration = (container.duration or 0) / av.time_base
        rate = float(stream.average_rate or 0)
        return {"width": stream.width, "height": stream.height, "duration": duration, "source_fps": rate}
