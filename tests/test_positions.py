"""Position schemes against formulas written out in float64 and what stock transformers computes from config.json."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lvctx.errors import InputError, UsageError
from lvctx.rope import ntk, pi, yarn
from lvctx.rope import theta as rope
from lvctx.rope.runtimes import sglang
from lvctx.rope.scaling import resolve_scaling
from lvctx.rope.spec import RopeSpec

SPECS = [
    RopeSpec(head_dim=16, theta=2.5e5, factor=4.0, original=512),
    RopeSpec(head_dim=64, theta=1e5, factor=2.5, original=8192),  # SmolLM2
    RopeSpec(head_dim=128, theta=1e6, factor=4.0, original=32768),  # Qwen2
    RopeSpec(head_dim=128, theta=1e4, factor=32.0, original=4096),  # Llama 2
    RopeSpec(head_dim=64, theta=2.5e5, factor=8.0, original=8192, attention_factor=1.4),
]


def by_hand(scheme: str, spec: RopeSpec, i: int) -> float:
    """Frequency of channel pair i, from the papers' formulas, one number at a time."""
    d, b, s, length = spec.head_dim, spec.theta, spec.factor, spec.original
    plain = math.exp(-2 * i / d * math.log(b))
    if scheme == "theta":
        return plain
    if scheme == "pi":
        return plain / s
    if scheme == "ntk":
        return math.exp(-2 * i / d * (math.log(b) + d / (d - 2) * math.log(s)))
    # YaRN: the pair that turns `beta` times in the pretrained length solves L b^(-2i/d) = 2 pi beta.
    first = math.floor(d / 2 * math.log(length / (2 * math.pi * 32), b))
    last = math.ceil(d / 2 * math.log(length / (2 * math.pi * 1), b))
    kept = 1 - min(1.0, max(0.0, (i - max(first, 0)) / (min(last, d - 1) - max(first, 0))))
    return plain * kept + plain / s * (1 - kept)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"d{s.head_dim}")
@pytest.mark.parametrize("module", [rope, pi, ntk, yarn], ids=lambda m: m.__name__.rsplit(".")[-1])
def test_frequencies_are_the_formula_and_what_stock_transformers_computes(
    module: Any, spec: RopeSpec, tmp_path: Path
) -> None:
    ours = module.inv_freq(spec)
    assert ours.dtype == torch.float64
    name = module.__name__.rsplit(".")[-1]
    for i, value in enumerate(ours.tolist()):
        assert math.isclose(value, by_hand(name, spec, i), rel_tol=1e-12)
    config = LlamaConfig(
        hidden_size=2 * spec.head_dim,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=round(spec.original * spec.factor),
        rope_parameters=module.to_hf(spec),
    )
    config.save_pretrained(tmp_path)
    stock = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    torch.testing.assert_close(stock.inv_freq.double(), ours, rtol=2e-6, atol=0)
    expected = spec.attention_factor or 0.1 * math.log(spec.factor) + 1
    assert stock.attention_scaling == pytest.approx(expected if module is yarn else 1.0, rel=1e-12)


def test_the_attention_factor_reaches_every_runtime() -> None:
    """transformers and vLLM read the whole factor; SGLang multiplies its own 0.1 ln s + 1 by `attn_factor`."""
    told = chosen(config(), "yarn", factor=8, attention_factor=1.4).rope_parameters
    assert told["attention_factor"] == 1.4
    assert "attn_factor" not in told, "transformers warns about a key that it does not know"
    elsewhere = sglang(told)
    assert elsewhere is not None
    assert elsewhere["attn_factor"] * (0.1 * math.log(8) + 1) == pytest.approx(1.4, rel=1e-12)
    assert "attention_factor" not in chosen(config(**told), "yarn", factor=8).rope_parameters


def test_yarns_attention_factor_is_the_published_one() -> None:
    """Peng et al., equation 22; 1 / 0.878249 for a factor of four."""
    assert yarn.attention_factor(SPECS[2]) == pytest.approx(1 / 0.878249, rel=1e-6)
    assert yarn.attention_factor(RopeSpec(head_dim=64, theta=1e4, factor=1.0, original=2048)) == 1.0


@given(st.floats(1, 64), st.sampled_from([32, 64, 128]), st.floats(1e4, 1e9), st.integers(512, 1 << 20))
def test_stretching_lies_between_nothing_and_interpolation(s: float, d: int, theta: float, length: int) -> None:
    spec = RopeSpec(head_dim=d, theta=theta, factor=s, original=length)
    plain, least = rope.inv_freq(spec), pi.inv_freq(spec)
    for scheme in (ntk, yarn):
        ours = scheme.inv_freq(spec)
        assert bool((ours <= plain * (1 + 1e-12)).all())
        assert bool((ours >= least * (1 - 1e-12)).all())
    assert ntk.inv_freq(spec)[0] == 1.0, "the fastest channel stays"
    assert ntk.inv_freq(spec)[-1].item() == pytest.approx(least[-1].item(), rel=1e-9), "the slowest is interpolated"


def config(**rope_parameters: Any) -> Any:
    return SimpleNamespace(
        rope_parameters={"rope_type": "default", "rope_theta": 1e6} | rope_parameters,
        max_position_embeddings=32768,
        head_dim=None,
        hidden_size=512,
        num_attention_heads=4,
    )


