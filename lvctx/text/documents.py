"""Documents from wherever they lie, as chunks of about a mebibyte that another process can tokenize.

JSON lines and plain text (both also .gz and .zst), Parquet, folders of these, stdin (`-`), a dataset saved by
`datasets` and one on the Hugging Face hub (`name` or `name@revision`), several at once and in the order given. A chunk
carries raw bytes where it can: parsing and decoding are the tokenizing process's work, so that one reader feeds many.

Chunk borders depend on the input alone, and every chunk knows the place it begins and ends at, so a run that was killed
starts reading at the chunk it was in. Nothing is held beyond one chunk (for Parquet: one row group's pages).
"""

import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lvctx.errors import InputError

CHUNK_BYTES = 1 << 20
_WHOLE = 4 << 20
_LINES, _TEXTS = (".jsonl", ".ndjson", ".json"), (".txt", ".md", ".rst", ".text")
_KNOWN = (*_LINES, *_TEXTS, ".parquet")
_SQUEEZED = (".gz", ".zst")


class Place(NamedTuple):
    """Where a chunk begins or ends; stored in resume states as a list."""

    part: int
    """Number of the input file or dataset, 0-based."""
    at: int
    """Bytes into its decompressed content, or rows; 0 for text files."""
    line: int
    """Lines or rows before this place, for messages."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some documents in their order: either `lines` (JSON lines, unparsed) or `texts` with `sources`."""

    start: Place
    """Place of the first document."""
    end: Place
    """Place after the last document."""
    where: tuple[str, ...]
    """Name of each document, or one name for all of them: then line `start.line + 1` and so on."""
    lines: bytes | None = None
    """Whole lines of JSON."""
    texts: tuple[bytes | str | None, ...] = ()
    """Documents, decoded or not; None where the record has no text."""
    sources: tuple[str | None, ...] = ()
    """Source each document names, if it does."""

    def name(self, number: int) -> str:
        """How to call the `number`-th line or document in a message."""
        return self.where[number] if len(self.where) > 1 else f"{self.where[0]}:{self.start.line + 1 + number}"


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Which fields of a record hold what; a dot goes into a nested object."""

    text: str = "text"
    """The document."""
    source: str | None = None
    """The source's name; None looks at `source`, then at SlimPajama's `meta.redpajama_set_name`."""

    def source_paths(self) -> tuple[str, ...]:
        """Fields to look at for the source, first hit wins."""
        return (self.source,) if self.source else ("source", "meta.redpajama_set_name")

    def source_of(self, record: dict[str, Any]) -> str | None:
        """The source a record names, or None."""
        for path in self.source_paths():
            found = dig(record, path)
            if isinstance(found, str | int):
                return str(found)
        return None


def dig(record: Any, path: str) -> Any:
    """`record["a"]["b"]` for path `a.b`, or `record["a.b"]` if it has that; None where anything is missing."""
    if isinstance(record, dict) and path in record:
        return record[path]
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file, stream or dataset that is read from its beginning to its end."""

    kind: str
    """`lines`, `text`, `parquet`, `stdin`, `saved` (by `datasets`) or `hub`."""
    name: str
    """Path, `-` or hub id."""
    size: int
    """Bytes on disk; 0 where unknown."""


def find_parts(inputs: Sequence[str]) -> list[Part]:
    """What the inputs consist of; folders are walked in sorted order.

    Raises InputError for a missing, empty or unknown input.
    """
    if inputs.count("-") > 1:
        raise InputError("stdin is named twice", where="-", fix="give - once")
    parts: list[Part] = []
    for name in inputs:
        path = Path(name)
        if name == "-":
            parts.append(Part(kind="stdin", name=name, size=0))
        elif path.is_dir():
            parts += _folder(path)
        elif path.exists():
            parts.append(Part(kind=_kind(path), name=name, size=path.stat().st_size))
        elif path.suffix.lower() in (*_KNOWN, *_SQUEEZED) or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InputError("no such file or folder", where=name)
        else:
            parts.append(Part(kind="hub", name=name, size=0))
    return parts


