"""Output of commands: rows to stdout, as JSON or readable lines; progress and messages to stderr."""

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvctx.config import OnProgress

SHOWN_ERRORS = 8
"""The largest number of different errors that a run lists at its end."""


@dataclass
class _Settings:
    """Output settings of the running command, set by `configure`."""

    json: bool = False
    quiet: bool = False


_settings = _Settings()


def configure(*, json: bool, quiet: bool, verbose: bool) -> None:
    """Apply --json, --quiet and --verbose: the library's warnings always go to stderr, its log only with --verbose."""
    _settings.json, _settings.quiet = json, quiet
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(stream=sys.stderr, format="lvctx: %(message)s", level=level)


def is_rank_zero() -> bool:
    """Whether this process writes to the terminal: it runs alone, or is rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def is_quiet() -> bool:
    """Whether --quiet was given."""
    return _settings.quiet


def wants_json() -> bool:
    """Whether stdout is JSON: it is not a terminal, or --json was given."""
    return _settings.json or not stdout_is_terminal()


def stdout_is_terminal() -> bool:
    """Whether stdout is a terminal and --json was not given."""
    return sys.stdout.isatty()


def emit(row: Mapping[str, Any], line: str | None = None) -> None:
    """Write one row to stdout and flush it, so that the next command in a pipe can process it at once.

    It is a JSON line for programs. On a terminal it is `line`, or a short summary of the row.
    """
    if not is_rank_zero():
        return
    if wants_json():
        text = json.dumps(row, ensure_ascii=False)
        if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
            text = json.dumps(row)  # a file name that is not UTF-8 has to be escaped
    else:
        text = summarize(row) if line is None else line
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def artifact_row(schema: str, out: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a finished directory; `sha256` is that of its manifest, which has the hash of every file."""
    from lvctx.artifacts.manifest import MANIFEST
    from lvctx.artifacts.store import sha256_file

    return {"schema": schema, "path": str(out), "sha256": sha256_file(out / MANIFEST), **facts}


def summarize(row: Mapping[str, Any]) -> str:
    """A row as readable text: a dry run with one fact per line, other rows in one line that begins with the path."""
    if row.get("dry_run"):
        facts = flatten({key: value for key, value in row.items() if key != "dry_run"})
        width = max(len(key) for key, _ in facts)
        return "\n".join(f"{key:<{width}}  {value}" for key, value in facts)
    visible = {k: v for k, v in row.items() if k not in ("schema", "sha256", "path") and v is not None}
    parts = [
        f"{k.replace('_', ' ')} {_number(v)}" for k, v in visible.items() if not isinstance(v, dict | list | tuple)
    ]
    line = ", ".join(parts)
    return f"{row['path']}: {line}" if line and "path" in row else str(row.get("path", line))


def flatten(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (`outer.inner`, text) pairs."""
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def say(line: str) -> None:
    """Write a line to stderr."""
    if is_rank_zero():
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:  # nobody can read it, and Python would fail again on exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def say_errors(errors: Iterable[str], what: str) -> None:
    """Write the different errors of failed rows to stderr, at most `SHOWN_ERRORS`; a row is of a `what`."""
    different = list(dict.fromkeys(errors))
    for error in different[:SHOWN_ERRORS]:
        say(f"lvctx: {error}")
    if len(different) > SHOWN_ERRORS:
        more = len(different) - SHOWN_ERRORS
        say(f"lvctx: and {more:,} more different errors; the row of each failed {what} has its own")


@contextmanager
def progress(label: str, note: str = "starting") -> Iterator[OnProgress]:
    """A progress bar on stderr, which shows `note` at once; only on a terminal, on rank 0 and without --quiet."""
    if _settings.quiet or not sys.stderr.isatty() or not is_rank_zero():
        yield lambda done, total, note: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, note=note)
        yield lambda done, total, note: bar.update(task, completed=done, total=total or None, note=note)
