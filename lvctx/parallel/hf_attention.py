"""Ring and Ulysses attention registered as an attention implementation of transformers, so that models need no change.

A forward gets one more keyword, `shard`, passed on from the model's call to its attention layers. Without it, and for
one rank, this is torch's own causal attention. transformers builds no mask for an implementation
without a mask function, which is necessary: at 224K tokens an L x L mask is 50 GB.

Shapes: B samples, H query heads, K key heads, L local tokens, D channels.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lvctx.errors import InputError
from lvctx.parallel.block_attention import Kernel, choose_kernel
from lvctx.parallel.ring_attention import ALONE, Ring, ring_attention
from lvctx.parallel.ulysses_attention import ulysses_attention, unified_attention

log = logging.getLogger(__name__)
RING_ATTENTION = "lvctx_ring"
"""The required `attn_implementation` of a model, for both kinds of context parallelism."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of a sequence that a forward pass computes."""

    ring: Ring = field(default_factory=Ring)
    """The ranks that share the sequence."""
    starts: tuple[int, ...] | None = None
    """Start of each document in the whole sequence, ascending from 0: tokens attend within their document. None: tokens
    attend to all previous ones."""


def document_starts(begins: Sequence[int]) -> tuple[int, ...]:
    """`Shard.starts` of a row whose documents begin at these positions; tokens before the first are a document too."""
    return tuple(sorted({0, *map(int, begins)}))


def register() -> None:
    """Make `attn_implementation="lvctx_ring"` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(RING_ATTENTION, _attend)


def is_plain(config: Any) -> bool:
    """Whether attention is full and causal with values as wide as keys, as `_attend` computes it."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    latent = getattr(config, "kv_lora_rank", None)  # DeepSeek: values and keys have different widths
    return not windowed and not latent and kinds == {"full_attention"}


def check_config(config: Any, *, where: object, fix: str = "use context parallelism with other models only") -> None:
    """Raise InputError for a model with a sliding window or latent keys: ring and stripes support neither."""
    if not is_plain(config):
        raise InputError("its attention has a sliding window or latent keys", where=where, fix=fix)


def check_ring(config: Any, ring: Ring, *, where: object) -> None:
    """Raise InputError for a model whose attention the ranks do not support, and for heads that they cannot divide."""
    heads, kinds = config.num_attention_heads, set(getattr(config, "layer_types", None) or ())
    divided, around = ring.split(getattr(config, "num_key_value_heads", None) or heads)
    if around.world > 1:
        check_config(config, where=where, fix="give --cp-kind ulysses")
        return
    if heads % divided.world:
        fix = "give a --cp that divides them" + ", or --cp-kind ring" * is_plain(config)
        raise InputError(f"--cp {ring.world} does not divide its {heads} attention heads", where=where, fix=fix)
    kinds -= {"full_attention", "sliding_attention"}
    if kinds or getattr(config, "use_bidirectional_attention", None):
        what = f"its layers have {', '.join(sorted(kinds)) or 'bidirectional attention'}"
        raise InputError(what, where=where, fix="use models with full and sliding attention only")


def use(lm: Any, *, where: object, ring: Ring = ALONE) -> None:
    """Make a language model attend by `shard`. Raises InputError for attention that the ranks do not support."""
    check_ring(lm.config, ring, where=where)
    if not lm._supports_sdpa:  # attention sinks, capped logits
        raise InputError("torch's attention cannot compute its own", where=where, fix="use other models only")
    register()
    lm.set_attn_implementation(RING_ATTENTION)


def keep_uncompiled() -> None:
    """Have torch.compile leave this attention out, whose loop over documents it would compile for each row again.

    Call it after `use`. It is no decorator, since that would import the compiler wherever this module is imported.
    """
    from transformers import AttentionInterface

    def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        # What Ulysses returns is a view of a tensor still on its way, which the compiler does not take. The copy is
        # the one that the layer would make.
        return _attend(*args, **kwargs)[0].contiguous(), None

    AttentionInterface.register(RING_ATTENTION, torch.compiler.disable(attend))


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    shard: Shard | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention: q (B, H, L, D), k and v (B, K, L, D) to (B, L, H, D)."""
    assert attention_mask is None, "ring attention supports documents, not masks"
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Under autocast RoPE returns float32 queries and keys; autocast casts torch's own attention, not this one.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    kinds = getattr(module.config, "layer_types", None)
    if sliding_window is None and kinds and kinds[module.layer_idx] == "sliding_attention":
        # Its class gives the window to the mask only, and there is none here.
        what = f"attention of {module.config.model_type} does not pass its sliding window on"
        raise InputError(what, where=module.config.name_or_path, fix="use other models only")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shard = shard or Shard()
    if shard.ring.world == 1 or shard.ring.kind == "ulysses":
        share: dict[str, Any] = {"ring": shard.ring, "starts": shard.starts, "window": sliding_window}
        return ulysses_attention(query, key, value, scale=scale, **share).transpose(1, 2), None
    both = shard.ring.kind == "both"
    kernel = select_kernel(device, query.dtype, query.shape[-1], both or shard.starts is not None)
    if isinstance(kernel, PackageRing):
        return kernel(query, key, value, shard.ring, scale), None
    given: dict[str, Any] = {"ring": shard.ring, "kernel": kernel, "scale": scale, "starts": shard.starts}
    if both:
        return unified_attention(query, key, value, window=sliding_window, **given).transpose(1, 2), None
    out = ring_attention(query, key, value, **given)
    return out.transpose(1, 2), None


@cache
def select_kernel(device: str, dtype: torch.dtype, head_dim: int, ours: bool) -> "Kernel | PackageRing":
    """The ring's implementation: ring-flash-attn if available and suitable, else ours on torch's kernels.

    Only `ours` supports documents, and rings that are a part of a process group.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    package = load_package() if device == "cuda" and half and not ours else None
    chosen = PackageRing(package) if package else choose_kernel(device, dtype, head_dim)
    log.info("ring attention on %s, %s, heads of %d: %s", device, dtype, head_dim, chosen.name)
    return chosen


def load_package() -> ModuleType | None:
    """ring-flash-attn (the `cuda` extra), or None if it or its kernels are not installed.

    Version 0.1.8 fails to import beside transformers 5 because of an adapter that is not used here, so an empty module
    replaces it.
    """
    adapters = ModuleType("ring_flash_attn.adapters")
    for name in ("substitute_hf_flash_attn", "update_ring_flash_attn_params"):
        setattr(adapters, name, None)
    sys.modules.setdefault("ring_flash_attn.adapters", adapters)
    try:
        return importlib.import_module("ring_flash_attn")
    except (ImportError, OSError) as e:
        sys.modules.pop("ring_flash_attn.adapters", None)
        log.info("ring-flash-attn is not used: %s", e)
        return None


class PackageRing:
    """The package's zigzag function, for causal attention without documents."""

    name = "ring-flash-attn"

    def __init__(self, package: ModuleType) -> None:
        self._function: Callable[..., Tensor] = package.zigzag_ring_flash_attn_func

    def __call__(self, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, ring: Ring, scale: float) -> Tensor:
        """Attention (B, L, H, D) of this rank's queries over the whole sequence."""
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q_BHLD, k_BKLD, v_BKLD))
        return self._function(q, k, v, softmax_scale=scale, causal=True, group=ring.group)
