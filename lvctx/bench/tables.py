"""Question files as they are released: Parquet, JSON, JSONL or CSV, one file or a folder of them. No torch.

A folder may be a downloaded hub repository, or what the datasets library saves (Arrow files).
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

from lvctx.errors import InputError

SUFFIXES = (".parquet", ".arrow", ".json", ".jsonl", ".csv")
NO_QUESTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What the datasets library writes beside its Arrow files."""


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Rows of a question file, or of all such files of a folder in the order of their names; `_file` names the file.

    A folder without such a file is looked through, hidden folders left out. Raises InputError for a path that is
    neither, an unknown suffix, or a file that is not what its suffix says.
    """
    files = [path]
    if path.is_dir():
        below = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        found = sorted(p for p in below if p.suffix in SUFFIXES and p.name not in NO_QUESTIONS)
        files = [p for p in found if p.parent == path] or found
    if not files:
        raise InputError(f"no {', '.join(SUFFIXES)} file in it", where=path)
    rows = [{**row, "_file": file.name} for file in files for row in _read(file)]
    if not rows:
        raise InputError("no question", where=path)
    return rows


def _read(file: Path) -> list[dict[str, Any]]:
    if file.suffix in (".parquet", ".arrow"):
        return _read_columns(file)
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


def _read_columns(file: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq
    from pyarrow import ipc
    from pyarrow.lib import ArrowException

    try:
        table = pq.read_table(file) if file.suffix == ".parquet" else ipc.open_stream(file).read_all()
        rows: list[dict[str, Any]] = table.to_pylist()
    except FileNotFoundError:
        raise InputError("no such file", where=file) from None
    except (OSError, ArrowException) as e:
        raise InputError(f"not what its name says ({str(e).splitlines()[0]})", where=file) from e
    return rows


def need(row: dict[str, Any], *names: str) -> None:
    """Raise InputError naming the file unless `row` has every one of `names`."""
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise InputError(
            f"a question without {', '.join(missing)}", where=row["_file"], fix="give the questions as released"
        )
