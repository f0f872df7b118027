"""Placement of the KV cache: on the device, on the host, or on the device in eight bits.

The walk over prefixes appends and crops often, so a layer has one buffer that grows by half, with a moving end:
appending and cropping copy nothing. `host` keeps the buffers in host memory and copies one layer at a time to the
device for its attention, so the device holds one layer's cache instead of all (12 GiB at 224K tokens of Qwen2-7B); the
results are the same. `int8` has a scale per token and head and half the bytes of bfloat16; the results differ.

Shapes: B samples, H key heads, L tokens, D channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

from lvctx.inference.engine_config import CachePlacement


class Buffer:
    """Keys or values of one layer, as stored, with the conversion to a tensor."""

    def __init__(self, like: Tensor, placement: CachePlacement) -> None:
        self.device, self.dtype, self.eighths = like.device, like.dtype, placement == "int8"
        self.where = torch.device("cpu") if placement == "host" else like.device
        self._data = self._allocate(like, 0)
        self._scale = self._allocate(like[..., :1], 0, torch.float32)

    def _allocate(self, like: Tensor, tokens: int, dtype: torch.dtype | None = None) -> Tensor:
        b, h, _, d = like.shape
        dtype = dtype or (torch.int8 if self.eighths else self.dtype)
        return torch.empty(b, h, tokens, d, dtype=dtype, device=self.where)

    def put(self, first: int, new_BHLD: Tensor) -> None:
        """Write tokens from `first` on; later tokens are dropped."""
        end = first + new_BHLD.shape[-2]
        if self.eighths:
            scale = (new_BHLD.float().abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
            self._scale = self._grown(self._scale, first, end)
            self._scale[..., first:end, :] = scale
            new_BHLD = (new_BHLD.float() / scale).round().to(torch.int8)
        self._data = self._grown(self._data, first, end)
        self._data[..., first:end, :] = new_BHLD

    def _grown(self, old: Tensor, used: int, end: int) -> Tensor:
        if end <= old.shape[-2]:
            return old
        b, h, _, d = old.shape
        new = torch.empty(b, h, max(end, old.shape[-2] * 3 // 2, 256), d, dtype=old.dtype, device=old.device)
        new[..., :used, :] = old[..., :used, :]
        return new

    def get(self, end: int) -> Tensor:
        """The first `end` tokens, on the device in the model's data type."""
        data = self._data[..., :end, :]
        if self.eighths:
            return (data.float() * self._scale[..., :end, :]).to(self.dtype)
        return data.to(self.device, non_blocking=True)

    def keep(self, order: Sequence[int]) -> None:
        """See `keep_samples`."""
        for tensor in (self._data, self._scale):
            for to, sample in enumerate(order):
                if to != sample:
                    tensor[to] = tensor[sample]
        self._data, self._scale = self._data[: len(order)], self._scale[: len(order)]


class BufferedLayer(DynamicLayer):
    """One layer's keys and values, with the interface of transformers' cache layers."""

    placement: CachePlacement = "device"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create the buffers, once their shape is known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._pair = Buffer(key_states, self.placement), Buffer(value_states, self.placement)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, L, D) keys and values; all of them so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for buffer, new in zip(self._pair, (key_states, value_states), strict=True):
            buffer.put(self.length, new)
        self.length += key_states.shape[-2]
        return self.get(self.length)

    def get(self, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, L, D) of the first `end` tokens."""
        keys, values = (buffer.get(end) for buffer in self._pair)
        return keys, values

    def keep(self, order: Sequence[int]) -> None:
        """See `keep_samples`."""
        for buffer in self._pair:
            buffer.keep(order)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -`tokens_to_remove` tokens."""
        assert tokens_to_remove <= 0
        self.length = max(0, self.length + tokens_to_remove)


class HostLayer(BufferedLayer):
    """A layer in host memory."""

    placement = "host"


class EightBitLayer(BufferedLayer):
    """A layer in eight bits."""

    placement = "int8"


LAYERS: dict[CachePlacement, type[BufferedLayer]] = {"device": BufferedLayer, "host": HostLayer, "int8": EightBitLayer}


def empty_cache(placement: CachePlacement) -> Cache:
    """An empty cache, for any number of layers."""
    return Cache(layer_class_to_replicate=LAYERS[placement])


def join_caches(layers: Sequence[list[Any]], end: int | None = None) -> Cache:
    """A copy of caches of one sample each as one cache: shorter ones are padded before their first token.

    Takes the layers of each from its list, so that no more than one layer is in memory twice. Only the first `end`
    tokens are copied, if given.
    """
    joined = Cache(layer_class_to_replicate=type(layers[0][0]))
    joined.layers = [_join_layers([of.pop(0) for of in layers], end) for _ in layers[0][:]]
    return joined


def _join_layers(layers: Sequence[BufferedLayer], end: int | None) -> BufferedLayer:
    parts = [layer.get(layer.length if end is None else end) for layer in layers]
    most, joined = max(keys.shape[-2] for keys, _ in parts), type(layers[0])()
    keys, values = (
        torch.cat([F.pad(part, (0, 0, most - part.shape[-2], 0)) for part in kind]) for kind in zip(*parts, strict=True)
    )
    joined.update(keys, values)
    return joined


def keep_samples(cache: Cache, order: Sequence[int]) -> None:
    """Keep only these samples, in this order. Those that move must come from behind the new end."""
    for layer in cache.layers:
        layer.keep(order)
