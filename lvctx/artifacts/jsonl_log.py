"""JSON lines files: atomic rewrites, durable appends by several processes; an incomplete last line is ignored."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lvctx.artifacts.store import atomic_file, disk_error, is_disk_error
from lvctx.errors import InputError


def json_line(row: Mapping[str, Any]) -> str:
    """A row as it is stored, with its line end."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON lines file that lvctx wrote; a last line without its line end is an incomplete write and ignored.

    Raises InputError naming the line that is not a JSON object.
    """
    rows = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise InputError("not a JSON object", where=f"{path}:{number}", fix="remove or correct the line")
            rows.append(row)
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the rows of a JSON lines file atomically: the file has either all new rows or its former content."""
    with atomic_file(path) as partial, open(partial, "w", encoding="utf-8") as f:
        f.writelines(map(json_line, rows))


class JsonlLog:
    """A JSON lines file open for appending; every row is durable when `append` returns.

    Several processes may append to one file. An incomplete last line, left by a killed process, is removed.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """Open `path`, and read its rows; `fresh` empties it first. Raises InputError for a malformed row."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open(path, "w+b" if fresh else "a+b", buffering=0)  # noqa: SIM115 (closed in __exit__)
        with self._locked():
            self.stored = read_jsonl(path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Block other processes from appending, with the file positioned after the last complete line."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            size = self._file.seek(0, os.SEEK_END)
            self._file.seek(max(0, size - 1))
            if size and self._file.read(1) != b"\n":
                self._file.seek(0)
                self._file.truncate(self._file.read().rfind(b"\n") + 1)
            self._file.seek(0, os.SEEK_END)
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row."""
        try:
            with self._locked():
                # Without a buffer: after a failure there must be nothing left to write when the file is closed.
                line = memoryview(json_line(row).encode())
                while line:
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
        except OSError as e:
            if is_disk_error(e):
                raise disk_error(e, self.path) from e
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()
