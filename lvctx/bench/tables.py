"""Question files as they are released: Parquet, Arrow, JSON, JSONL, CSV or TSV, one file or a folder of them. No torch.

A folder may be a downloaded hub repository, or what the datasets library saves (Arrow files). A row that cannot be used
as it is raises InputError with its file and number.
"""

import csv
import io
import re
from pathlib import Path
from typing import Any

from lvctx.bench.choice import lettered
from lvctx.bench.textfile import json_values, read_text
from lvctx.bench.values import MOST_OPTIONS, key_letter, labelled, listed, plain
from lvctx.errors import InputError

SUFFIXES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv")
NO_QUESTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What the datasets library writes beside its Arrow files."""
Row = dict[str, Any]


def read_questions(path: Path) -> list[Row]:
    """Rows of a question file, or of all such files of a folder in the order of their names.

    `_file` in a row names its file and `_row` counts within it, from 1. A folder without such a file is searched below,
    hidden folders left out. Raises InputError for a path that is neither, or a file that is not what its suffix says.
    """
    files = [path]
    if path.is_dir():
        below = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        found = sorted(p for p in below if p.suffix.lower() in SUFFIXES and p.name not in NO_QUESTIONS)
        files = [p for p in found if p.parent == path] or found
    if not files:
        raise InputError(f"no {', '.join(SUFFIXES)} file in it", where=path)
    rows = [{**row, "_file": file.name, "_row": i} for file in files for i, row in enumerate(_read(file), start=1)]
    if not rows:
        raise InputError("no question", where=path)
    return rows


def _read(file: Path) -> list[Row]:
    suffix = file.suffix.lower()
    if suffix in (".parquet", ".arrow"):
        return _read_columns(file, suffix)
    text = read_text(file)
    if suffix in (".csv", ".tsv"):
        return _read_csv(text, file)
    try:
        rows = json_values(text)
    except ValueError as e:
        raise InputError(f"malformed JSON ({e})", where=file, fix="mend the file") from e
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError("not a list of questions", where=f"{file}, row {number}")
    return rows


DELIMITERS = ",;\t|"


def _read_csv(text: str, file: Path) -> list[Row]:
    """Rows of a table with a header; its delimiter is the one that cuts the header into most columns."""
    text = text.lstrip("\r\n")
    if named := re.match(r"sep=([,;\t|])[\r\n]+", text):  # Excel's own first line
        text = text[named.end() :]
    rows = []
    try:
        headers = {d: next(csv.reader(io.StringIO(text, newline=""), delimiter=d), []) for d in DELIMITERS}
        delimiter = named[1] if named else max(DELIMITERS, key=lambda d: len(headers[d]))
        # Strict: else a quote that is never closed takes all rows after it into its field without a word.
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise InputError("more fields than the header", where=f"{file}, row {number}")
            rows.append(row)
    except csv.Error as e:
        place = f"{file}, row {len(rows) + 1}"
        raise InputError(f"malformed CSV ({e})", where=place, fix="mend its quotes and delimiters") from e
    return rows


def _read_columns(file: Path, suffix: str) -> list[Row]:
    import pyarrow.parquet as pq
    from pyarrow import ipc
    from pyarrow.lib import ArrowException

    try:
        if suffix == ".parquet":
            table = pq.read_table(file)
        else:
            data = file.read_bytes()
            # The datasets library saves streams, others save files.
            table = (ipc.open_file if data.startswith(b"ARROW1") else ipc.open_stream)(data).read_all()
        rows: list[Row] = table.to_pylist()
    except FileNotFoundError:
        raise InputError("no such file", where=file) from None
    except (OSError, ArrowException, ValueError, OverflowError) as e:  # the last two: text and dates of broken columns
        raise InputError(f"not what its name says ({str(e)[:200]})", where=file) from e
    return rows


def where(row: Row) -> str:
    """How an error names a row: its file and its number there."""
    return f"{row['_file']}, row {row['_row']}"


def has(row: Row, name: str) -> bool:
    """Whether a row has something in a column: neither null, NaN, blank nor an empty list."""
    value = row.get(name)
    return bool(value) if isinstance(value, list | tuple | dict) else bool((plain(value) or "").strip())


def text_of(row: Row, *names: str) -> str:
    """The text of the first of `names` that a row has. Raises InputError where it has none, or it is no text."""
    for name in names:
        text = plain(row.get(name))
        if text is not None and text.strip():
            return text
        if has(row, name) or isinstance(row.get(name), bytes):
            raise InputError(f"{name} is no text", where=where(row), fix="give the questions as released")
    raise InputError(f"a question without {' or '.join(names)}", where=where(row), fix="give the questions as released")


def options_of(row: Row, name: str) -> list[str]:
    """The options in a column: a list, or one written as text (see `listed`). Raises InputError for anything else."""
    if not has(row, name):
        raise InputError(f"a question without {name}", where=where(row), fix="give the questions as released")
    try:
        options = listed(row[name])
    except ValueError as e:
        raise InputError(f"{name} cannot be read as a list ({e})", where=where(row), fix="write it as JSON") from None
    return check_options(row, options)


def check_options(row: Row, options: list[str]) -> list[str]:
    """`options` as they are. Raises InputError for fewer than 2, more than 26, or a blank one."""
    if not 2 <= len(options) <= MOST_OPTIONS:
        raise InputError(f"{len(options)} options, not 2 to {MOST_OPTIONS}", where=where(row))
    for number, option in enumerate(options):
        if not option.strip():
            raise InputError(f"option {chr(65 + number)} is blank", where=where(row))
    return options


def with_letters(options: list[str]) -> tuple[str, ...]:
    """Options as they are where they carry their letters, else with `A. ` and so on before them."""
    return tuple(options) if labelled(options) else lettered(options)


def letter_of(row: Row, name: str, count: int, *, indexed: bool = False) -> str:
    """The letter of the right one of `count` options; see `key_letter`. Raises InputError where it is none of them."""
    if not has(row, name):
        raise InputError(f"a question without {name}", where=where(row), fix="give questions with their answers")
    letter = key_letter(row[name], count, indexed=indexed)
    if letter is None:
        counted = f", nor one of 0 to {count - 1}" if indexed else ""
        raise InputError(f"{name} {row[name]!r:.60} is none of A to {chr(64 + count)}{counted}", where=where(row))
    return letter