def chosen(model: Any, scheme: Any, **asked: Any) -> Any:
    return resolve_scaling(
        model, scheme=scheme, **{"theta": None, "factor": None, "context": None, "seq_len": 0} | asked
    )


def test_missing_options_follow_from_given_ones() -> None:
    assert chosen(config(), "theta").rope_parameters["rope_theta"] == 1e9
    assert chosen(config(), "theta", seq_len=65536).context == 65536
    assert chosen(config(), "yarn", factor=4).context == 131072
    assert chosen(config(), "yarn", context=131072).factor == 4.0
    assert chosen(config(), "pi", seq_len=65536).rope_parameters["factor"] == 2.0
    assert chosen(config(), "ntk", factor=4).rope_parameters["rope_theta"] == pytest.approx(1e6 * 4 ** (128 / 126))
    assert chosen(config(), "none", seq_len=65536).rope_parameters == config().rope_parameters


def test_a_stretched_model_is_stretched_from_its_pretrained_length() -> None:
    """Progressive YaRN: 32K pretrained, four times already, now eight times; the old factor does not multiply."""
    model = config(rope_type="yarn", factor=4.0, original_max_position_embeddings=8192)
    again = chosen(model, "yarn", context=65536)
    assert again.factor == 8.0
    assert again.rope_parameters["original_max_position_embeddings"] == 8192
    linear = config(rope_type="linear", factor=4.0)
    assert chosen(linear, "pi", factor=8, original=8192).context == 65536
    assert chosen(model, "none").rope_parameters == model.rope_parameters


def test_another_kind_of_positions_is_refused_unless_replaced(caplog: pytest.LogCaptureFixture) -> None:
    llama3 = config(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192)
    with pytest.raises(InputError, match="llama3 already"):
        chosen(llama3, "yarn", factor=2)
    assert chosen(llama3, "theta", theta=5e6).rope_parameters == {"rope_type": "default", "rope_theta": 5e6}
    assert "llama3" in caplog.text


def test_a_lower_base_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    chosen(config(), "theta", theta=1e6)
    assert "lower" not in caplog.text
    chosen(config(), "theta", theta=5e4)
    assert "base 50000 is lower than the model's own 1e+06" in caplog.text


def test_linear_positions_do_not_state_their_original_length() -> None:
    """Chen et al. scale the pretrained length; max_position_embeddings of released configurations is either."""
    linear = config(rope_type="linear", factor=4.0)
    with pytest.raises(InputError, match="--original-length, 32768 or 8192"):
        chosen(linear, "pi", context=65536)
    assert chosen(linear, "pi", context=65536, original=32768).factor == 2.0
    assert chosen(linear, "pi", context=65536, factor=8.0).context == 65536, "nothing depends on it"
    known = config(rope_type="linear", factor=4.0, original_max_position_embeddings=4096)
    assert chosen(known, "pi", context=65536).factor == 16.0
    assert chosen(config(), "yarn", factor=4, original=8192).rope_parameters["original_max_position_embeddings"] == 8192


@pytest.mark.parametrize(
    ("scheme", "asked", "message"),
    [
        ("theta", {"factor": 2.0}, "--factor has no meaning"),
        ("none", {"theta": 1e6}, "keeps the base"),
        ("ntk", {"factor": 2.0, "attention_factor": 1.4}, "--attention-factor has no meaning"),
        ("pi", {"context": 8192}, "would scale by 0.25"),
        ("theta", {"original": 8192}, "--original-length has no meaning"),
        ("none", {"original": 8192}, "--original-length has no meaning"),
        ("yarn", {}, "would scale by 0"),
    ],
)
def test_contradicting_flags(scheme: Any, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chosen(config(), scheme, **asked)


def test_a_partial_rotary_factor_survives() -> None:
    half = chosen(config(partial_rotary_factor=0.5), "yarn", factor=4).rope_parameters
    assert half["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize("scheme", ["theta", "ntk", "yarn"])
def test_the_axes_of_m_rope_survive(scheme: Any) -> None:
    """Lost, transformers would take a Qwen-VL model's three positions for one."""
    asked = {} if scheme == "theta" else {"factor": 4}
    assert chosen(config(mrope_section=[16, 24, 24]), scheme, **asked).rope_parameters["mrope_section"] == [16, 24, 24]


def test_extend_lm_writes_what_was_asked(tiny_lm: Path, tmp_path: Path) -> None:
    from lvctx.models.loading import load_model
    from lvctx.training.extend import resolve_extend
    from lvctx.training.extend_config import ExtendConfig
    from lvctx.training.parallel_config import ParallelConfig, RunControl
    from lvctx.training.run_training import run_training

    config = ExtendConfig(model=str(tiny_lm), out=tmp_path, rope="yarn", factor=4.0, steps=0)
    run_training(resolve_extend(config).task(), ParallelConfig(), RunControl(out=tmp_path))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["max_position_embeddings"] == 2048
    spec = RopeSpec(head_dim=16, theta=1e4, factor=4.0, original=512)
    rotary = load_model(tmp_path).model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq.double(), yarn.inv_freq(spec), rtol=2e-6, atol=0)
