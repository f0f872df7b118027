"""Artifact paths on a pipe, as JSON lines or bare paths, so that tee, grep and xargs work between our commands."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lvctx.artifacts.bounded import parse_json
from lvctx.errors import InputError


def read_references(lines: Iterable[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (path, row) for every line of stdin: a JSON object with `path` (unknown keys pass through) or a path."""
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        row: dict[str, Any] = {}
        if text.startswith("{"):
            row = parse_json(text, where=f"stdin:{number}", fix="give one object or path per line")
        path = row.get("path") if row else text
        if not isinstance(path, str) or not _is_name(path):
            raise InputError("no `path` of a file in the line", where=f"stdin:{number}")
        yield Path(path), row


def _is_name(text: str) -> bool:
    """Whether a file can have this name: no NUL, and no half of a character."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
