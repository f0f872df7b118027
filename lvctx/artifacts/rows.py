"""Append-only JSONL with a key per row: what stands is skipped, a torn last line is dropped and redone.

Several processes may append to one file, each its own keys.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lvctx.artifacts.store import atomic_file, disk_error, is_disk_error
from lvctx.errors import InputError


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a last line without its newline is a torn write and is left out.

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
                raise InputError("not a JSON object", where=f"{path}:{number}", fix="remove or mend the line")
            rows.append(row)
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Make these the rows of a JSONL file: it has all of them or, until then, what it had before."""
    with atomic_file(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class RowLog:
    """A results file open for appending: every row durable when `append` returns."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """Open `path`, drop a torn last line, and learn the keys that stand; `fresh` starts from nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self._file = open(path, "w+b" if fresh else "a+b")  # noqa: SIM115 (closed in __exit__)
        with self._locked():
            # An error is no result: it stays in the file, and its key may be written again.
            for number, row in enumerate(read_rows(path), start=1):
                if not isinstance(row.get("key"), str):
                    raise InputError("a row without a key", where=f"{path}:{number}", fix="remove the line")
                if "error" not in row:
                    self.rows[row["key"]] = row

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process appends meanwhile, and the file ends with a whole line: a killed one's last may be torn."""
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

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; it must carry a `key` that does not stand yet."""
        assert row["key"] not in self.rows, row["key"]
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
        try:
            with self._locked():
                self._file.write(line.encode())
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as e:
            if is_disk_error(e):
                raise disk_error(e, self.path) from e
            raise
        self.rows[row["key"]] = row

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()
