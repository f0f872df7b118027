"""Where documents lie, and their bytes: decompressed by their first bytes, read from a place on, told by a sample."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lvctx.errors import InputError

MEBIBYTE = 1 << 20
_WHOLE = 4 * MEBIBYTE
BROKEN = (OSError, EOFError, zlib.error)
"""What reading a damaged or cut file raises."""


_LINES, _TEXTS = (".jsonl", ".ndjson", ".json"), (".txt", ".md", ".rst", ".text")
_KNOWN = (*_LINES, *_TEXTS, ".parquet")
_SQUEEZED = (".gz", ".zst")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file, stream or dataset that is read from its beginning to its end."""

    kind: str
    """`lines`, `text`, `parquet`, `stdin`, `saved` (by `datasets`) or `hub`."""
    name: str
    """Path, `-` or hub id."""
    size: int
    """Bytes on disk; 0 where unknown."""


def find_parts(inputs: Sequence[str]) -> list[Part]:
    """What the inputs consist of; folders are walked in sorted order.

    Raises InputError for a missing, empty or unknown input.
    """
    if inputs.count("-") > 1:
        raise InputError("stdin is named twice", where="-", fix="give - once")
    parts: list[Part] = []
    for name in inputs:
        path = Path(name)
        if name == "-":
            parts.append(Part(kind="stdin", name=name, size=0))
        elif path.is_dir():
            parts += _folder(path)
        elif path.exists():
            parts.append(Part(kind=_kind(path), name=name, size=path.stat().st_size))
        elif path.suffix.lower() in (*_KNOWN, *_SQUEEZED) or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InputError("no such file or folder", where=name)
        else:
            parts.append(Part(kind="hub", name=name, size=0))
    return parts


def _folder(path: Path) -> list[Part]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        size = sum(p.stat().st_size for p in path.rglob("*.arrow"))
        return [Part(kind="saved", name=str(path), size=size)]
    files = (p for p in path.rglob("*") if not any(q.startswith(".") for q in p.relative_to(path).parts))
    known = sorted(p for p in files if _extension(p) in _KNOWN and p.is_file())
    if not known:
        raise InputError(
            "no documents in the folder", where=path, fix=f"it reads {' '.join(_KNOWN)}, also .gz and .zst"
        )
    return [Part(kind=_kind(p), name=str(p), size=p.stat().st_size) for p in known]


def _extension(path: Path) -> str:
    stem = Path(path.stem) if path.suffix.lower() in _SQUEEZED else path
    return stem.suffix.lower()


def _kind(path: Path) -> str:
    extension = _extension(path)
    return "lines" if extension in _LINES else "parquet" if extension == ".parquet" else "text"


def read_whole(name: str) -> bytes:
    """All of a file, decompressed, without a byte order mark. Raises InputError."""
    try:
        with open_stream(name) as f:
            return f.read().removeprefix(b"\xef\xbb\xbf")
    except BROKEN as e:
        raise InputError(f"cannot read ({e})", where=name, fix="is the file whole?") from e


def open_stream(name: str) -> Any:
    """A file open for reading, decompressed. Raises InputError where there is none or no right to read it."""
    try:
        raw = open(name, "rb")  # noqa: SIM115 (closed with what wraps it)
    except OSError as e:
        raise InputError(f"cannot read ({e.strerror})", where=name) from e
    return decompress(raw)


def decompress(raw: Any) -> Any:
    """Gzip or Zstandard undone if the content begins like it, whatever its name says; else `raw` itself."""
    head = raw.peek(4)[:4]
    if head[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=raw)
    if head == b"\x28\xb5\x2f\xfd":
        return io.BufferedReader(_Zstandard(raw), MEBIBYTE)
    return raw


class _Zstandard(io.RawIOBase):
    """Zstandard frames, one after another. The package's own reader takes a cut file for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._new = raw, zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame, self._ready = self._new(), memoryview(b"")
        self._error: type[Exception] = zstandard.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            rest = self._frame.unused_data if self._frame.eof else b""
            data = rest or self._raw.read(1 << 17)
            if not data:
                if not self._frame.eof:
                    raise EOFError("compressed data ends in the middle")
                return 0
            if self._frame.eof:
                self._frame = self._new()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as e:
                raise OSError(str(e)) from e
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def skip(f: Any, count: int, *, seek: bool) -> None:
    """Pass over `count` bytes from the beginning; a pipe has to be read for it."""
    if seek and f.seekable():
        f.seek(count)
        return
    while count > 0:
        passed = len(f.read(min(count, MEBIBYTE)))
        if not passed:
            raise EOFError("it is shorter than when this run began")
        count -= passed


def sample(path: Path) -> bytes:
    """Bytes that tell a file or folder from another: hashes of all up to 4 MiB, else of three mebibytes of it."""
    if path.is_dir():
        return b"".join(_sample_one(p) for p in sorted(path.rglob("*")) if p.is_file())
    return _sample_one(path)


def _sample_one(path: Path) -> bytes:
    try:
        with open(path, "rb") as f:
            size = path.stat().st_size
            if size <= _WHOLE:
                return hashlib.sha256(f.read()).digest()
            digest = hashlib.sha256()
            for at in (0, size // 2, size - MEBIBYTE):
                f.seek(at)
                digest.update(f.read(MEBIBYTE))
            return digest.digest()
    except OSError as e:
        raise InputError(f"cannot read ({e.strerror})", where=path) from e
