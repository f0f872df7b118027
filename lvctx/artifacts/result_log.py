"""The result log of an evaluation: one JSON line per sample, appended when it is done, so a stopped run can resume.

Every row has `key` (which sample it is), `run` (a hash of everything that decides the run's results) and `made_of` (the
hashed values). A row with `error` is not a result: it stays in the file, and its key is run again.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from lvctx.artifacts.jsonl_log import JsonlLog, read_jsonl
from lvctx.artifacts.lock import only_writer
from lvctx.errors import InputError

RESULTS = "results.jsonl"
"""File name in a directory of results."""


def short_hash(value: Any) -> str:
    """Sixteen hex digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class ResultLog:
    """The rows of one run, open for appending; only their keys are held in memory."""

    def __init__(self, log: JsonlLog, made_of: Mapping[str, Any]) -> None:
        """See `open`."""
        self._log = log
        self._identity = {"run": short_hash(made_of), "made_of": dict(made_of)}
        self.keys: set[str] = set()
        """Those that have a result; errors are left out."""
        for row in _keyed(log.path, log.stored).values():
            if row.get("run") != self._identity["run"]:
                raise InputError(
                    f"holds results of another run (other {differing(row.get('made_of'), made_of)})",
                    where=log.path.parent,
                    fix="choose another -o, or --force to start over",
                )
            if "error" not in row:
                self.keys.add(row["key"])

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, made_of: Mapping[str, Any], *, resume: str = "auto", force: bool = False, shared: bool = False
    ) -> Iterator[Self]:
        """The log at `path` of the run that `made_of`, a dict of JSON values, identifies.

        `resume` is `auto`, `never` or `must`; `force` empties an existing file. The lock of its directory is held
        meanwhile; several processes of one run open the log `shared`, and one of them holds the lock.

        Raises InputError if another process is writing, the rows are of another run (naming what differs), a row is
        malformed, or `resume` forbids continuing or starting.
        """
        if resume == "must" and not path.is_file():
            raise InputError("nothing to resume", where=path.parent, fix="drop --resume must")
        if resume == "never" and path.is_file() and not force:
            fix = "drop --resume never, or --force to start over"
            raise InputError("holds results already", where=path.parent, fix=fix)
        with ExitStack() as stack:
            if not shared:
                stack.enter_context(only_writer(path.parent))
            yield cls(stack.enter_context(JsonlLog(path, fresh=force)), made_of)

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def append(self, key: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write the row of a key that has no result yet, and return it as it is stored."""
        assert key not in self.keys, key
        stored = {"key": key, **self._identity, **row}
        self._log.append(stored)
        if "error" not in stored:
            self.keys.add(key)
        return stored


def differing(old: Any, new: Mapping[str, Any]) -> str:
    """Which keys of two runs' `made_of` have other values, in one line."""
    old = old if isinstance(old, dict) else {}
    # JSON has no tuples, so stored values are compared with values in their stored form.
    stored = json.loads(json.dumps(new))
    return ", ".join(sorted(key for key in old.keys() | new.keys() if old.get(key) != stored.get(key)))


def _keyed(path: Path, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("key"), str):
            raise InputError("a row without a key", where=f"{path}:{number}", fix="remove the line")
    return {f"{path}:{number}": row for number, row in enumerate(rows, start=1)}


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of a directory's results.jsonl, or of such a file, by position (`FILE:LINE`): the last row of each key.

    Raises InputError if there is no such file, or a line is not a row with a key.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no {RESULTS}", where=path, fix="give a directory that a run wrote")
    last = {row["key"]: (place, row) for place, row in _keyed(file, read_jsonl(file)).items()}
    return dict(last.values())
