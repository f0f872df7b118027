"""Released question files: Parquet, Arrow, JSON, JSONL, CSV or TSV, one file or a folder of them. No torch.

A folder may be a downloaded hub repository, or a directory saved by the datasets library (Arrow files). An invalid row
raises InputError with its file and number.
"""

import re
from pathlib import Path
from typing import Any

from lvctx.data.records import read_records
from lvctx.errors import InputError
from lvctx.eval.benchmarks.answers import format_options
from lvctx.eval.benchmarks.fields import MOST_OPTIONS, cell_text, check_unicode, have_letters, parse_key, parse_list

QUESTION_SUFFIXES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv")
NO_QUESTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that the datasets library writes beside its Arrow files."""
AS_RELEASED = "give the questions as released"
QuestionRow = dict[str, Any]


def read_question_rows(path: Path) -> list[QuestionRow]:
    """Rows of a question file, or of all such files of a folder in the order of their names.

    `_file` in a row is its file and `_row` its number in it, from 1. If a folder has no such file, its subfolders are
    searched, except hidden ones. Raises InputError for other paths, or a file whose format differs from its suffix.
    """
    files = [path]
    if path.is_dir():
        below = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        matches = sorted(p for p in below if p.suffix.lower() in QUESTION_SUFFIXES and p.name not in NO_QUESTIONS)
        files = [p for p in matches if p.parent == path] or matches
    if not files:
        raise InputError(f"no {', '.join(QUESTION_SUFFIXES)} file in it", where=path)
    rows = []
    for file in files:
        for number, record in enumerate(read_records(file, guess_encoding=True), start=1):
            try:
                rows.append({**record.fields(), "_file": file.name, "_row": number})
                check_unicode(record.value)
            except ValueError as e:
                what = e.what if isinstance(e, InputError) else str(e)
                raise InputError(what, where=f"{file}, row {number}", fix=AS_RELEASED) from e
    if not rows:
        raise InputError("no question", where=path)
    return rows


def row_place(row: QuestionRow) -> str:
    """Location of a row for errors: its file and number."""
    return f"{row['_file']}, row {row['_row']}"


def has_value(row: QuestionRow, name: str) -> bool:
    """Whether a row has a value in a column: neither null, NaN, blank nor an empty list."""
    value = row.get(name)
    return bool(value) if isinstance(value, list | tuple | dict) else bool((cell_text(value) or "").strip())


def text_field(row: QuestionRow, *names: str) -> str:
    """The text of the first of `names` in a row. Raises InputError if it has none, or the value is not text."""
    for name in names:
        text = cell_text(row.get(name))
        if text is not None and text.strip():
            return text
        if has_value(row, name) or isinstance(row.get(name), bytes):
            raise InputError(f"{name} is not text", where=row_place(row), fix=AS_RELEASED)
    raise InputError(f"a question without {' or '.join(names)}", where=row_place(row), fix=AS_RELEASED)


def options_field(row: QuestionRow, name: str) -> list[str]:
    """The options in a column: a list, or one written as text (see `parse_list`). Raises InputError for others."""
    if not has_value(row, name):
        raise InputError(f"a question without {name}", where=row_place(row), fix=AS_RELEASED)
    try:
        options = parse_list(row[name])
    except ValueError as e:
        raise InputError(
            f"{name} cannot be read as a list ({e})", where=row_place(row), fix="write it as JSON"
        ) from None
    return check_options(row, options)


def check_options(row: QuestionRow, options: list[str]) -> list[str]:
    """`options` unchanged. Raises InputError for fewer than 2, more than 26, or a blank one."""
    if not 2 <= len(options) <= MOST_OPTIONS:
        raise InputError(f"{len(options)} options, not 2 to {MOST_OPTIONS}", where=row_place(row))
    for number, option in enumerate(options):
        if not option.strip():
            raise InputError(f"option {chr(65 + number)} is blank", where=row_place(row))
    return options


def letters_in(question: str, most: str = "ABCD") -> tuple[str, ...]:
    """The letters of the options in a question's own text, each on its line; `most` if there are none."""
    labels = re.findall(r"^\(?([A-Z])[.):]", question, re.MULTILINE)
    letters = [chr(65 + i) for i in range(len(labels))]
    return tuple(letters) if labels == letters and len(labels) > 1 else tuple(most)


def with_letters(options: list[str]) -> tuple[str, ...]:
    """Options unchanged if they begin with their letters, else prefixed with `A. ` and so on."""
    return tuple(options) if have_letters(options) else format_options(options)


def key_field(row: QuestionRow, name: str, count: int, *, indexed: bool = False) -> str:
    """The letter of the right one of `count` options; see `parse_key`. Raises InputError if it is none of them."""
    if not has_value(row, name):
        raise InputError(f"a question without {name}", where=row_place(row), fix="give questions with their answers")
    letter = parse_key(row[name], count, indexed=indexed)
    if letter is None:
        index_range = f", nor one of 0 to {count - 1}" if indexed else ""
        raise InputError(
            f"{name} {row[name]!r:.60} is none of A to {chr(64 + count)}{index_range}", where=row_place(row)
        )
    return letter
