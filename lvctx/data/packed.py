"""The packed artifact: rows of token ids of one length in safetensors shards, with the starts of documents.

Shapes: R rows in a shard, S = seq_len. Each shard holds `input_ids` int32 (R, S); `doc_offsets` int64 (R + 1,) and
`doc_starts` int32, ragged: row i's documents begin at `doc_starts[doc_offsets[i]:doc_offsets[i + 1]]`, each at its
separator. A row whose first value is not 0 begins inside a document of the previous row.
Reading needs no torch: rows are views of a memory map.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lvctx.artifacts import schemas
from lvctx.artifacts.manifest import check_sizes, read_manifest
from lvctx.artifacts.packed_manifest import check_packed_manifest
from lvctx.artifacts.sniff import check_kind
from lvctx.artifacts.store import data_offset, read_safetensors_header, save_tensors
from lvctx.errors import InputError


def shard_name(number: int) -> str:
    """File name of the shard with this 0-based number."""
    return f"shard-{number:05d}.safetensors"


def write_token_shard(
    path: Path, rows: np.ndarray, offsets: np.ndarray, starts: np.ndarray, metadata: Mapping[str, str]
) -> None:
    """Write one shard atomically: rows int32 (R, S), offsets int64 (R + 1,), starts int32."""
    save_tensors(path, {"input_ids": rows, "doc_offsets": offsets, "doc_starts": starts}, metadata)


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file's integer tensors as read-only memory maps. Raises InputError if it is incomplete."""
    header = read_safetensors_header(path)
    base = data_offset(path)
    dtypes = {"I16": np.int16, "I32": np.int32, "I64": np.int64}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            if entry["dtype"] not in dtypes:
                raise InputError(f"{name} is {entry['dtype']}, not integers", where=path, fix="pack it again")
            dtype, shape = dtypes[entry["dtype"]], tuple(entry["shape"])
            empty = 0 in shape  # mapping zero bytes is an error
            offset = base + entry["data_offsets"][0]
            tensors[name] = np.zeros(shape, dtype) if empty else np.memmap(path, dtype, "r", offset, shape)
    return tensors


def check_shards(directory: Path, shards: int, vocabulary: int) -> None:
    """Raise InputError for a shard without tokens, or with an id that a model of this vocabulary has no embedding of.

    On a GPU such an id ends the process without saying which it was.
    """
    for path in (directory / shard_name(number) for number in range(shards)):
        ids = map_tensors(path).get("input_ids")
        if ids is None:
            raise InputError("no input_ids", where=path, fix="pack it again")
        wrong = [n for n in (int(ids.min()), int(ids.max())) if not 0 <= n < vocabulary] if ids.size else []
        if wrong:
            fix = "pack with the model's tokenizer"
            raise InputError(f"token id {wrong[0]}; the model has {vocabulary:,} ids", where=path, fix=fix)


class MappedShards:
    """The shards of a finished packed directory, of text or chat, memory-mapped when they are first used."""

    def __init__(self, directory: Path, kind: Literal["packed", "chat"], schema: str, what: str, command: str) -> None:
        """Check manifest and file sizes; maps nothing yet. Raises InputError for missing or changed files."""
        self.directory = Path(directory)
        check_kind(self.directory, kind, what, fix=f"run lvctx {command}")
        self.manifest: dict[str, Any] = read_manifest(self.directory)
        if self.manifest.get("schema") != schema:
            raise InputError(f"not {what} ({self.manifest.get('schema')})", where=directory, fix=f"run {command}")
        check_packed_manifest(self.manifest, self.directory)
        check_sizes(self.directory)
        self._ends = list(itertools.accumulate(self.manifest["shard_rows"]))
        self._shards: dict[int, dict[str, np.ndarray]] = {}

    def find(self, row: int) -> tuple[int, dict[str, np.ndarray], int]:
        """Number and tensors of the shard that holds a row, and the row's index in it."""
        if not 0 <= row < self.manifest["rows"]:
            raise IndexError(row)
        number = int(np.searchsorted(self._ends, row, side="right"))
        if number not in self._shards:
            self._shards[number] = map_tensors(self.directory / shard_name(number))
        return number, self._shards[number], row - (self._ends[number - 1] if number else 0)


class PackedRows(MappedShards):
    """Rows of a finished packed directory, memory-mapped. `len()` is the number of rows."""

    def __init__(self, directory: Path, *, seq_len: int | None = None) -> None:
        """A smaller `seq_len` than the rows' own splits each row into pieces of that length, which are then the rows.

        The rest of a row is not used. A larger one is refused: rows are not joined.
        """
        super().__init__(directory, "packed", schemas.PACKED, "packed text", "pack-text")
        packed: int = self.manifest["seq_len"]
        self.seq_len = seq_len or packed
        if self.seq_len > packed:
            raise InputError(
                f"rows have {packed} tokens instead of {seq_len}", where=directory, fix=f"pack-text --seq-len {seq_len}"
            )
        self._pieces = packed // self.seq_len

    def __len__(self) -> int:
        return int(self.manifest["rows"]) * self._pieces

    def _piece(self, row: int) -> tuple[dict[str, np.ndarray], int, int]:
        """Shard, packed row in the shard, and start within that row."""
        packed_row, piece = divmod(row, self._pieces)
        _, shard, i = self.find(packed_row)
        return shard, i, piece * self.seq_len

    def row(self, row: int) -> np.ndarray:
        """Token ids, int32 (S,), a read-only view."""
        shard, i, begin = self._piece(row)
        return shard["input_ids"][i, begin : begin + self.seq_len]

    def doc_starts(self, row: int) -> np.ndarray:
        """Positions in the row where documents begin (at their separator), ascending, int32."""
        shard, i, begin = self._piece(row)
        starts = shard["doc_starts"][shard["doc_offsets"][i] : shard["doc_offsets"][i + 1]]
        first, last = np.searchsorted(starts, [begin, begin + self.seq_len])
        return starts[first:last] - begin

    def documents(self, row: int) -> np.ndarray:
        """Index of each token's document in the row, from 0, int32 (S,); tokens attend within a document."""
        marks = np.zeros(self.seq_len, np.int32)
        marks[self.doc_starts(row)] = 1
        marks[0] = 0
        return np.cumsum(marks, dtype=np.int32)

    def positions(self, row: int) -> np.ndarray:
        """Position of each token in its document, int32 (S,); one continued from the previous row starts at 0."""
        places = np.arange(self.seq_len, dtype=np.int32)
        begins = np.zeros(self.seq_len, np.int32)
        begins[self.doc_starts(row)] = self.doc_starts(row)
        return places - np.maximum.accumulate(begins)


def read_state(path: Path) -> dict[str, Any] | None:
    """The `lvctx` metadata of a complete shard, or None if there is none."""
    try:
        raw = read_safetensors_header(path).get("__metadata__", {}).get("lvctx")
    except InputError:
        return None
    return json.loads(raw) if raw else None
