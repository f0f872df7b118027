"""The feature cache: a vision tower's features of a video's sampled frames, written while the video is being read.

A safetensors file in which `features` comes first, so that batches are appended as they arrive and memory does not
grow with the length of the video. The header is written last, into reserved space (the format allows spaces there).

Suffixes: F frames, P features a frame, D tower width.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvctx.artifacts import schemas
from lvctx.artifacts.manifest import Provenance, read_provenance
from lvctx.artifacts.sniff import encode_first, mistaken, sniff
from lvctx.artifacts.store import atomic_file, data_offset, read_safetensors_header
from lvctx.errors import InputError, library_errors

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".frames.safetensors"
"""Suffix of a frames artifact's name."""
DATA_SHA256 = "data_sha256"
"""Key of the provenance: the hash of the bytes after the header."""
FEATURE_SCHEMAS = (schemas.FRAMES, schemas.FRAMES_HYBRID)


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """The vision features of a video's sampled frames."""

    features: "Tensor"
    """bf16 (F, P, D): the tower's selected layer, before any projector. Loaded from the file on access."""
    pts: "Tensor"
    """f64 (F,): timestamp of each frame in seconds."""
    index: "Tensor"
    """i64 (F,): each frame's number in the source, in the order of presentation, from 0."""
    grid: "Tensor | None"
    """i64 (F, 2): rows and columns of tokens that each frame is pooled to; None if all are pooled 2x2."""
    provenance: dict[str, Any]
    """Its provenance; `provenance["inputs"]["tower"]` is the fingerprint of the tower."""

    def frame_tokens(self, per_frame: int) -> list[int]:
        """Visual tokens of each frame; `per_frame` for those pooled 2x2."""
        return [per_frame] * len(self.pts) if self.grid is None else self.grid.prod(1).tolist()

    def batches(self, size: int, count: int | None = None) -> "Iterator[tuple[Tensor, Tensor | None]]":
        """Features and grids of the first `count` frames, `size` at a time."""
        last = len(self.features) if count is None else min(count, len(self.features))
        for i in range(0, last, size):
            part = slice(i, min(i + size, last))
            yield self.features[part], None if self.grid is None else self.grid[part]


class FramesWriter:
    """An artifact being written: append batches in order."""

    def __init__(self, file: Any, header_bytes: int) -> None:
        self._file, self._header_bytes = file, header_bytes
        self._pts: list[float] = []
        self._index: list[int] = []
        self._grid: list[int] = []
        self._shape: tuple[int, ...] = ()
        self._hash = hashlib.sha256()

    def append(
        self, features_BPD: "Tensor", pts: list[float], index: list[int], grid: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Add a batch: features (B, P, D) of any float type, stored as bf16, with each frame's time and number.

        `grid` is every frame's rows and columns of tokens, or None for all frames.
        """
        import torch

        raw = features_BPD.detach().to("cpu", torch.bfloat16).contiguous()
        assert len(raw) == len(pts) == len(index)
        assert self._shape in ((), tuple(raw.shape[1:]))
        self._shape = tuple(raw.shape[1:])
        self._write(raw.view(torch.uint8).numpy().data)
        self._pts += pts
        self._index += index
        self._grid += [n for pair in grid for n in pair]

    def _write(self, data: Any) -> None:
        self._file.write(data)
        self._hash.update(data)

    def _finish(self, value: dict[str, Any]) -> None:
        count = len(self._pts)
        self._write(struct.pack(f"<{count}d", *self._pts) + struct.pack(f"<{count}q", *self._index))
        self._write(struct.pack(f"<{len(self._grid)}q", *self._grid))
        assert len(self._grid) in (0, 2 * count)
        value = {**value, DATA_SHA256: self._hash.hexdigest()}
        metadata = {"lvctx": json.dumps(value, sort_keys=True, separators=(",", ":"))}
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, dtype, shape, size in (
            ("features", "BF16", [count, *self._shape], 2),
            ("pts", "F64", [count], 8),
            ("index", "I64", [count], 8),
            *([("grid", "I64", [count, 2], 8)] if self._grid else []),
        ):
            start = end
            for n in shape:
                size *= n
            end += size
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        raw = json.dumps(header, separators=(",", ":")).encode()
        assert len(raw) <= self._header_bytes, (len(raw), self._header_bytes)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._header_bytes) + raw.ljust(self._header_bytes))


@contextmanager
def open_frames(target: Path, provenance: Provenance, facts: dict[str, Any]) -> Iterator[FramesWriter]:
    """Write a frames artifact: append to what this yields; on a clean exit it is complete under `target`.

    `facts` (JSON values found while encoding) may be filled until then; it is stored beside the provenance.
    """
    base = json.dumps(provenance.to_dict(), sort_keys=True)
    # Quotes in the metadata are escaped once more in the header; the rest is for facts and the tensors' entries.
    header_bytes = -(-(2 * len(base.encode()) + 4096) // 8) * 8
    with atomic_file(target) as partial, open(partial, "wb") as file:
        file.seek(8 + header_bytes)
        writer = FramesWriter(file, header_bytes)
        yield writer
        writer._finish({**provenance.to_dict(), "facts": facts})


def verify_feature_cache(path: Path) -> None:
    """Compare a frames artifact's data with the hash in its header. Raises InputError if it differs or has none."""
    stored = (read_provenance(path) or {}).get(DATA_SHA256)
    if stored is None:
        raise InputError("has no hash of its data", where=path, fix="encode the video again to have one")
    with open(path, "rb") as f:
        f.seek(data_offset(path))
        if hashlib.file_digest(f, "sha256").hexdigest() != stored:
            raise InputError("damaged: its bytes are not those that were written", where=path, fix="encode it again")


def is_feature_cache(path: Path) -> bool:
    """Whether a file is a feature cache, complete or not, judged by its content."""
    return sniff(path).name in ("frames", "tensors")


def read_frames_provenance(path: Path) -> dict[str, Any]:
    """The provenance of a frames artifact, and its facts. Raises InputError for another file."""
    provenance = read_provenance(path) or {}
    parts = (provenance.get(key) for key in ("inputs", "config", "facts"))
    if provenance.get("schema") not in FEATURE_SCHEMAS or not all(isinstance(part, dict) for part in parts):
        raise mistaken(path, "a frames artifact", fix="write one with lvctx encode-video")
    return provenance


def read_feature_cache(path: Path, *, model: str | None = None) -> FeatureCache:
    """Open a frames artifact. Raises InputError for an incomplete file; `model` is named in the advice."""
    from safetensors import safe_open

    sniffed = sniff(path)
    if sniffed.name not in ("frames", "tensors"):
        fix = encode_first(path, model) if sniffed.name == "video" else "write one with lvctx encode-video"
        raise mistaken(path, "a frames artifact", fix=fix, sniffed=sniffed)
    header = read_safetensors_header(path)
    provenance = read_frames_provenance(path)
    missing = {"features", "pts", "index"} - header.keys()
    if missing:
        raise InputError(f"frames artifact without {', '.join(sorted(missing))}", where=path, fix="encode it again")
    with library_errors("unreadable frames artifact", where=path), safe_open(path, "pt") as f:
        tensors = {name: f.get_tensor(name) for name in ("features", "pts", "index")}
        grid = f.get_tensor("grid") if "grid" in header else None
    return FeatureCache(**tensors, grid=grid, provenance=provenance)
