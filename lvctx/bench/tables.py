"""Question files as they are released: Parquet, JSON, JSONL or CSV, one file or a folder of them. No torch."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from lvctx.errors import InputError

SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Rows of a question file, or of all such files of a folder in the order of their names; `_file` names the file.

    Raises InputError for a path that is neither, an unknown suffix, or a file that is not what its suffix says.
    """
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise InputError(f"no {', '.join(SUFFIXES)} file in it", where=path)
    rows = [{**row, "_file": file.name} for file in files for row in _read(file)]
    if not rows:
        raise InputError("no question", where=path)
    return rows


def _read(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        return _read_parquet(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError("no such file", where=file) from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read ({e})", where=file) from e
    if file.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    try:
        lines = [line for line in text.splitlines() if line.strip()]
        rows = [json.loads(line) for line in lines] if file.suffix == ".jsonl" else json.loads(text)
    except ValueError as e:
        raise InputError(f"malformed JSON ({e})", where=file, fix="mend the file") from e
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("not a list of questions", where=file)
    return rows


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq
    from pyarrow.lib import ArrowException

    try:
        rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    except FileNotFoundError:
        raise InputError("no such file", where=file) from None
    except (OSError, ArrowException) as e:
        raise InputError(f"not a Parquet file ({str(e).splitlines()[0]})", where=file) from e
    return rows


def need(row: dict[str, Any], *names: str) -> None:
    """Raise InputError naming the file unless `row` has every one of `names`."""
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise InputError(
            f"a question without {', '.join(missing)}", where=row["_file"], fix="give the questions as released"
        )
