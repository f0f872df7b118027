"""Which engine and which scorer run a model: with shared prefixes where its class allows it."""

from typing import Any, Protocol

import numpy as np

from lvctx.cost import CostMeter
from lvctx.inference.engine import Engine
from lvctx.inference.engine_config import CachePlacement, EngineConfig
from lvctx.inference.prefix_scorer import PrefixScorer, Score
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.parallel.ring_attention import ALONE, Ring
from lvctx.vlm.base import VLM, VisualTokens, sequential_positions
from lvctx.vlm.generic import ForwardVLM
from lvctx.vlm.generic_haystack import GenericTokens


class Scorer(Protocol):
    """Scores sequences of ids over a vocabulary extended by visual embeddings."""

    ring: Ring
    """Ranks that compute together."""
    tokens_run: int
    """Tokens that went through the model so far."""

    def score(self, ids_L: np.ndarray, answer: int, *, generate: int = 0) -> Score:
        """See `PrefixScorer`."""


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
    chunk: int,
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
