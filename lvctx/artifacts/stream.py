"""Artifact paths on a pipe, as JSON lines or bare paths, so that tee, grep and xargs work between our commands."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lvctx.errors import InputError


def read_references(lines: Iterable[str], *, where: str = "stdin") -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (path, row) for every line: a JSON object with `path` (unknown keys passed through) or a bare path."""
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        if not text.startswith("{"):
            yield Path(text), {}
            continue
        try:
            row = json.loads(text)
        except ValueError:
            raise InputError("malformed JSON", where=f"{where}:{number}", fix="one object or path a line") from None
        if "path" not in row:
            raise InputError("no `path` in the object", where=f"{where}:{number}")
        yield Path(row["path"]), row
