"""Tensors that stay in their safetensors file until rows of them are read, so that a rank reads its own shard alone.

A parameter without memory has its `StoredTensor` as the attribute `stored`, and as its data one value that stands for
all of them: shapes and types are known, and a forward pass computes, with zeros.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lvctx.artifacts.store import data_offset
from lvctx.artifacts.weights import read_headers

ModuleT = TypeVar("ModuleT", bound=nn.Module)
STORABLE = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Types of tensors, by their names in safetensors."""
BLOCK = 1 << 22
"""Number of values that are converted to float64 at once."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    path: Path
    """The file."""
    begin: int
    """Its first byte there."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    def rows(self, first: int, end: int) -> Tensor:
        """Rows `first` to `end` of the first axis, which are contiguous in the file, as stored."""
        if first == end:  # of a tensor with fewer rows than ranks
            return torch.empty(0, *self.shape[1:], dtype=self.dtype)
        width = prod(self.shape[1:])
        row_bytes = width * self.dtype.itemsize
        place = self.begin + first * row_bytes
        raw = np.fromfile(self.path, np.uint8, count=(end - first) * row_bytes, offset=place)
        return torch.from_numpy(raw).view(self.dtype).view(end - first, *self.shape[1:])

    def placeholder(self, dtype: torch.dtype | None) -> Tensor:
        """A tensor of zeros with this shape and the memory of one value, in `dtype` if this is of a floating type."""
        kind = dtype if dtype is not None and self.dtype.is_floating_point else self.dtype
        return torch.zeros((), dtype=kind).expand(self.shape)


@dataclass(frozen=True, kw_only=True)
class GrownTensor:
    """A stored tensor that further rows follow, all of them equal."""

    stored: StoredTensor
    """The rows before them."""
    added: Tensor
    """One further row."""

    def rows(self, first: int, end: int) -> Tensor:
        """Rows `first` to `end` of the first axis."""
        count = self.stored.shape[0]
        kept = self.stored.rows(min(first, count), min(end, count))
        more = end - max(first, count)
        return kept if more <= 0 else torch.cat([kept.to(self.added.dtype), self.added.expand(more, *kept.shape[1:])])


def read_stored(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a resolved model directory by name; raises KeyError for a type that is not one of `STORABLE`."""
    tensors = {}
    for file, header in read_headers(directory).items():
        data = data_offset(directory / file)
        for name, entry in header.items():
            begin, dtype, shape = data + entry["data_offsets"][0], STORABLE[entry["dtype"]], tuple(entry["shape"])
            tensors[name] = StoredTensor(path=directory / file, begin=begin, dtype=dtype, shape=shape)
    return tensors


def keep_in_file(parameter: nn.Parameter, stored: StoredTensor | GrownTensor | None) -> nn.Parameter:
    """Note that the values of a parameter are in a file; None if they are in memory."""
    parameter.stored = stored  # type: ignore[attr-defined]
    return parameter


def into_memory(module: ModuleT) -> ModuleT:
    """Read the parameters of a small module that are still in their files, in place."""
    for parameter in module.parameters():
        parameter.data = read_rows(parameter, 0, len(parameter))
        keep_in_file(parameter, None)
    return module


def grow_rows(parameter: nn.Parameter, rows: int) -> nn.Parameter:
    """The parameter with further rows, each the mean of its own, which stay in their file if they are there."""
    count, row_shape = len(parameter), parameter.shape[1:]
    step = max(1, BLOCK // max(1, row_shape.numel()))
    total = torch.zeros(row_shape, dtype=torch.float64)
    for first in range(0, count, step):
        total += read_rows(parameter, first, min(first + step, count)).cpu().double().sum(0)
    mean = (total / count).to(parameter.device, parameter.dtype)
    stored: StoredTensor | None = getattr(parameter, "stored", None)
    if stored is None:
        values = torch.cat([parameter.detach(), mean.expand(rows - count, *row_shape)])
        return nn.Parameter(values, requires_grad=parameter.requires_grad)
    empty = torch.zeros((), dtype=parameter.dtype).expand(rows, *row_shape)
    grown = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return keep_in_file(grown, GrownTensor(stored=stored, added=mean))


def read_rows(parameter: Tensor, first: int, end: int) -> Tensor:
    """Rows of a parameter in its type, from memory or from its file."""
    stored: StoredTensor | GrownTensor | None = getattr(parameter, "stored", None)
    return parameter.detach()[first:end] if stored is None else stored.rows(first, end).to(parameter.dtype)