def _folder(path: Path) -> list[Part]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        size = sum(p.stat().st_size for p in path.rglob("*.arrow"))
        return [Part(kind="saved", name=str(path), size=size)]
    files = (p for p in path.rglob("*") if not any(q.startswith(".") for q in p.relative_to(path).parts))
    known = sorted(p for p in files if _extension(p) in _KNOWN and p.is_file())
    if not known:
        raise InputError(
            "no documents in the folder", where=path, fix=f"it reads {' '.join(_KNOWN)}, also .gz and .zst"
        )
    return [Part(kind=_kind(p), name=str(p), size=p.stat().st_size) for p in known]


def _extension(path: Path) -> str:
    stem = Path(path.stem) if path.suffix.lower() in _SQUEEZED else path
    return stem.suffix.lower()


def _kind(path: Path) -> str:
    extension = _extension(path)
    return "lines" if extension in _LINES else "parquet" if extension == ".parquet" else "text"


class Corpus:
    """The documents of some inputs, readable from any place that a chunk of theirs began at."""

    def __init__(self, inputs: Sequence[str], *, fields: Fields, split: str = "train") -> None:
        """Find the parts. `split` is for datasets. Raises InputError for what does not exist."""
        self.fields, self.split = fields, split
        self.parts = find_parts(inputs)
        self._stdin: BinaryIO | None = None
        self._base = [0]
        for part in self.parts:
            self._base.append(self._base[-1] + part.size)

    @property
    def size(self) -> int:
        """Bytes on disk of all parts."""
        return self._base[-1]

    def bytes_before(self, place: Place) -> int:
        """Bytes on disk before a place, roughly: what a progress bar needs."""
        return self._base[place.part] + min(
            place.at, self.parts[place.part].size if place.part < len(self.parts) else 0
        )

    def fingerprint(self) -> str:
        """Hex SHA-256 that tells this input from another without reading all of it.

        It covers every part's name (of the file alone), size and content: whole up to 4 MiB, else its first, middle and
        last mebibyte; for stdin the first mebibyte; for a hub dataset its commit.
        """
        whole = hashlib.sha256()
        for part in self.parts:
            if part.kind == "stdin":
                content = self._head()
            elif part.kind == "hub":
                content = hub_commit(part.name).encode()
            else:
                content = _sample(Path(part.name))
            name, digest = Path(part.name).name, hashlib.sha256(content).hexdigest()
            whole.update(f"{part.kind}\0{name}\0{part.size}\0{digest}\n".encode())
        return whole.hexdigest()

    def _head(self) -> bytes:
        """The first mebibyte of stdin, unconsumed: `peek` waits for it because the buffer lies over another one."""
        return bytes(self._open_stdin().peek(CHUNK_BYTES))

    def _open_stdin(self) -> Any:
        if self._stdin is None:
            self._stdin = io.BufferedReader(_unsqueeze(sys.stdin.buffer, "stdin"), CHUNK_BYTES)
        return self._stdin

    def chunks(self, start: Place) -> Iterator[Chunk]:
        """Chunks from a place on. Raises InputError for what cannot be read."""
        texts: list[tuple[int, bytes]] = []  # small text files travel together
        for number in range(start.part, len(self.parts)):
            part = self.parts[number]
            begin = start if number == start.part else Place(number, 0, 0)
            if part.kind == "text":
                texts.append((number, _read(part.name)))
                if sum(len(t) for _, t in texts) >= CHUNK_BYTES:
                    yield self._together(texts)
                    texts = []
                continue
            if texts:
                yield self._together(texts)
                texts = []
            if part.kind == "lines":
                with _open(part.name) as f:
                    yield from self._lines(f, begin, part.name)
            elif part.kind == "stdin":
                yield from self._read_stdin(begin)
            elif part.kind == "parquet":
                yield from self._parquet(begin, part.name)
            else:
                yield from self._dataset(begin, part)
        if texts:
            yield self._together(texts)

    def _together(self, texts: list[tuple[int, bytes]]) -> Chunk:
        first, last = texts[0][0], texts[-1][0]
        names = tuple(self.parts[number].name for number, _ in texts)
        return Chunk(
            start=Place(first, 0, 0),
            end=Place(last + 1, 0, 0),
            where=names if len(names) > 1 else (names[0], names[0]),
            texts=tuple(text for _, text in texts),
            sources=(None,) * len(texts),
        )

    def _read_stdin(self, begin: Place) -> Iterator[Chunk]:
        stream = self._open_stdin()
        if begin.at == 0 and not self._head().lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
            text = stream.read()
            if text:
                end = Place(begin.part + 1, 0, 0)
                yield Chunk(start=begin, end=end, where=("stdin", "stdin"), texts=(text,), sources=(None,))
            return
        yield from self._lines(stream, begin, "stdin")

    def _lines(self, f: Any, begin: Place, name: str) -> Iterator[Chunk]:
        at, line = begin.at, begin.line
        try:
            _skip(f, at, seek=name != "stdin")
            while blob := f.read(CHUNK_BYTES):
                blob += f.readline()
                count = blob.count(b"\n")
                start, at, line = Place(begin.part, at, line), at + len(blob), line + count
                yield Chunk(start=start, end=Place(begin.part, at, line), where=(name,), lines=blob)
        except (OSError, EOFError, zlib.error) as e:
            raise InputError(f"cannot read past line {line} ({e})", where=name, fix="is the file whole?") from e

    def _parquet(self, begin: Place, name: str) -> Iterator[Chunk]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(name) as file:
                columns = file.schema_arrow.names
                text = self.fields.text if self.fields.text in columns else self.fields.text.split(".")[0]
                if text not in columns:
                    raise InputError(
                        f"no column {text!r}", where=name, fix=f"--text-field: it has {', '.join(columns)}"
                    )
                heads = {path if path in columns else path.split(".")[0] for path in self.fields.source_paths()}
                wanted = [c for c in columns if c == text or c in heads]
                counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                first = row = 0  # row group that holds the first wanted row, and that group's first row
                while first < len(counts) and row + counts[first] <= begin.at:
                    row += counts[first]
                    first += 1
                groups = list(range(first, len(counts)))
                gather = _Gather(begin, name)
                for batch in file.iter_batches(batch_size=64, row_groups=groups, columns=wanted):
                    # Text as bytes: invalid UTF-8 is the decoder's to judge, and pyarrow would stop at it.
                    plain = pa.types.is_string(batch[text].type) or pa.types.is_large_string(batch[text].type)
                    binary = pa.large_binary() if pa.types.is_large_string(batch[text].type) else pa.binary()
                    texts = (batch[text].cast(binary) if plain else batch[text]).to_pylist()
                    others = batch.select([c for c in wanted if c != text]).to_pylist()
                    for value, other in zip(texts, others, strict=True):
                        row += 1
                        if row > begin.at:
                            value = value if plain else dig({text: value}, self.fields.text)
                            yield from gather.add(value, self.fields.source_of(other))
                yield from gather.rest()
        except (OSError, pa.ArrowInvalid) as e:
            raise InputError(f"not readable as Parquet ({e})", where=name) from e

    def _dataset(self, begin: Place, part: Part) -> Iterator[Chunk]:
        rows = open_dataset(part, self.split)
        gather = _Gather(begin, part.name)
        for record in rows.skip(begin.at) if begin.at else rows:
            if dig(record, self.fields.text) is None and self.fields.text.split(".")[0] not in record:
                raise InputError(
                    f"no field {self.fields.text!r}", where=part.name, fix=f"--text-field: it has {', '.join(record)}"
                )
            yield from gather.add(dig(record, self.fields.text), self.fields.source_of(record))
        yield from gather.rest()


