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

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.artifacts import schemas
from lvctx.artifacts.jsonl_log import read_jsonl, write_jsonl
from lvctx.artifacts.store import save_tensors
from lvctx.data.packed import MappedShards, shard_name


def lines_name(number: int) -> str:
    """File name of the lines of the shard with this 0-based number."""
    return f"shard-{number:05d}.jsonl"


def write_chat_shard(
    directory: Path, number: int, tensors: Mapping[str, np.ndarray], samples: list[dict[str, Any]], metadata: Any
) -> None:
    """Write one shard's tensors and lines."""
    write_jsonl(directory / lines_name(number), samples)
    save_tensors(directory / shard_name(number), tensors, metadata)


class ChatRows(MappedShards):
    """Rows of a finished chat directory, memory-mapped. `len()` is the number of rows."""

    def __init__(self, directory: Path) -> None:
        """Raises InputError for missing or changed files."""
        super().__init__(directory, "chat", schemas.CHAT, "packed chat", "pack-chat")
        self.target_length: int = self.manifest["target_length"]
        self._lines: dict[int, list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(self.row(number)) for number in range(len(self)))

    def _tokens(self, row: int, name: str) -> np.ndarray:
        _, shard, i = self.find(row)
        return shard[name][shard["row_offsets"][i] : shard["row_offsets"][i + 1]]

    def row(self, row: int) -> np.ndarray:
        """Token ids, int32, at most `target_length`; a read-only view."""
        return self._tokens(row, "input_ids")

    def labels(self, row: int) -> np.ndarray:
        """Targets of each position (already shifted), -100 where none counts; int32, as long as the row."""
        return self._tokens(row, "labels")

    def sample_starts(self, row: int) -> np.ndarray:
        """Positions in the row where samples begin, ascending from 0, int32."""
        _, shard, i = self.find(row)
        return shard["sample_starts"][shard["sample_offsets"][i] : shard["sample_offsets"][i + 1]]

    def samples(self, row: int) -> list[dict[str, Any]]:
        """The line of each of the row's samples with its media; see above."""
        number, shard, i = self.find(row)
        if number not in self._lines:
            self._lines[number] = read_jsonl(self.directory / lines_name(number))
        return self._lines[number][int(shard["sample_offsets"][i]) : int(shard["sample_offsets"][i + 1])]
