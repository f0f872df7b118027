"""Documents from files, folders, stdin or datasets, as chunks of about a mebibyte that another process can tokenize.

JSON lines, JSON arrays and plain text (all also compressed, see `unpack`), Parquet, folders of these, stdin (`-`), a
dataset saved by `datasets` and one on the Hugging Face hub (`name` or `name@revision`), several at once and in the
given order. A chunk has raw bytes or, of a Parquet file, only the numbers of its rows: parsing and decoding are done in
the tokenizing processes, so one reader can supply many. Only the rows of a dataset are decoded by the reader. Chunks of
Parquet have four mebibytes: a process that reads part of a row group decodes all before it too (`row_groups`).

Chunk borders depend on the input alone, and every chunk has its start and end, so a killed run resumes at the chunk it
was in. At most one chunk is in memory.
"""

import hashlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lvctx.data.decompress import MEBIBYTE, check_is_text, unpack
from lvctx.data.document_fields import UNNAMED, Fields, dig
from lvctx.data.hub import dataset_rows, hub_commit
from lvctx.data.json_values import as_lines, lines_of
from lvctx.data.row_groups import Span, spans_of
from lvctx.data.streams import BROKEN, InputPart, find_parts, open_stream, read_bytes, sample, skip
from lvctx.errors import InputError

_MOST_ROWS = 4096
"""Most rows of a table in a chunk."""


class Place(NamedTuple):
    """The start or end of a chunk; stored in resume states as a list."""

    part: int
    """Index of the input file or dataset, 0-based."""
    at: int
    """Offset in bytes of decompressed content, or in rows; 0 for text files."""
    line: int
    """Number of lines or rows before this place, for messages."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive documents: `lines` (JSON lines, unparsed), `texts` with `sources`, or a `span` of a Parquet file."""

    start: Place
    """Place of the first document."""
    end: Place
    """Place after the last document."""
    where: str
    """Name of the part; its lines or rows are numbered from `start.line + 1`."""
    files: tuple[str, ...] = ()
    """Name of each document if every one is a separate file."""
    lines: bytes | None = None
    """Whole lines of JSON."""
    elements: bool = False
    """Whether the lines are elements of an array or other values, which are numbered from 0."""
    texts: tuple[bytes | str | None, ...] = ()
    """Documents, decoded or not; None if the record has no text."""
    sources: tuple[str, ...] = ()
    """Source of each document."""
    span: Span | None = None
    """Rows of the Parquet file `where`, which the tokenizing process reads."""

    def name(self, number: int) -> str:
        """Name of the `number`-th line or document in messages."""
        if self.files:
            return self.files[number]
        at = self.start.line + number
        return f"{self.where}[{at}]" if self.elements else f"{self.where}:{at + 1}"


