"""The KV cache: a buffer that grows and is cropped equals appending and cutting tensors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvctx.inference.kv_cache import empty_cache
from lvctx.inference.prefix_scorer import PrefixScorer
from lvctx.models.loading import load_model


@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 300)), min_size=1, max_size=8),
    kv_cache=st.sampled_from(["device", "host", "int8"]),
)
def test_append_and_crop_in_any_order(steps: list[tuple[int, int]], kv_cache: Any) -> None:
    cache, plain = empty_cache(kv_cache), torch.empty(1, 2, 0, 8)
    generator = torch.Generator().manual_seed(0)
    for remove, add in steps:
        remove = min(remove, plain.shape[2])
        if remove:
            cache.crop(-remove)
        new = torch.randn(1, 2, add, 8, generator=generator)
        plain = torch.cat([plain[:, :, : plain.shape[2] - remove], new], 2)
        keys, values = cache.update(new, 2 * new, 0)
        assert cache.get_seq_length() == plain.shape[2]
        # Eight bits: at most half a step of the largest channel's 127th.
        off = plain.abs().amax(-1, keepdim=True) / 254 * 1.001 if kv_cache == "int8" else torch.zeros(1)
        assert ((keys - plain).abs() <= off).all()
        assert ((values - 2 * plain).abs() <= 2 * off).all()


def test_scores_with_the_cache_elsewhere(tiny_lm: Path) -> None:
    model = load_model(tiny_lm)
    rng = np.random.default_rng(0)
    head = rng.integers(0, 1000, 150)
    sequences = [np.concatenate([head, rng.integers(0, 1000, 40)]) for _ in range(3)]
    scores = {
        kept: [PrefixScorer(model, chunk=64, kv_cache=kept).score(s, 4) for s in sequences]  # type: ignore[arg-type]
        for kept in ("device", "host", "int8")
    }
    assert scores["host"] == scores["device"]
    exact, rough = ([s.log_prob for s in scores[kept]] for kept in ("device", "int8"))
    assert rough != exact
    assert rough == pytest.approx(exact, abs=0.05)
