"""Copy weights from file to file under other names: bytes are copied as stored, so memory does not grow with the model.

A `Weight` knows where its bytes are stored and reads them when it is written. Shards are written in safetensors' own
order (wide types first, then by name), so a file converted to another format and back is identical.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from lvctx.artifacts.store import atomic_file, data_offset, read_json, read_safetensors_header, write_json
from lvctx.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COPY_BYTES = 1 << 24
"""Number of bytes read at once."""
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}
"""Data types of weights, and their sizes in bytes."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor that is still in a file, or is computed when it is written."""

    dtype: str
    """Name in safetensors, one of `WIDTHS`."""
    shape: tuple[int, ...]
    """Shape as in the header."""
    chunks: Callable[[], Iterator[Any]]
    """Its bytes, in pieces."""

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * WIDTHS[self.dtype]


def shard_names(directory: Path) -> list[str]:
    """Names of the safetensors files that hold a model's weights: the single one, as in transformers, or the index's.

    Raises InputError for an invalid index, one that names files outside the directory, and for missing files.
    """
    index = directory / INDEX
    names = [SINGLE]
    if not (directory / SINGLE).is_file() and index.is_file():
        stored = read_json(index)
        places, metadata = stored.get("weight_map"), stored.get("metadata", {})
        if not isinstance(metadata, dict):
            raise InputError(f"metadata is {json.dumps(metadata)[:40]}", where=index, fix="write {} there")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise InputError("weight_map does not map tensors to files", where=index, fix="save the model again")
        names = sorted(set(places.values()))
        for name in names:
            if "/" in name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
                raise InputError(f"{name!r} is not a safetensors file of this directory", where=index, fix="correct it")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise InputError(
            f"missing {', '.join(missing[:8])}", where=directory, fix="download or save the model again (safetensors)"
        )
    return names


def read_headers(directory: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Shards of a model directory, in order: file name -> tensor name -> its entry in the safetensors header.

    Raises InputError for what `shard_names` refuses, an incomplete shard, or a name that occurs twice.
    """
    shards: dict[str, dict[str, dict[str, Any]]] = {}
    names: set[str] = set()
    for file in shard_names(directory):
        header = read_safetensors_header(directory / file)
        header.pop("__metadata__", None)
        if repeated := names & header.keys():
            raise InputError(f"{min(repeated)} is in two shards", where=directory / file, fix="save the model again")
        names |= header.keys()
        shards[file] = header
    return shards


def read_weights(directory: Path) -> dict[str, dict[str, Weight]]:
    """Shards of a resolved model directory, in order: file name -> name -> tensor.

    Raises InputError for what `read_headers` refuses, and for a tensor of an unsupported type.
    """
    shards: dict[str, dict[str, Weight]] = {}
    for file, header in read_headers(directory).items():
        path = directory / file
        data = data_offset(path)
        shards[file] = {}
        for name, entry in header.items():
            if entry["dtype"] not in WIDTHS:
                raise InputError(f"{name} is {entry['dtype']}", where=path, fix="save the model in bfloat16")
            begin, end = (data + offset for offset in entry["data_offsets"])
            weight = Weight(
                dtype=entry["dtype"], shape=tuple(entry["shape"]), chunks=partial(read_range, path, begin, end)
            )
            shards[file][name] = weight
    return shards


def read_range(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """Bytes `begin` to `end` of a file, in pieces."""
    with open(path, "rb") as f:
        f.seek(begin)
        while begin < end:
            chunk = f.read(min(COPY_BYTES, end - begin))
            assert chunk
            begin += len(chunk)
            yield chunk


def write_weights(
    out: Path, shards: list[Mapping[str, Weight]], *, on_progress: Callable[[int, int, str], None] = lambda *_: None
) -> None:
    """Write shards and, where there are several, their index. An existing shard is complete, and is kept."""
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = [SINGLE]
    for done, (name, shard) in enumerate(zip(names, shards, strict=True)):
        on_progress(done, count, name)
        if not (out / name).exists():
            write_weight_shard(out / name, shard)
    on_progress(count, count, "")
    if count > 1:
        total = sum(weight.size for shard in shards for weight in shard.values())
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def write_weight_shard(target: Path, shard: Mapping[str, Weight]) -> None:
    """Write one safetensors file, byte for byte as safetensors would."""
    order = sorted(shard, key=lambda name: (-WIDTHS[shard[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + shard[name].size
        header[name] = {"dtype": shard[name].dtype, "shape": shard[name].shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with atomic_file(target) as partial_file, open(partial_file, "wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        for name in order:
            f.writelines(shard[name].chunks())  # a loop's variable would keep one tensor while the next is computed
        assert f.tell() == 8 + len(raw) + end