class Corpus:
    """The documents of some inputs, readable from the start of any chunk."""

    def __init__(self, inputs: Sequence[str], *, fields: Fields, split: str = "train") -> None:
        """Find the parts. `split` is for datasets. Raises InputError for an input that does not exist."""
        self.fields, self.split = fields, split
        self.parts = find_parts(inputs)
        self._stdin: io.BufferedReader | None = None
        self._base = [0]
        for part in self.parts:
            self._base.append(self._base[-1] + part.size)

    @property
    def size(self) -> int:
        """Bytes on disk of all parts."""
        return self._base[-1]

    def bytes_before(self, place: Place) -> int:
        """Bytes on disk before a place, roughly: for a progress bar."""
        return self._base[place.part] + min(
            place.at, self.parts[place.part].size if place.part < len(self.parts) else 0
        )

    def fingerprint(self) -> str:
        """Hex SHA-256 that identifies this input without reading all of it.

        It covers every part's name (of the file alone), size and content: all up to 4 MiB, else its first, middle and
        last mebibyte; for stdin the first mebibyte; for a hub dataset its commit.
        """
        hasher = hashlib.sha256()
        for part in self.parts:
            if part.kind == "stdin":
                content = self._head()
            elif part.kind == "hub":
                content = hub_commit(part.name).encode()
            else:
                content = sample(Path(part.name))
            name, digest = Path(part.name).name, hashlib.sha256(content).hexdigest()
            hasher.update(os.fsencode(f"{part.kind}\0{name}\0{part.size}\0{digest}\n"))
        return hasher.hexdigest()

    def _head(self) -> bytes:
        """The first mebibyte of stdin, unconsumed: `peek` waits for it, because the buffer wraps another one."""
        try:
            return self._open_stdin().peek(MEBIBYTE)
        except BROKEN as e:
            raise InputError(f"cannot read ({e})", where="stdin") from e

    def _open_stdin(self) -> io.BufferedReader:
        if self._stdin is None:
            self._stdin = unpack(sys.stdin.buffer, "stdin")
        return self._stdin

    def chunks(self, start: Place) -> Iterator[Chunk]:
        """Chunks from a place on. Raises InputError for input that cannot be read."""
        texts: list[tuple[int, bytes]] = []  # small text files share a chunk
        for number in range(start.part, len(self.parts)):
            part = self.parts[number]
            begin = start if number == start.part else Place(number, 0, 0)
            if part.kind == "text":
                content = read_bytes(part.name)
                check_is_text(content, part.name)
                texts.append((number, content))
                if sum(len(t) for _, t in texts) >= MEBIBYTE:
                    yield self._together(texts)
                    texts = []
                continue
            if texts:
                yield self._together(texts)
                texts = []
            if part.kind == "lines":
                yield from self._lines(begin, part.name)
            elif part.kind == "stdin":
                yield from self._read_stdin(begin)
            elif part.kind == "parquet":
                yield from self._row_groups(begin, part.name)
            else:
                yield from self._table(begin, part)
        if texts:
            yield self._together(texts)

    def _together(self, texts: list[tuple[int, bytes]]) -> Chunk:
        first, last = texts[0][0], texts[-1][0]
        names = tuple(self.parts[number].name for number, _ in texts)
        return Chunk(
            start=Place(first, 0, 0),
            end=Place(last + 1, 0, 0),
            where=names[0],
            files=names,
            texts=tuple(text for _, text in texts),
            sources=(UNNAMED,) * len(texts),
        )

    def _read_stdin(self, begin: Place) -> Iterator[Chunk]:
        stream = self._open_stdin()
        if begin.at == 0 and not self._head().lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
            try:
                text = stream.read()
            except BROKEN as e:
                raise InputError(f"cannot read ({e})", where="stdin", fix="check that it is complete") from e
            check_is_text(text, "stdin")
            if text:
                end = Place(begin.part + 1, 0, 0)
                yield Chunk(start=begin, end=end, where="stdin", files=("stdin",), texts=(text,), sources=(UNNAMED,))
            return
        yield from self._lines(begin, None)

    def _lines(self, begin: Place, path: str | None) -> Iterator[Chunk]:
        """Chunks of a file of JSON, or of stdin."""
        at, line = begin.at, begin.line
        name = path or "stdin"
        try:
            with open_stream(path) if path else nullcontext(self._open_stdin()) as stream:
                values = as_lines(stream, name)
                f = values or stream
                skip(f, at, seek=path is not None)
                while blob := f.read(MEBIBYTE):
                    blob += next(lines_of(f, name), b"")
                    start, at, line = Place(begin.part, at, line), at + len(blob), line + blob.count(b"\n")
                    end = Place(begin.part, at, line)
                    yield Chunk(start=start, end=end, where=name, lines=blob, elements=values is not None)
        except BROKEN as e:
            raise InputError(f"cannot read past line {line} ({e})", where=name, fix="check the file") from e

    def _row_groups(self, begin: Place, name: str) -> Iterator[Chunk]:
        """Chunks of a Parquet file."""
        for span in spans_of(name, self.fields, start=begin.at, most_bytes=4 * MEBIBYTE, most_rows=_MOST_ROWS):
            count = span.high - span.low
            end = Place(begin.part, begin.at + count, begin.line + count)
            yield Chunk(start=begin, end=end, where=name, span=span)
            begin = end

    def _table(self, begin: Place, part: InputPart) -> Iterator[Chunk]:
        """Chunks of a dataset."""
        gather = _Gather(begin, part.name)
        for row in dataset_rows(part.name, self.split, saved=part.kind == "saved", start=begin.at):
            self.fields.columns(list(row), where=part.name)
            yield from gather.add(dig(row, self.fields.text), self.fields.source_of(row))
        yield from gather.rest()


class _Gather:
    """Collects rows into chunks."""

    def __init__(self, begin: Place, name: str) -> None:
        self.begin, self.name = begin, name
        self.texts: list[Any] = []
        self.sources: list[str] = []
        self.size = 0

    def add(self, text: Any, source: str) -> Iterator[Chunk]:
        self.texts.append(text)
        self.sources.append(source)
        self.size += len(text) if isinstance(text, str | bytes) else 0
        if self.size >= MEBIBYTE or len(self.texts) == _MOST_ROWS:
            yield from self.rest()

    def rest(self) -> Iterator[Chunk]:
        if not self.texts:
            return
        end = Place(self.begin.part, self.begin.at + len(self.texts), self.begin.line + len(self.texts))
        yield Chunk(start=self.begin, end=end, where=self.name, texts=tuple(self.texts), sources=tuple(self.sources))
        self.begin, self.texts, self.sources, self.size = end, [], [], 0
