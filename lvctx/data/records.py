"""Records of files and datasets, one at a time, each with its location: the reader of all commands that take data.

JSON (a list, lines, or values one after another), CSV and TSV with a header, Parquet, Arrow, a folder that the datasets
library saved, and an id on the Hugging Face hub. Text may be compressed (see `unpack`). Memory holds one value and a
mebibyte of its file, or some rows of a table.
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lvctx.artifacts.bounded import parse_json
from lvctx.data.decompress import MEBIBYTE
from lvctx.data.hub import ROWS, dataset_rows
from lvctx.data.json_values import as_lines, lines_of
from lvctx.data.row_groups import open_parquet
from lvctx.data.streams import BROKEN, DOCUMENT_SUFFIXES, SQUEEZED, base_suffix, open_stream
from lvctx.errors import InputError, library_errors

RECORD_SUFFIXES = (*DOCUMENT_SUFFIXES, *SQUEEZED, ".csv", ".tsv", ".arrow")
DELIMITERS = ",;\t|"
_BOM = "\ufeff"


class Record(NamedTuple):
    """A value and its location."""

    where: str
    """`FILE:LINE` of JSON lines, `FILE[i]` (from 0) of a list or a dataset, `FILE, row n` (from 1) of a CSV file."""
    value: Any
    """The JSON value or row; an InputError that names it if it is malformed and others may follow."""

    def fields(self) -> dict[str, Any]:
        """The JSON object or row. Raises InputError for other or malformed values."""
        if isinstance(self.value, InputError):
            raise self.value
        if not isinstance(self.value, dict):
            raise InputError("not a JSON object", where=self.where)
        return self.value


def is_dataset(path: Path) -> bool:
    """Whether this is a folder or, judged by its name, a hub id, rather than an existing or missing file."""
    is_id = not path.is_absolute() and len(path.parts) == 2 and path.suffix.lower() not in RECORD_SUFFIXES
    return path.is_dir() or (is_id and not path.exists())


def read_records(path: Path, *, guess_encoding: bool = False, split: str = "train") -> Iterator[Record]:
    """Records of a file or of a dataset's split; blank lines are skipped.

    `guess_encoding` also accepts UTF-16 and UTF-32 without a byte order mark. Raises InputError for unreadable input.
    """
    suffix = base_suffix(path)
    if is_dataset(path):
        rows = dataset_rows(str(path), split, saved=path.is_dir())
    elif not path.exists():
        raise InputError("no such file", where=path)
    elif suffix == ".parquet":
        rows = parquet_rows(str(path))
    elif suffix == ".arrow":
        rows = arrow_rows(str(path))
    else:
        try:
            with open_stream(str(path), guess_encoding=guess_encoding) as stream:
                yield from (csv_records if suffix in (".csv", ".tsv") else json_records)(stream, str(path))
        except BROKEN as e:
            raise InputError(f"cannot read ({e})", where=path, fix="check that the file is complete") from e
        return
    yield from (Record(f"{path}[{number}]", row) for number, row in enumerate(rows))


def json_records(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    """JSON values of a stream of UTF-8, as a list, in lines or one after another."""
    values = as_lines(stream, name)
    for number, line in enumerate(lines_of(values or stream, name)):
        # Only "\n" ends a line: strings may contain U+2028 and U+0085.
        where = f"{name}:{number + 1}" if values is None else f"{name}[{number}]"
        try:
            text = line.decode().removeprefix(_BOM if number == 0 else "").strip()
            value = parse_json(text, where=where, fix="correct or remove it") if text else None
        except UnicodeDecodeError as e:
            text, value = "?", InputError(f"malformed JSON ({e})", where=where, fix="correct or remove it")
        except InputError as e:
            text, value = "?", e
        if text:
            yield Record(where, value)


def csv_records(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    """Rows of a table in UTF-8 with a header; the delimiter is the one that gives the header the most columns."""
    head = stream.peek(MEBIBYTE).decode(errors="replace").removeprefix(_BOM)
    start = len(head) - len(head.lstrip("\r\n"))
    declared = re.compile(r"sep=([,;\t|])[\r\n]+").match(head, start)  # Excel's own first line
    start = declared.end() if declared else start
    number = 1
    try:
        headers = {d: next(csv.reader(io.StringIO(head[start:], newline=""), delimiter=d), []) for d in DELIMITERS}
        delimiter = declared[1] if declared else max(DELIMITERS, key=lambda d: len(headers[d]))
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        text.read(start)
        # Strict, since a quote that is never closed would include all later rows in its field.
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        reader.fieldnames = [column.strip() for column in reader.fieldnames or ()]
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise InputError("more fields than the header", where=f"{name}, row {number}")
            yield Record(f"{name}, row {number}", row)
            number += 1
    except (csv.Error, UnicodeDecodeError) as e:
        fix = "correct its quotes and delimiters, and save it as UTF-8"
        raise InputError(f"malformed CSV ({e})", where=f"{name}, row {number}", fix=fix) from e


def parquet_rows(name: str) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file. Raises InputError for a file that is not Parquet."""
    with open_parquet(name) as file:
        for batch in file.iter_batches(ROWS):
            yield from batch.to_pylist()


def arrow_rows(name: str) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow file, or of an Arrow stream as the datasets library saves it. Raises InputError for others."""
    from pyarrow import ipc

    with library_errors("not readable as Arrow", where=name), open(name, "rb") as file:
        if file.peek(6).startswith(b"ARROW1"):
            reader = ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(ipc.open_stream(file))
        for batch in batches:
            yield from batch.to_pylist()