class _Gather:
    """Rows until they make a chunk."""

    def __init__(self, begin: Place, name: str) -> None:
        self.begin, self.name = begin, name
        self.texts: list[Any] = []
        self.sources: list[str | None] = []
        self.size = 0

    def add(self, text: Any, source: str | None) -> Iterator[Chunk]:
        if text is not None and not isinstance(text, str | bytes):
            row = self.begin.line + len(self.texts) + 1
            raise InputError(f"the text is {type(text).__name__}, not a string", where=f"{self.name}:{row}")
        self.texts.append(text)
        self.sources.append(source)
        self.size += len(text or "")
        if self.size >= CHUNK_BYTES or len(self.texts) == 4096:
            yield from self.rest()

    def rest(self) -> Iterator[Chunk]:
        if not self.texts:
            return
        end = Place(self.begin.part, self.begin.at + len(self.texts), self.begin.line + len(self.texts))
        yield Chunk(start=self.begin, end=end, where=(self.name,), texts=tuple(self.texts), sources=tuple(self.sources))
        self.begin, self.texts, self.sources, self.size = end, [], [], 0


def open_dataset(part: Part, split: str) -> Any:
    """A saved dataset (memory-mapped) or one on the hub (streamed). Raises InputError where there is none."""
    import datasets

    try:
        if part.kind == "saved":
            stored = datasets.load_from_disk(part.name)
            if not isinstance(stored, datasets.DatasetDict):
                return stored
            if split not in stored:
                raise InputError(f"no split {split!r}", where=part.name, fix=f"--split: it has {', '.join(stored)}")
            return stored[split]
        name, _, revision = part.name.partition("@")
        return datasets.load_dataset(name, split=split, streaming=True, revision=revision or None)
    except InputError:
        raise
    except Exception as e:  # whatever the hub client and the dataset's own reader raise
        raise _no_dataset(part.name, e) from e


