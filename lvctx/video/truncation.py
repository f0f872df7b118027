"""Whether a video file is truncated, judged by the sizes that its container states. Nothing is decoded.

A decoder plays the rest of a truncated file without an error. But tags, camera trailers and padding may follow the
video, and recorders write sizes that are unknown or off by a header. So a file counts as truncated only if an element
that holds frames, or their index, ends beyond the file.

Sources: ISO/IEC 14496-12 (boxes of MP4 and QuickTime), RFC 8794 and RFC 9559 (elements of Matroska), OpenDML 2.0
(chunks of AVI). A transport stream has no size; it may end anywhere.
"""

import io
from pathlib import Path
from typing import BinaryIO, NamedTuple


class Truncation(NamedTuple):
    """Evidence that a file is truncated."""

    why: str
    """For people."""
    readable: bool = True
    """Whether the rest can be decoded."""


def find_truncation(path: Path) -> Truncation | None:
    """Evidence that a video file is truncated; None for a complete one, or if its container has no such sizes."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(12)
        if head[4:8] in MP4_HEADS:
            return _cut_mp4(f, size)
        if head.startswith(b"\x1aE\xdf\xa3"):
            return _cut_matroska(f, size)
        if head.startswith(b"RIFF"):
            return _cut_riff(f, size)
    return None


MP4_HEADS = (b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"pnot")
"""Boxes that may begin a file; old QuickTime files have no ftyp."""
MP4_MOVIE = (b"moov", b"mdat", b"moof", b"styp", b"sidx", b"ssix", b"prft", b"emsg", b"mfra")
"""Boxes of frames and fragments. All others (free, uuid, udta, or data that is no box) may be cut or be a trailer."""


def _cut_mp4(f: BinaryIO, size: int) -> Truncation | None:
    at, kinds = 0, []
    while size - at >= 8:
        f.seek(at)
        head = f.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:  # a 64-bit length follows the box's name
            length = int.from_bytes(head[8:], "big")
        elif length == 0:  # the last box, up to the end of the file
            length = size - at
        end = at + length
        if end > size and kind in MP4_MOVIE:
            return Truncation(f"its {kind.decode()} box ends at {end:,}", readable=b"moov" in kinds)
        if length < 8 or end > size:
            break  # not a box of the movie but a trailer
        kinds.append(kind)
        at = end
    if b"moov" not in kinds and b"meta" not in kinds:  # meta: pictures of HEIF
        return Truncation("its index (moov box) is missing", readable=False)
    data = [kind for kind in kinds if kind in (b"moof", b"mdat")]
    if b"moov" in kinds and (not data or data[-1] == b"moof"):
        return Truncation("its data (mdat box) is missing", readable=bool(data))
    return None


SEGMENT, SEEK_HEAD, SEEK, SEEK_POSITION = b"\x18S\x80g", b"\x11M\x9bt", b"M\xbb", b"S\xac"


def _cut_matroska(f: BinaryIO, size: int) -> Truncation | None:
    try:
        _, length, at = _element(f, 0)
        kind, length, start = _element(f, min(at + (length or 0), size))
    except ValueError:
        return None
    if kind != SEGMENT or length is None or start + length <= size:
        return None
    cut = Truncation(f"its segment ends at {start + length:,}")
    at, targets = start, [0]
    try:
        while at < size:
            kind, length, inner = _element(f, at)
            if kind == SEEK_HEAD and length is not None:
                targets += _seek_positions(f, inner, inner + length)
            at = inner + (length or 0)  # of unknown length, as a live cluster: its content follows
    except ValueError:
        return cut
    # If the last element ends with the file and every element referred to exists, the stated size is wrong.
    return cut if at > size or start + max(targets) >= size else None


def _element(f: BinaryIO, at: int) -> tuple[bytes, int | None, int]:
    """Id, length (None: unknown) and content offset of the EBML element at an offset. Raises ValueError."""
    f.seek(at)
    head = f.read(12)
    width = 9 - head[0].bit_length() if head else 9  # one more byte than the first has leading zeros
    size = 9 - head[width].bit_length() if len(head) > width else 9
    if width > 4 or size > 8 or len(head) < width + size:
        raise ValueError("not an EBML element")
    unknown = (1 << 7 * size) - 1
    length = int.from_bytes(head[width : width + size], "big") & unknown
    return head[:width], None if length == unknown else length, at + width + size


def _seek_positions(f: BinaryIO, at: int, end: int) -> list[int]:
    """Offsets of the elements that a seek head lists, from the start of the segment's content."""
    f.seek(at)
    buffer = io.BytesIO(f.read(min(end - at, 1 << 16)))
    positions, place, total = [], 0, len(buffer.getbuffer())
    while place < total:
        kind, length, inner = _element(buffer, place)
        if kind == SEEK_POSITION:
            buffer.seek(inner)
            positions.append(int.from_bytes(buffer.read(length or 0), "big"))
        place = inner if kind == SEEK else inner + (length or 0)
    return positions


RIFF_PICTURES = (b"LIST", b"idx1", b"ANMF", b"VP8 ", b"VP8L")
"""Chunks of AVI and WebP that hold frames or their index."""
SLACK = 12
"""Bytes by which writers overstate a chunk's size: its own header, with a list's name."""


def _cut_riff(f: BinaryIO, size: int) -> Truncation | None:
    """The RIFF chunks' own sizes are not used: they are wrong or unknown too often, and the chunks inside suffice."""
    at = 0
    while size - at >= 12:
        f.seek(at)
        head = f.read(12)
        kind, length = head[:4], int.from_bytes(head[4:8], "little")
        if kind == b"RIFF":  # files beyond a gigabyte have several
            at += 12
            continue
        if kind == b"LIST" and head[8:] == b"movi" and length in (0, 0xFFFFFFFF):
            return None  # the recorder never filled it in
        end = at + 8 + length
        if end > size + SLACK:
            name = "movi" if head[8:] == b"movi" else kind.decode("latin-1").strip()
            return Truncation(f"its {name} chunk ends at {end:,}") if kind in RIFF_PICTURES else None
        at = end + length % 2
    return None


TS_PACKETS = (188, 192, 204)
"""Sizes of a transport stream's packets: plain, preceded by a Blu-ray time code, followed by parity."""


def ends_inside_packet(path: Path) -> bool:
    """Whether this is a transport stream that ends within a packet, so that its last frame may be incomplete.

    Recorders stop anywhere, and players play such files to the end.
    """
    with open(path, "rb") as f:
        head = f.read(1024)
        size = f.seek(0, io.SEEK_END)
    for length in TS_PACKETS:
        marks = head[4 if length == 192 else 0 :: length]
        if len(marks) >= 4 and set(marks) == {0x47}:
            return size % length > 0
    return False
