"""Find the results that a path holds, and what kind they are of."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lvctx.artifacts import schemas
from lvctx.artifacts.jsonl_log import read_jsonl
from lvctx.artifacts.result_log import RESULTS, read_results
from lvctx.artifacts.sniff import mistaken
from lvctx.errors import InputError

METRICS = "metrics.jsonl"
"""File of a training's steps in its model directory."""
RunKind = Literal["needles", "benchmark", "responses", "answers", "training"]
Rows = dict[str, dict[str, Any]]
"""Rows by position (`FILE:LINE`)."""


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """The results of one run."""

    kind: RunKind
    """`responses` is a responses file in Video-MME's format, `answers` a file of `vqa`."""
    path: Path
    """The file that holds them."""
    name: str
    """Display name."""
    rows: Rows
    """Its rows; empty for `responses`."""


def find_runs(path: Path) -> list[RunFile]:
    """The runs of a results directory, a model directory, a file of either, or a directory of such directories.

    Raises InputError if there is none, or for a file whose rows are of no known kind.
    """
    if path.is_file():
        return [
            _read_file(path, name=path.name if path.name not in (RESULTS, METRICS) else path.absolute().parent.name)
        ]
    if not path.is_dir():
        raise InputError("no such file or directory", where=path)
    found = _of_directory(path, path.absolute().name)
    if not found:
        parts = sorted(part for part in path.iterdir() if part.is_dir() and not part.name.startswith("."))
        found = [run for part in parts for run in _of_directory(part, f"{path.absolute().name}/{part.name}")]
    if not found:
        raise mistaken(path, f"a directory with {RESULTS} or {METRICS}", fix="give what a run or a training wrote")
    return found


def _of_directory(path: Path, name: str) -> list[RunFile]:
    return [_read_file(path / file, name=name) for file in (RESULTS, METRICS) if (path / file).is_file()]


def _read_file(path: Path, *, name: str) -> RunFile:
    name = printable(name)
    if path.suffix == ".json":
        return RunFile(kind="responses", path=path, name=name, rows={})
    if path.suffix != ".jsonl":
        raise mistaken(path, "results (.jsonl, or responses in .json)")
    if path.name == RESULTS:
        rows = read_results(path)
    else:
        rows = {f"{path}:{number}": row for number, row in enumerate(read_jsonl(path), start=1)}
    if not rows:
        raise InputError("there are no results", where=path, fix="run its command first")
    return RunFile(kind=_kind_of(*next(iter(rows.items()))), path=path, name=name, rows=rows)


def _kind_of(where: str, row: Mapping[str, Any]) -> RunKind:
    kinds: dict[str, RunKind] = {schemas.NIAH: "needles", schemas.QUESTIONS: "benchmark", schemas.ANSWER: "answers"}
    kind = kinds.get(str(row.get("schema")))
    if kind is None and "step" in row and "loss" in row:
        return "training"
    if kind is None:
        fix = "give results of niah, vqa, videomme or bench, or metrics.jsonl"
        raise InputError("not a row of results", where=where, fix=fix)
    return kind


def check_fields(rows: Rows, types: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raise InputError for the first row in which a field is missing or is not of its type."""
    for where, row in rows.items():
        wrong = [name for name, kind in types.items() if name not in row or not isinstance(row[name], kind)]
        if wrong:
            raise InputError(f"missing or invalid {', '.join(wrong)}", where=where)


def printable(name: str | Path) -> str:
    """A file name as text: one that is not UTF-8 has replacement characters."""
    return os.fsencode(name).decode("utf-8", "replace")
