"""Tokenized documents on disk between reading and packing, for budgets that depend on the whole input.

A part is one safetensors file beside the shards: `ids` int32 (documents one after another, each with its separator),
`starts` int64 (N + 1,), `codes` int32 (N,) into the `names` of its state. Parts are written and resumed like shards.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.artifacts.store import save_tensors
from lvctx.data.documents import Chunk, Place
from lvctx.data.packed import map_tensors
from lvctx.data.tokenization import Tokens


def part_name(number: int) -> str:
    """File name of the part with this 0-based number; hidden, since it is removed when the shards are done."""
    return f".part-{number:05d}.safetensors"


class Spool:
    """Parts in a directory. `states` are those of the complete parts, each with `end`, `complete` and `names`."""

    def __init__(
        self,
        directory: Path,
        states: list[dict[str, Any]],
        *,
        part_tokens: int,
        metadata: Callable[[dict[str, Any]], dict[str, str]],
    ) -> None:
        """A part is written when it has `part_tokens`; `metadata` turns a state into the file's metadata."""
        self.directory, self.states, self._part_tokens, self._metadata = directory, states, part_tokens, metadata
        self._names = {name: i for i, name in enumerate(states[-1]["names"] if states else [])}
        self._clear()

    @property
    def complete(self) -> bool:
        """Whether it holds the whole input."""
        return bool(self.states) and self.states[-1]["complete"]

    def add(self, tokens: Tokens, keep: np.ndarray) -> None:
        """Append the documents marked in `keep`, bool (N,)."""
        lengths = tokens.lengths() + 1
        codes = np.array([self._names.setdefault(name, len(self._names)) for name in tokens.names], np.int32)
        self._ids.append(tokens.ids[np.repeat(keep, lengths)])
        self._lengths.append(lengths[keep])
        self._codes.append(codes[tokens.codes[keep]])
        self._buffered += len(self._ids[-1])
        self._end = tokens.chunk.end
        if self._buffered >= self._part_tokens:
            self.flush(complete=False)

    def flush(self, *, complete: bool) -> None:
        """Write the buffer as the next part; `complete` marks the last."""
        tensors = {
            "ids": np.concatenate(self._ids),
            "starts": np.cumsum(np.concatenate(self._lengths)),
            "codes": np.concatenate(self._codes),
        }
        state = {"end": self._end, "complete": complete, "names": list(self._names)}
        metadata = self._metadata(state)
        save_tensors(self.directory / part_name(len(self.states)), tensors, metadata)
        self.states.append(state)
        self._clear()

    def _clear(self) -> None:
        self._ids, self._codes = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
        self._lengths = [np.zeros(1, np.int64)]
        self._buffered, self._end = 0, Place(0, 0, 0)

    def read(self, first: int) -> Iterator[Tokens]:
        """The parts from number `first` on, memory-mapped."""
        for number in range(first, len(self.states)):
            path, place = self.directory / part_name(number), Place(number, 0, 0)
            stored = map_tensors(path)
            yield Tokens(
                chunk=Chunk(start=place, end=place, where=str(path)),
                ids=stored["ids"],
                starts=stored["starts"],
                status=np.zeros(len(stored["codes"]), np.uint8),
                names=tuple(self.states[number]["names"]),
                codes=stored["codes"],
            )
