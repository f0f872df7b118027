"""Which engine and which scorer run a model: with shared prefixes where its class allows it."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lvctx.config import refuse_options
from lvctx.cost import CostMeter
from lvctx.inference.engine import Engine
from lvctx.inference.engine_config import CachePlacement, EngineConfig
from lvctx.inference.prefix_scorer import PrefixScorer, Score
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.models.loading import load_config
from lvctx.parallel.hf_attention import is_plain
from lvctx.parallel.ring_attention import ALONE, Ring
from lvctx.vlm.base import VLM, VisualTokens, sequential_positions
from lvctx.vlm.generic import ForwardVLM
from lvctx.vlm.generic_haystack import GenericTokens
from lvctx.vlm.registry import open_vlm


class Scorer(Protocol):
    """Scores sequences of ids over a vocabulary extended by visual embeddings."""

    ring: Ring
    """Ranks that compute together."""
    tokens_run: int
    """Tokens that went through the model so far."""

    def score(self, ids_L: np.ndarray, answer: int, *, generate: int = 0) -> Score:
        """See `PrefixScorer`."""


FORWARD_UNUSED = ("prefill_chunk", "reuse", "cp", "kv_cache", "batch")
"""Options without effect on a model that runs by its own forward, which computes a whole prompt on one process."""


def unused_options(vlm: VLM, *, device_map: bool = False) -> list[str]:
    """Options of how a model runs that have no effect on this one."""
    names = list(FORWARD_UNUSED) if isinstance(vlm, ForwardVLM) else []
    if not names and not is_plain(load_config(vlm.path).get_text_config()):  # padding would count in its windows
        names.append("batch")
    if not vlm.has_feature_cache:  # nothing but the model is on a device
        names += ["feature_cache", *(("device",) if device_map else ())]
    return names


def open_checked_vlm(model: str, device: str, feature_cache: Path | None, given: Collection[str]) -> VLM:
    """See `open_vlm`. Raises UsageError for options that the user gave and that have no effect on this model."""
    vlm = open_vlm(model, device=device, feature_cache=feature_cache)
    there = f"for {vlm.path}" + (" with --device-map" if "device_map" in given else "")
    refuse_options(given, unused_options(vlm, device_map="device_map" in given), there=there)
    return vlm


def open_engine(vlm: VLM, config: EngineConfig, *, ring: Ring = ALONE) -> Engine:
    """The engine of a checkpoint, with a resolved device. Raises MissingError, UsageError."""
    if isinstance(vlm, ForwardVLM):
        from lvctx.inference.forward_engine import ForwardEngine

        return ForwardEngine.from_config(vlm, config, ring=ring)
    return TransformersEngine.from_config(vlm, config, ring=ring)


def is_forward_only(visual: VisualTokens | None) -> bool:
    """Whether a haystack is of a model that shares no prefixes."""
    return isinstance(visual, GenericTokens) and isinstance(visual.haystack.vlm, ForwardVLM)


def open_scorer(
    model: Any,
    visual: VisualTokens | None,
    *,
    chunk: int | None,
    reuse: bool,
    kv_cache: CachePlacement,
    meter: CostMeter,
    ring: Ring = ALONE,
) -> Scorer:
    """What scores sequences with a loaded model: a `PrefixScorer`, or a `ForwardScorer` for other classes."""
    if is_forward_only(visual):
        from lvctx.inference.forward_engine import ForwardScorer

        assert isinstance(visual, GenericTokens)
        return ForwardScorer(model, visual, meter)
    table_RE = None
    if visual is not None:
        with meter.phase("encode"):
            table_RE = visual.table(model)
    return PrefixScorer(
        model,
        table_RE,
        chunk=chunk,
        reuse=reuse,
        kv_cache=kv_cache,
        positions=visual.positions if visual else sequential_positions,
        ring=ring,
        meter=meter,
    )