def hub_commit(name: str) -> str:
    """The commit that a hub dataset stands at. Raises InputError when the hub does not know it or does not answer."""
    from huggingface_hub import HfApi

    repository, _, revision = name.partition("@")
    try:
        return str(HfApi().dataset_info(repository, revision=revision or None).sha)
    except Exception as e:
        raise _no_dataset(name, e) from e


def _no_dataset(name: str, e: Exception) -> InputError:
    reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
    return InputError(f"neither a file or folder here nor a dataset the hub gives ({reason})", where=name)


def _sample(path: Path) -> bytes:
    if path.is_dir():
        return b"".join(_sample_file(p) for p in sorted(path.rglob("*")) if p.is_file())
    return _sample_file(path)


def _sample_file(path: Path) -> bytes:
    try:
        with open(path, "rb") as f:
            size = path.stat().st_size
            if size <= _WHOLE:
                return hashlib.sha256(f.read()).digest()
            digest = hashlib.sha256()
            for at in (0, size // 2, size - CHUNK_BYTES):
                f.seek(at)
                digest.update(f.read(CHUNK_BYTES))
            return digest.digest()
    except OSError as e:
        raise InputError(f"cannot read ({e.strerror})", where=path) from e


def _read(name: str) -> bytes:
    try:
        with _open(name) as f:
            return f.read().removeprefix(b"\xef\xbb\xbf")
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"cannot read ({e})", where=name, fix="is the file whole?") from e


def _open(name: str) -> Any:
    try:
        raw = open(name, "rb")  # noqa: SIM115 (closed with what wraps it)
    except OSError as e:
        raise InputError(f"cannot read ({e.strerror})", where=name) from e
    return _unsqueeze(raw, name)


def _unsqueeze(raw: Any, name: str) -> Any:
    """Decompress by the content's first bytes, whatever the name says."""
    head = raw.peek(4)[:4]
    if head[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=raw)
    if head == b"\x28\xb5\x2f\xfd":
        return io.BufferedReader(_Zstandard(raw), CHUNK_BYTES)
    return raw


class _Zstandard(io.RawIOBase):
    """Zstandard frames, one after another. The package's own reader takes a cut file for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._new = raw, zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame, self._ready = self._new(), memoryview(b"")
        self._error: type[Exception] = zstandard.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            rest = self._frame.unused_data if self._frame.eof else b""
            data = rest or self._raw.read(1 << 17)
            if not data:
                if not self._frame.eof:
                    raise EOFError("compressed data ends in the middle")
                return 0
            if self._frame.eof:
                self._frame = self._new()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as e:
                raise OSError(str(e)) from e
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _skip(f: Any, count: int, *, seek: bool) -> None:
    if seek and f.seekable():
        f.seek(count)
        return
    while count > 0:
        passed = len(f.read(min(count, CHUNK_BYTES)))
        if not passed:
            raise EOFError("it is shorter than when this run began")
        count -= passed
