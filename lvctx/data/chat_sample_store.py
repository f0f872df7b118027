"""Tokenized chat samples on disk between reading and packing: ids, labels and a JSON line for each."""

import json
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

import numpy as np


class ChatSampleStore:
    """Samples are numbered in the order they are added. Only two numbers and a kind are kept in memory for each."""

    def __init__(self, directory: Path) -> None:
        """Begin an empty store in two files of a directory that have no names, so that a killed process leaves none."""
        self._tokens, self._lines = (TemporaryFile(dir=directory) for _ in range(2))  # noqa: SIM115 (closed in __exit__)
        self.kinds: list[str] = []
        self.lengths: list[int] = []
        self._line_offsets = [0]
        self._token_offsets = [0]

    def __enter__(self) -> "ChatSampleStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the files, which ends them."""
        for file in (self._tokens, self._lines):
            with suppress(OSError):  # on a full disk it fails to write what it still holds
                file.close()

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, ids: list[int], labels: list[int], facts: dict[str, Any]) -> None:
        """Append a sample; `facts` has its `kind`."""
        self._tokens.write(np.array([ids, labels], np.int32).tobytes())
        line = json.dumps(facts, ensure_ascii=False).encode()
        self._lines.write(line)
        self._line_offsets.append(self._line_offsets[-1] + len(line))
        self._token_offsets.append(self._token_offsets[-1] + 2 * len(ids))
        self.kinds.append(facts["kind"])
        self.lengths.append(len(ids))

    def tokens(self, number: int) -> np.ndarray:
        """Ids and labels of a sample, int32 (2, L)."""
        first, end = self._token_offsets[number : number + 2]
        self._tokens.seek(4 * first)
        return np.frombuffer(self._tokens.read(4 * (end - first)), np.int32).reshape(2, -1)

    def facts(self, number: int) -> dict[str, Any]:
        """The facts that were added with a sample."""
        first, end = self._line_offsets[number : number + 2]
        self._lines.seek(first)
        facts: dict[str, Any] = json.loads(self._lines.read(end - first))
        return facts
