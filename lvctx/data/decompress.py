"""A file's format from its first bytes, whatever its name: compressed content is decompressed, UTF-16 and UTF-32 become
UTF-8, and archives, unknown compressions and binary files are refused with their kind.

gzip, Zstandard, xz and bzip2 may have several members (frames, streams), zeros as padding between and after them, and
Zstandard's skippable frames anywhere. A truncated or damaged file and other bytes after the last member are errors, so
part of a file is never taken for all of it. Zstandard's, lzma's and bz2's own readers accept such files.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator
from typing import Any

from lvctx.errors import InputError

MEBIBYTE = 1 << 20
_BLOCK = 1 << 17
_LAYERS = 2
"""Maximum nesting of compressions: some downloads are compressed twice, and a gzip quine nests endlessly."""

_FREE, _MOST_EXPANSION = 64 * MEBIBYTE, 200
"""Bytes that any file may decompress to, and the bound beyond: text has 3 to 20 times its size, zeros 1,000 times."""

_REFUSED = (
    (0, b"\x04\x22\x4d\x18", "LZ4"),
    (0, b"\x02\x21\x4c\x18", "LZ4"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"PK\x05\x06", "a ZIP archive"),
    (0, b"PK\x07\x08", "a ZIP archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"LZIP\x01", "lzip"),
    (0, b"\x89LZO\x00", "lzop"),
    (0, b"\x1f\x9d", "compress (.Z)"),
    (0, b"\xff\x06\x00\x00sNaPpY", "Snappy"),
    (0, b"PAR1\x15", "Parquet"),
    (0, b"ARROW1\x00\x00", "Arrow"),
    (0, b"%PDF-", "PDF"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x7fELF", "an ELF program"),
)
"""Offset, bytes at the offset, and the format; from the specifications and file(1)."""

_NO_TEXT = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f\x7f]")
"""Bytes that do not occur in text of any 8-bit encoding, from file(1)."""

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks; the little-endian one of UTF-32 begins like that of UTF-16."""


def unpack(raw: Any, name: str, *, guess_encoding: bool = False) -> io.BufferedReader:
    """The decompressed content of a binary stream, text as UTF-8; `peek` returns up to a mebibyte of it.

    `guess_encoding` also accepts JSON or a table in UTF-16 or UTF-32 without a byte order mark, recognised by the zeros
    in its first characters. Raises InputError for an unsupported format, and OSError or EOFError, here or when reading,
    for damaged content.
    """
    stream = io.BufferedReader(raw, MEBIBYTE)
    for layer in range(_LAYERS + 1):
        counted = _Counted(stream)
        pieces = _decompressed(counted)
        if pieces is None:
            break
        if layer == _LAYERS:
            raise InputError(f"compressed more than {_LAYERS} times", where=name, fix="decompress it first")
        stream = io.BufferedReader(Pieces(_in_proportion(pieces, counted, name), stream), MEBIBYTE)
    head = stream.peek(MEBIBYTE)
    for offset, magic, kind in _REFUSED:
        if head.startswith(magic, offset):
            fix = "name it .parquet" if kind == "Parquet" else "give its content as text, JSON lines or Parquet"
            raise InputError(f"the content is {kind}, which is not supported", where=name, fix=fix)
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return io.BufferedReader(Pieces(_to_utf8(stream, encoding), stream), MEBIBYTE)
    if guess_encoding and (encoding := json.detect_encoding(head)) not in ("utf-8", "utf-8-sig"):
        return io.BufferedReader(Pieces(_to_utf8(stream, encoding), stream), MEBIBYTE)
    return stream


def check_is_text(content: bytes, name: str) -> None:
    """Raise InputError for content that is not text: with a NUL, or with control bytes and not UTF-8.

    Text in another 8-bit encoding passes, since the tokenizer handles invalid UTF-8. A NUL also shows UTF-16 without
    a byte order mark, which would be valid UTF-8.
    """
    at = content.find(b"\0")
    if at < 0 and (control := _NO_TEXT.search(content)):
        try:
            content.decode()
        except UnicodeDecodeError:
            at = control.start()
    if at >= 0:
        what = f"not text: byte {content[at]:#04x} at {at}"
        raise InputError(what, where=name, fix="leave it out; UTF-16 needs its byte order mark")


