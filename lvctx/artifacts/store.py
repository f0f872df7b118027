"""The atomic store: a file is either absent or complete. No half-written artifact ever has its final name.

Writers get a temporary name beside the target (same file system, so the rename is atomic); the file is fsynced, renamed
and its directory fsynced. A killed writer leaves `.NAME.partial`, which the next run overwrites.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from lvctx.artifacts.bounded import check_is_file, parse_object, read_utf8
from lvctx.errors import DiskError, InputError, LvctxError

MOST_HEADER = 1 << 24
"""Bound of a safetensors header in bytes: 100,000 tensors take 12 million."""
LFS_POINTER = b"version "
"""First bytes of the pointer file that replaces a large file in a Git repository cloned without Git LFS."""


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path to write to; on a clean exit it becomes `target`, on any exception it is removed.

    Of several processes that write one file, one writes at a time. Raises InputError when the disk is full or the
    directory cannot be written.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            try:
                yield partial
                with open(partial, "rb") as f:
                    os.fsync(f.fileno())
                os.replace(partial, target)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        fsync_directory(target.parent)
    except BaseException as e:
        if is_disk_error(e):
            raise disk_error(e, target) from e
        raise


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold the lock of a file, created if needed, that its last owner renames or removes."""
    while True:
        with open(partial, "ab") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            if not is_open_at(f.fileno(), partial):
                continue
            yield
            return


def is_open_at(fd: int, path: Path) -> bool:
    """Whether `path` still names the open file `fd`."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """An empty directory `.NAME.saving` beside `target`, gone afterwards: for writers with their own temporary files.

    safetensors writes to a temporary name of its own first. The next run removes what a killed writer left.
    """
    folder = target.with_name(f".{target.name}.saving")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_written(written: Path, target: Path) -> None:
    """Move a file that a library wrote to its place, with the permissions of a newly created file.

    safetensors makes its files readable for their owner only.
    """
    written.chmod(target.parent.stat().st_mode & 0o666)
    os.replace(written, target)


def link_file(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy where a link is not possible."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        with atomic_file(target) as partial:
            shutil.copyfile(source, partial)


def fsync_directory(directory: Path) -> None:
    """Make a rename inside `directory` durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_disk_error(e: BaseException) -> bool:
    """Whether `e` is the file system refusing a write (full, quota, read-only, no permission).

    Rust libraries (safetensors, tokenizers) report such an error as an exception with the errno only in the text.
    """
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
    if isinstance(e, OSError):
        return e.errno in codes
    return not isinstance(e, LvctxError) and any(f"(os error {c})" in str(e) for c in codes)


def disk_error(e: BaseException, target: Path) -> DiskError:
    """The error when `target` could not be written."""
    reason = os.strerror(e.errno) if isinstance(e, OSError) and e.errno else str(e)
    return DiskError(
        f"cannot write ({reason})", where=target, fix="free some space or choose another -o, then run again"
    )


def write_json(target: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, keys in the given order."""
    with atomic_file(target) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError for a missing file or anything else than a JSON object."""
    return parse_object(read_utf8(path), where=path)


def save_tensors(target: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write torch tensors or numpy arrays (all of one kind) as one safetensors file with `metadata`.

    Byte-identical for identical input as long as `metadata` has one key: safetensors keeps it in a hash map.
    """
    with atomic_file(target) as partial, scratch(target) as folder:
        if all(hasattr(t, "__array_interface__") for t in tensors.values()):
            from safetensors.numpy import save_file
        else:
            from safetensors.torch import save_file
        save_file(dict(tensors), str(folder / target.name), metadata=dict(metadata))
        move_written(folder / target.name, partial)


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: name -> {dtype, shape, data_offsets}, plus `__metadata__`. No torch.

    Raises InputError if the file is not a whole safetensors file: as the library, if tensors do not fill it one after
    another, each with the bytes of its shape; and if the header is larger than any of a real model, has a name twice,
    or metadata of ours that is no JSON object.
    """
    broken = InputError("not a whole safetensors file", where=path, fix="write it again")
    check_is_file(path)
    try:
        with open(path, "rb") as f:
            raw = f.read(8)
            if raw == LFS_POINTER:
                raise InputError("a Git LFS pointer, not the file itself", where=path, fix="run git lfs pull there")
            if len(raw) < 8:
                raise broken
            (length,) = struct.unpack("<Q", raw)
            if length > path.stat().st_size - 8:
                raise broken
            if length > MOST_HEADER:
                raise InputError(f"a header of {length:,} bytes; {MOST_HEADER:,} are read", where=path)
            header = json.loads(f.read(length), object_pairs_hook=_without_repeats)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as e:
        raise broken from e
    if not isinstance(header, dict):
        raise broken
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    if not all(map(_is_entry, tensors)):
        raise broken
    end = 0
    for begin, after in sorted(entry["data_offsets"] for entry in tensors):
        if begin != end:
            raise broken
        end = after
    if path.stat().st_size != 8 + length + end:
        raise broken
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise broken
    if metadata.get("lvctx"):
        parse_object(metadata["lvctx"], where=path)
    return header


def data_offset(path: Path) -> int:
    """Where the data of a whole safetensors file begins, from which the offsets in its header count."""
    with open(path, "rb") as f:
        return 8 + int.from_bytes(f.read(8), "little")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _is_entry(entry: Any) -> bool:
    """Whether a header's entry describes a tensor that has the bytes of its shape."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    if not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
        return False
    bits = re.search(r"\d+", entry["dtype"].replace("BOOL", "U8"))
    return bits is not None and 8 * (offsets[1] - offsets[0]) == prod(shape) * int(bits[0])


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes; a file that did not change in between is read once."""
    state = path.stat()
    return _sha256(path.absolute(), state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: Path, *state: int) -> str:
    return read_sha256(path)


def read_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes as they are on disk now."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """Hex SHA-256 that identifies an input: a file's bytes, a finished artifact's manifest, or a directory's files.

    The card of a model, README.md, does not count, since not every download of a model has it.
    """
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise InputError("no such file or directory", where=path)
    manifest = path / "MANIFEST.json"
    if manifest.is_file():
        return sha256_file(manifest)
    hasher = hashlib.sha256()
    card = path / "README.md" if (path / "config.json").is_file() else None
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".") and p != card):
        hasher.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return hasher.hexdigest()
