"""Rows of Parquet files by row group: the packing process reads only the metadata, its tokenizing processes the rows.

Parquet cannot be read from the middle of a row group, which may be the whole file. A process that is given several
spans of one decodes it once, from the beginning to the last of them, and makes Python values of its own rows alone.
Each such process may hold a row group in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from lvctx.data.decompress import MEBIBYTE
from lvctx.data.document_fields import Fields
from lvctx.data.hub import ROWS
from lvctx.errors import InputError, library_errors


class Span(NamedTuple):
    """Consecutive rows of a row group."""

    group: int
    """Number of the row group, 0-based."""
    low: int
    """First row, counted in the group."""
    high: int
    """Row after the last."""


@contextmanager
def open_parquet(name: str, **options: Any) -> Iterator[Any]:
    """A Parquet file of pyarrow. Raises InputError for another or a damaged file, then and while it is read."""
    import pyarrow.parquet as pq

    # Opened here, since pyarrow does not accept a name that is not UTF-8.
    with (
        library_errors("not readable as Parquet", where=name),
        open(name, "rb") as opened,
        pq.ParquetFile(opened, **options) as file,
    ):
        yield file


def spans_of(name: str, fields: Fields, *, start: int, most_bytes: int, most_rows: int) -> Iterator[Span]:
    """The rows of a Parquet file from row `start` on in spans of about `most_bytes`, by a row group's mean row.

    Raises InputError for a file that is not Parquet or does not have the fields.
    """
    with open_parquet(name) as file:
        columns = fields.columns(file.schema_arrow.names, where=name)
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            stored = (group.column(i) for i in range(group.num_columns))
            size = sum(c.total_uncompressed_size for c in stored if c.path_in_schema.split(".")[0] in columns)
            step = max(1, min(most_rows, group.num_rows * most_bytes // max(1, size)))
            for low in range(0, group.num_rows, step):
                high = min(low + step, group.num_rows)
                if start < high:
                    yield Span(number, max(low, start), high)
            start = max(0, start - group.num_rows)


class RowGroupReader:
    """Reads spans of Parquet files; those of one row group in their order are read in one pass."""

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self._open: tuple[str, int] | None = None
        self._batches: Iterator[Any] = iter(())
        self._rest: Any = ()
        self._row = 0

    def read(self, name: str, span: Span) -> list[dict[str, Any]]:
        """The rows of a span; text is bytes, since it may be invalid UTF-8. Raises InputError if they are damaged."""
        if self._open != (name, span.group) or span.low < self._row:
            self._batches, self._rest, self._row = self._read_group(name, span.group), (), 0
            self._open = (name, span.group)
        rows: list[dict[str, Any]] = []
        while self._row < span.high:
            if not len(self._rest):
                batch = next(self._batches, None)
                if batch is None:
                    raise InputError(f"row group {span.group} has fewer rows than its metadata states", where=name)
                self._rest = batch
            wanted = self._row >= span.low
            count = min(len(self._rest), (span.high if wanted else span.low) - self._row)
            with library_errors("not readable as Parquet", where=name):
                rows += self._rest.slice(0, count).to_pylist() if wanted else ()
            self._rest, self._row = self._rest.slice(count), self._row + count
        return rows

    def _read_group(self, name: str, group: int) -> Iterator[Any]:
        import pyarrow as pa

        texts = {self._fields.text, self._fields.text.split(".")[0]}
        # With `buffer_size` less of a row group is in memory at a time.
        with open_parquet(name, buffer_size=MEBIBYTE) as file:
            columns = self._fields.columns(file.schema_arrow.names, where=name)
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=columns, use_threads=False):
                for at, column in enumerate(batch.schema):
                    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
                    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
                    if column.name in texts and text:
                        batch = batch.set_column(at, column.name, batch.column(at).cast(pa.large_binary()))
                yield batch
