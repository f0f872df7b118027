"""Files, streams and datasets of documents: found in inputs, read from an offset, identified by a sample of bytes."""

import hashlib
import io
import os
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvctx.artifacts.bounded import check_is_file
from lvctx.data.decompress import MEBIBYTE, unpack
from lvctx.errors import InputError

_WHOLE = 4 * MEBIBYTE
BROKEN = (OSError, EOFError, zlib.error)
"""Exceptions from reading a damaged or truncated file."""


_LINES, _TEXTS = (".jsonl", ".ndjson", ".json"), (".txt", ".md", ".rst", ".text")
DOCUMENT_SUFFIXES = (*_LINES, *_TEXTS, ".parquet")
_READ = (".gz", ".zst", ".xz", ".bz2")
SQUEEZED = (*_READ, ".lz4", ".br", ".z", ".lz", ".lzma", ".lzo", ".sz", ".7z", ".zip", ".rar")
"""Suffixes of compressions; an unsupported one is an error when the file is opened, it is not skipped."""


@dataclass(frozen=True, kw_only=True)
class InputPart:
    """One file, stream or dataset that is read from beginning to end."""

    kind: str
    """`lines`, `text`, `parquet`, `stdin`, `saved` (by `datasets`) or `hub`."""
    name: str
    """Path, `-` or hub id."""
    size: int
    """Bytes on disk; 0 if unknown."""


def find_parts(inputs: Sequence[str]) -> list[InputPart]:
    """The parts of the inputs; folders are walked in sorted order.

    Raises InputError for a missing, empty or unknown input.
    """
    if inputs.count("-") > 1:
        raise InputError("stdin is given twice", where="-", fix="give - once")
    parts: list[InputPart] = []
    for name in inputs:
        path = Path(name)
        info = None if name == "-" else _stat(path)
        if name == "-":
            parts.append(InputPart(kind="stdin", name=name, size=0))
        elif info and stat.S_ISDIR(info.st_mode):
            parts += _folder(path)
        elif info and stat.S_ISREG(info.st_mode):
            parts.append(InputPart(kind=_kind(path), name=name, size=info.st_size))
        elif info:
            raise InputError("a pipe or device, which can be read only once", where=name, fix="pipe it to -")
        elif (
            path.suffix.lower() in (*DOCUMENT_SUFFIXES, *SQUEEZED)
            or name.startswith((".", "/", "~"))
            or name.count("/") > 1
        ):
            raise InputError("no such file or folder", where=name)
        else:
            parts.append(InputPart(kind="hub", name=name, size=0))
    return parts


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as e:  # a name that is too long, a folder without permission
        raise InputError(f"cannot read ({getattr(e, 'strerror', None) or e})", where=path) from e


def _folder(path: Path) -> list[InputPart]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        size = sum(p.stat().st_size for p in path.rglob("*.arrow"))
        return [InputPart(kind="saved", name=str(path), size=size)]
    files = (p for p in path.rglob("*") if not any(q.startswith(".") for q in p.relative_to(path).parts))
    documents = sorted(p for p in files if base_suffix(p) in DOCUMENT_SUFFIXES and p.is_file())
    if not documents:
        raise InputError(
            "no documents in the folder",
            where=path,
            fix=f"it reads {' '.join(DOCUMENT_SUFFIXES)}, also {' '.join(_READ)}",
        )
    return [InputPart(kind=_kind(p), name=str(p), size=p.stat().st_size) for p in documents]


def base_suffix(path: Path) -> str:
    """A file's suffix in lower case, without the suffix of a compression."""
    stem = Path(path.stem) if path.suffix.lower() in SQUEEZED else path
    return stem.suffix.lower()


def _kind(path: Path) -> str:
    extension = base_suffix(path)
    return "lines" if extension in _LINES else "parquet" if extension == ".parquet" else "text"


def read_bytes(name: str, *, guess_encoding: bool = False) -> bytes:
    """All of a file, decompressed, as UTF-8, without a byte order mark. Raises InputError if it cannot be read."""
    try:
        with open_stream(name, guess_encoding=guess_encoding) as f:
            return f.read().removeprefix(b"\xef\xbb\xbf")
    except BROKEN as e:
        raise InputError(f"cannot read ({e})", where=name, fix="check that the file is complete") from e


def read_text(path: Path) -> str:
    """Text of a file in any encoding of Unicode. Raises InputError if it cannot be read or is not such text."""
    try:
        return read_bytes(str(path), guess_encoding=True).decode()
    except UnicodeDecodeError as e:
        raise InputError(f"byte {e.start:,} is not UTF-8", where=path, fix="save the file as UTF-8") from e


def open_stream(name: str, *, guess_encoding: bool = False) -> io.BufferedReader:
    """A file open for reading, decompressed and as UTF-8 (see `unpack`). Raises InputError for unsupported formats."""
    if Path(name).suffix.lower() == ".br":
        raise InputError("Brotli is not supported", where=name, fix="decompress it first")
    check_is_file(Path(name))
    try:
        raw = open(name, "rb", buffering=0)  # noqa: SIM115 (closed with what wraps it)
    except OSError as e:
        raise InputError(f"cannot read ({e.strerror})", where=name) from e
    try:
        return unpack(raw, name, guess_encoding=guess_encoding)
    except BaseException:
        raw.close()
        raise


def skip(f: Any, count: int, *, seek: bool) -> None:
    """Skip `count` bytes from the beginning; a pipe has to be read for that."""
    if seek and f.seekable():
        f.seek(count)
        return
    while count > 0:
        passed = len(f.read(min(count, MEBIBYTE)))
        if not passed:
            raise EOFError("it is shorter than when this run started")
        count -= passed


def sample(path: Path) -> bytes:
    """Bytes that identify a file or folder: hashes of all of it up to 4 MiB, else of three mebibytes of it."""
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
