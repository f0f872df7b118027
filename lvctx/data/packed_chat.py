"""The chat artifact: whole samples concatenated to rows, none truncated, with the media of their visual placeholders.

Shapes: a shard has R rows, N samples, T tokens. `input_ids` int32 (T,) and `labels` int32 (T,) (already shifted; -100
is not counted, and is the label of every sample's last token); `row_offsets` int64 (R + 1,): row i is the tokens
`row_offsets[i]:row_offsets[i + 1]`; `sample_offsets` int64 (R + 1,) and `sample_starts` int32 (N,), ragged: row i's
samples begin at `sample_starts[sample_offsets[i]:sample_offsets[i + 1]]` in it, the first at 0. Rows are not padded.

Beside it `shard-*.jsonl` has a line for every sample in the same order: `source` (file and line), `kind`, `row` (in the
shard), `start` (in the row), `tokens` and `media`, a list of `{"kind", "path", "width", "height", "at", "tokens",
"blocks"}`, for videos also `frames`, `fps` and `duration` (s). `at` counts from the row's beginning; a block is
`[at, frames, t, h, w]`: its first placeholder in the row, and its grid in tokens (see `vlm.token_count`).
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.artifacts import schemas
from lvctx.artifacts.jsonl_log import read_jsonl, write_jsonl
from lvctx.artifacts.manifest import check_sizes, read_manifest
from lvctx.artifacts.packed_manifest import check_packed_manifest
from lvctx.artifacts.sniff import check_kind
from lvctx.artifacts.store import save_tensors
from lvctx.data.packed import map_tensors, shard_name
from lvctx.errors import InputError


def lines_name(number: int) -> str:
    """File name of the lines of the shard with this 0-based number."""
    return f"shard-{number:05d}.jsonl"


def write_chat_shard(
    directory: Path, number: int, tensors: Mapping[str, np.ndarray], samples: list[dict[str, Any]], metadata: Any
) -> None:
    """Write one shard's tensors and lines."""
    write_jsonl(directory / lines_name(number), samples)
    save_tensors(directory / shard_name(number), tensors, metadata)


class ChatRows:
    """Rows of a finished chat directory, memory-mapped. `len()` is the number of rows."""

    def __init__(self, directory: Path) -> None:
        """Check manifest and file sizes; maps nothing yet. Raises InputError for missing or changed files."""
        self.directory = Path(directory)
        check_kind(self.directory, "chat", "packed chat", fix="run lvctx pack-chat")
        self.manifest: dict[str, Any] = read_manifest(self.directory)
        if self.manifest.get("schema") != schemas.CHAT:
            raise InputError(f"not packed chat ({self.manifest.get('schema')})", where=directory, fix="run pack-chat")
        check_packed_manifest(self.manifest, self.directory)
        check_sizes(self.directory)
        self.target_length: int = self.manifest["target_length"]
        self._ends = list(itertools.accumulate(self.manifest["shard_rows"]))
        self._shards: dict[int, dict[str, np.ndarray]] = {}
        self._lines: dict[int, list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(self.row(number)) for number in range(len(self)))

    def _find(self, row: int) -> tuple[int, dict[str, np.ndarray], int]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        number = int(np.searchsorted(self._ends, row, side="right"))
        if number not in self._shards:
            self._shards[number] = map_tensors(self.directory / shard_name(number))
        return number, self._shards[number], row - (self._ends[number - 1] if number else 0)

    def _tokens(self, row: int, name: str) -> np.ndarray:
        _, shard, i = self._find(row)
        return shard[name][shard["row_offsets"][i] : shard["row_offsets"][i + 1]]

    def row(self, row: int) -> np.ndarray:
        """Token ids, int32, at most `target_length`; a read-only view."""
        return self._tokens(row, "input_ids")

    def labels(self, row: int) -> np.ndarray:
        """Targets of each position (already shifted), -100 where none counts; int32, as long as the row."""
        return self._tokens(row, "labels")

    def sample_starts(self, row: int) -> np.ndarray:
        """Positions in the row where samples begin, ascending from 0, int32."""
        _, shard, i = self._find(row)
        return shard["sample_starts"][shard["sample_offsets"][i] : shard["sample_offsets"][i + 1]]

    def samples(self, row: int) -> list[dict[str, Any]]:
        """The line of each of the row's samples with its media; see above."""
        number, shard, i = self._find(row)
        if number not in self._lines:
            self._lines[number] = read_jsonl(self.directory / lines_name(number))
        return self._lines[number][int(shard["sample_offsets"][i]) : int(shard["sample_offsets"][i + 1])]