class Pieces(io.RawIOBase):
    """A stream of bytes from a generator; closing it closes the stream that they were read from."""

    def __init__(self, pieces: Iterator[bytes], source: Any) -> None:
        self._pieces, self._source, self._ready = pieces, source, memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` completely unless the pieces end."""
        filled = 0
        while filled < len(buffer):
            if not self._ready:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._ready = memoryview(piece)
            count = min(len(buffer) - filled, len(self._ready))
            buffer[filled : filled + count], self._ready = self._ready[:count], self._ready[count:]
            filled += count
        return filled

    def close(self) -> None:
        """Close the source too."""
        self._source.close()
        super().close()


class _Counted:
    """A stream that counts the bytes read from it."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream, self.count = stream, 0
        self.peek = stream.peek

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.count += len(data)
        return data


def _in_proportion(pieces: Iterator[bytes], source: _Counted, name: str) -> Iterator[bytes]:
    """The pieces. Raises InputError where a small file becomes a large one, which text does not."""
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > _FREE and size > _MOST_EXPANSION * source.count:
            what = f"decompresses to more than {_MOST_EXPANSION} times its size"
            raise InputError(what, where=name, fix="check what it is, or decompress it first")
        yield piece


def _decompressed(stream: _Counted) -> Iterator[bytes] | None:
    """The decompressed content, or None if it does not begin like a supported compression."""
    head = stream.peek(MEBIBYTE)[:10]
    if head.startswith(b"\x1f\x8b"):
        members = gzip.GzipFile(fileobj=stream)  # type: ignore[call-overload]
        return iter(lambda: members.read(_BLOCK), b"")
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):  # or skippable
        return _zstandard(stream)
    if head.startswith(b"\xfd7zXZ\x00"):
        return _members(stream, lambda: _Bounded(lzma.LZMADecompressor(lzma.FORMAT_XZ)), (lzma.LZMAError,))
    if re.match(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", head):
        return _members(stream, lambda: _Bounded(bz2.BZ2Decompressor()), (OSError, ValueError))
    return None


def _zstandard(stream: _Counted) -> Iterator[bytes]:
    import zstandard

    new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    return _members(stream, new, (zstandard.ZstdError,))


class _Bounded:
    """One of the standard library's decompressors that never returns more than a mebibyte at once."""

    def __init__(self, decompressor: Any) -> None:
        self._inner = decompressor

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)

    @property
    def full(self) -> bool:
        """Whether it has more output without further input."""
        return not (self._inner.needs_input or self._inner.eof)

    def decompress(self, data: bytes) -> bytes:
        return bytes(self._inner.decompress(data, MEBIBYTE))


def _members(stream: _Counted, new: Callable[[], Any], errors: tuple[type[Exception], ...]) -> Iterator[bytes]:
    """Decompressed members, one after another. Raises OSError for damage and EOFError for a truncated file."""
    member, data = new(), stream.read(_BLOCK)
    while data:
        try:
            yield member.decompress(data)
            while getattr(member, "full", False):
                yield member.decompress(b"")
        except errors as e:
            raise OSError(str(e)) from e
        if not member.eof:
            data = stream.read(_BLOCK)
            continue
        data = member.unused_data or stream.read(_BLOCK)
        while data and not (data := data.lstrip(b"\0")):
            data = stream.read(_BLOCK)
        if data:
            member = new()
    if not member.eof:
        raise EOFError("compressed data ends in the middle")


def _to_utf8(stream: io.BufferedReader, encoding: str) -> Iterator[bytes]:
    """UTF-8 of text with a byte order mark; a lone surrogate becomes invalid UTF-8, which `--invalid` handles."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    try:
        while block := stream.read(_BLOCK):
            yield decoder.decode(block).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as e:
        raise OSError(f"not {encoding.upper()}, which its byte order mark announces: {e.reason}") from e
