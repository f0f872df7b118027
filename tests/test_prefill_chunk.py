"""The tokens of a forward pass of a prompt, chosen from a GPU's free memory: by hand, and against all tensors."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_plan_peak import LiveBytes
from transformers import AutoConfig, AutoModelForCausalLM

from lvctx.device import free_memory
from lvctx.inference.prefill_chunk import choose_chunk, prefill_chunk, token_bytes
from lvctx.inference.prefix_scorer import PrefixScorer
from lvctx.parallel.ring_attention import ALONE

SMOLLM2 = AutoConfig.for_model(
    "llama", hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64
)
QWEN2_7B = AutoConfig.for_model("qwen2", hidden_size=3584, intermediate_size=18944, num_attention_heads=28)
GIB = 1 << 30


def test_bytes_of_a_token_by_hand() -> None:
    """Six bfloat16 states and three of the MLP; the merge of attention: three float32 and three bfloat16 outputs."""
    assert token_bytes(QWEN2_7B, 2) == 6 * 7168 + 3 * 37_888 == 156_672
    assert token_bytes(SMOLLM2, 2) == 5 * 1152 + 3 * 2304 + 3 * 1152 == 6 * 1152 + 3 * 3072 == 16_128
    # Two ranks: half of five states, and all queries twice more: 12 + 10 bytes for each of 28 heads of 128.
    assert token_bytes(QWEN2_7B, 2, ranks=2) == 5 * 3584 + 22 * 3584 == 96_768
    assert token_bytes(SimpleNamespace(n_embd=768), 2) is None
    # A Mixtral of 16 experts as wide as its states, two for each token: norms and outputs in float32 as well.
    mixtral = AutoConfig.for_model("mixtral", hidden_size=512, intermediate_size=128, num_attention_heads=4)
    assert mixtral.num_experts_per_tok == 2
    assert token_bytes(mixtral, 2) == 6 * 1024 + 2 * 12 * 512


HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 256}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 4, "pad_token_id": None}


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("llama", {**HEADS, "intermediate_size": 2048}),
        ("llama", {**HEADS, "intermediate_size": 64}),
        ("llama", {**HEADS, "intermediate_size": 64, "hidden_size": 1024, "num_attention_heads": 4}),
        ("qwen3", {**HEADS, "intermediate_size": 64, "num_key_value_heads": 8}),
        ("qwen3_moe", {**HEADS, **EXPERTS, "intermediate_size": 64, "moe_intermediate_size": 256, "num_experts": 8}),
        ("mixtral", {**HEADS, **EXPERTS, "intermediate_size": 256, "num_local_experts": 8}),
    ],
)
def test_bytes_of_a_token_are_those_of_the_tensors(kind: str, numbers: dict[str, Any]) -> None:
    """Two chunks of 256 tokens and two of 512, behind others: the difference of the peaks is that of 256 tokens."""
    config = AutoConfig.for_model(kind, num_hidden_layers=2, vocab_size=300, **numbers)
    torch.manual_seed(0)
    scorer = PrefixScorer(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval(), chunk=1024)
    ids_1L = np.random.default_rng(0).integers(0, 300, (1, 1024))
    with torch.inference_mode():
        scorer._run(scorer._prefix, ids_1L, keep=1)  # the cache gets its size
        peaks = []
        for scorer.chunk in (256, 512):
            scorer._crop(0)
            with LiveBytes(()) as live:
                scorer._run(scorer._prefix, ids_1L[:, : 2 * scorer.chunk], keep=1)
            peaks.append(live.peak)
    predicted = token_bytes(config, 2)
    assert predicted is not None
    assert 0.85 * predicted < (peaks[1] - peaks[0]) / 256 < 1.05 * predicted


def test_chunks_by_hand() -> None:
    """An eighth of the free memory: SmolLM2 fits 32,768 tokens into 4 GiB and more, Qwen2-7B into 38."""
    for config, needed in ((SMOLLM2, 16_128 * 8), (QWEN2_7B, 156_672 * 8)):
        for tokens in (4096, 8192, 16_384, 32_768):
            assert prefill_chunk(config, needed * tokens, itemsize=2) == tokens
            assert prefill_chunk(config, needed * tokens - 1, itemsize=2) == tokens // 2
        assert prefill_chunk(config, 0, itemsize=2) == 2048
    assert prefill_chunk(SMOLLM2, 78 * GIB, itemsize=2) == prefill_chunk(QWEN2_7B, 62 * GIB, itemsize=2) == 32_768
    assert prefill_chunk(QWEN2_7B, 8 * GIB, itemsize=2) == 4096, "on a card of 24 GB"
    assert prefill_chunk(SimpleNamespace(n_embd=768), 78 * GIB, itemsize=2) == 2048


@given(st.integers(0, 1 << 38), st.integers(0, 1 << 34), st.sampled_from([2, 4]), st.integers(1, 8))
def test_chunks_grow_with_the_memory_within_their_limits(free: int, more: int, itemsize: int, ranks: int) -> None:
    chunk, larger = (prefill_chunk(QWEN2_7B, n, itemsize=itemsize, ranks=ranks) for n in (free, free + more))
    assert 2048 <= chunk <= larger <= 32_768
    assert chunk & (chunk - 1) == 0
    each = token_bytes(QWEN2_7B, itemsize, ranks)
    assert each is not None
    assert chunk == 2048 or 8 * each * chunk <= free


def test_what_is_free_on_the_fullest_gpu_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU 0 is unused. GPU 2 has 1 GiB that the driver can give and 1 that torch holds; GPU 1 has 70."""
    assert torch.cuda.is_initialized() or free_memory() == 0
    held = {0: 0, 1: 2 * GIB, 2: 9 * GIB}
    monkeypatch.setattr("lvctx.device.gpus_in_use", lambda: [1, 2])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: ((70 if gpu == 1 else 1) * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: held[gpu])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: held[gpu] - (gpu == 2) * GIB)
    assert free_memory() == 2 * GIB
    lm, cuda = SimpleNamespace(config=SMOLLM2, dtype=torch.bfloat16), torch.device("cuda", 1)
    assert choose_chunk(lm, cuda, flash=True, ring=ALONE) == 16_384, "2 GiB / 8 / 16,128 bytes are 16,644 tokens"
    assert choose_chunk(lm, cuda, flash=False, ring=ALONE) == 2048, "a mask of a chunk times the prompt"
    assert choose_chunk(lm, torch.device("cpu"), flash=True, ring=ALONE) == 2048


def test_a_scorer_on_a_cpu_and_one_with_a_given_chunk() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=1, vocab_size=30, **HEADS, intermediate_size=64)
    model = AutoModelForCausalLM.from_config(config)
    assert PrefixScorer(model).chunk == 2048
    assert PrefixScorer(model, chunk=7).chunk == 7
