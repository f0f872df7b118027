"""--use-generation-config: replies are those of stock `generate` with the same generation_config.json."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support import generic_models
from support.generic_parity import QUESTION, drawn, stock_inputs
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.cost import CostMeter
from lvctx.errors import InputError, UsageError
from lvctx.inference.endpoint_engine import request_fields
from lvctx.inference.forward_engine import stock_generate
from lvctx.inference.generation_config import drop_sampling, resolve_sampling
from lvctx.inference.sampling_params import BenchmarkSamplingParams, SamplingParams
from lvctx.inference.token_sampling import TokenSampler
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.vlm.registry import open_vlm


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generic_models.save("llava", tmp_path_factory.mktemp("sampled") / "llava")


@pytest.fixture(scope="module")
def engine(vlm: Path) -> TransformersEngine:
    made: Any = TransformersEngine(open_vlm(vlm), device="cpu", dtype=torch.float32)
    made.model.lm_head.weight.data *= 40  # replies that are not one token again and again
    made.set_visual_input(made.vlm.visual_input(drawn(1)))
    return made  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def stock(vlm: Path) -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(vlm, dtype=torch.float32).eval()
    model.lm_head.weight.data *= 40
    return model, stock_inputs(AutoProcessor.from_pretrained(vlm), drawn(1), QUESTION)


def write(vlm: Path, **values: Any) -> None:
    stored = (
        json.loads((vlm / "generation_config.json").read_text()) if (vlm / "generation_config.json").exists() else {}
    )
    kept = {name: stored[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in stored}
    (vlm / "generation_config.json").write_text(json.dumps({**kept, **values}))


def params_of(vlm: Path, given: tuple[str, ...] = (), **values: Any) -> SamplingParams:
    params = SamplingParams(use_generation_config=True, max_new_tokens=12, **values)
    return resolve_sampling(params, str(vlm), given)


def stock_configured(stock: tuple[Any, Any], vlm: Path, **options: Any) -> Any:
    from transformers import GenerationConfig

    model, inputs = stock
    model.generation_config = GenerationConfig.from_pretrained(vlm)
    return model.generate(**inputs, return_dict_in_generate=True, output_scores=True, **options)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 3.0, "temperature": 0.2, "top_k": 3},
        {"do_sample": True, "top_k": 1, "temperature": 1.7},
        {"do_sample": True, "top_k": 1, "repetition_penalty": 1.4, "top_p": 0.9},
    ],
)
def test_replies_without_chance_are_those_of_stock_generate(
    values: dict[str, Any], vlm: Path, engine: TransformersEngine, stock: tuple[Any, Any]
) -> None:
    write(vlm, **values)
    params = params_of(vlm)
    reply = engine.reply([QUESTION], params)
    out = stock_configured(stock, vlm, max_new_tokens=12)
    generated = out.sequences[0, stock[1]["input_ids"].shape[1] :]
    assert reply.text == engine.decode(generated)
    plain = engine.reply([QUESTION], SamplingParams(max_new_tokens=12))
    assert (reply.text != plain.text) == ("repetition_penalty" in values)


@pytest.mark.parametrize(
    "values",
    [
        {"do_sample": True},
        {"do_sample": True, "top_k": 0, "temperature": 2.5},
        {"do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 1.5, "repetition_penalty": 1.3},
    ],
)
def test_a_token_is_drawn_by_the_probabilities_of_stock_generate(
    values: dict[str, Any], vlm: Path, engine: TransformersEngine, stock: tuple[Any, Any]
) -> None:
    write(vlm, **values)
    params = params_of(vlm)
    expected = stock_configured(stock, vlm, max_new_tokens=1).scores[0][0].softmax(0)
    ids, logits = engine.prompt_ids([QUESTION]), list[torch.Tensor]()
    engine.finish([engine.start(ids, 1, choose=lambda logits_V: logits.append(logits_V) or 0)])[0]  # type: ignore[func-returns-value]
    text = ids[ids < engine.vlm.vocabulary].tolist()
    draws = 2000
    drawn_tokens = Counter(
        TokenSampler(SamplingParams(**{**vars(params), "seed": seed}), text)(logits[0]) for seed in range(draws)
    )
    assert all(expected[token] > 0 for token in drawn_tokens)
    found = torch.zeros_like(expected)
    for token, count in drawn_tokens.items():
        found[token] = count / draws
    # The expected total variation of so many draws, and its spread: sum of sqrt(p (1 - p) / n) / sqrt(2 pi).
    noise = float((expected * (1 - expected) / draws).sqrt().sum()) / (2 * torch.pi) ** 0.5
    assert float((found - expected).abs().sum()) / 2 < noise + 0.03


def test_given_options_override_the_file(vlm: Path) -> None:
    write(vlm, do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.05)
    resolved = params_of(vlm)
    assert resolved.facts == {
        "temperature": 0.7,
        "max_new_tokens": 12,
        "top_p": 0.8,
        "top_k": 50,
        "seed": 0,
        "repetition_penalty": 1.05,
    }
    assert params_of(vlm, ("top_k",), top_k=9).facts == {**resolved.facts, "top_k": 9}
    assert "repetition_penalty" not in params_of(vlm, ("repetition_penalty",)).facts
    greedy = params_of(vlm, ("temperature",), temperature=0.0)
    assert greedy.facts == {"temperature": 0.0, "max_new_tokens": 12, "repetition_penalty": 1.05}
    write(vlm, top_p=0.8)
    assert params_of(vlm).facts == SamplingParams(max_new_tokens=12).facts
    assert params_of(vlm, ("temperature",), temperature=0.3).top_p == 0.8
    with pytest.raises(UsageError):
        params_of(vlm, ("seed",), seed=3)
    unused = BenchmarkSamplingParams()
    assert resolve_sampling(unused, "no such model", ()) is unused


@pytest.mark.parametrize(
    "values",
    [
        {"num_beams": 4},
        {"do_sample": True, "min_p": 0.1},
        {"suppress_tokens": [3]},
        {"no_repeat_ngram_size": 2},
        {"temperature": "hot"},
        {"repetition_penalty": 0},
        {"do_sample": 1},
    ],
)
def test_what_we_cannot_do_is_an_error_only_if_it_is_wanted(values: dict[str, Any], vlm: Path) -> None:
    write(vlm, **values)
    with pytest.raises(InputError) as e:
        params_of(vlm)
    assert e.value.where == vlm / "generation_config.json"
    assert all(name in e.value.what for name in values if name != "do_sample" or len(values) == 1)
    resolve_sampling(SamplingParams(), str(vlm), ())


def test_a_model_without_the_file_and_a_server_have_none(vlm: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((vlm / "config.json").read_bytes())
    (tmp_path / "x.mp4").touch()
    asked = ["vqa", str(tmp_path / "x.mp4"), "--ask", "?", "--use-generation-config", "--model"]
    done = CliRunner().invoke(app, [*asked, str(tmp_path)])
    assert (done.exit_code, "generation_config.json" in done.stderr) == (3, True)
    done = CliRunner().invoke(app, [*asked, "m", "--endpoint", "http://127.0.0.1:9"])
    assert (done.exit_code, "--use-generation-config" in done.stderr) == (2, True)
    assert request_fields(SamplingParams(repetition_penalty=1.2), 5)["repetition_penalty"] == 1.2
    assert "repetition_penalty" not in request_fields(SamplingParams(), 5)


def test_models_of_their_own_forward_do_not_use_it_unasked(stock: tuple[Any, Any], vlm: Path) -> None:
    """`generate` takes what the file has where nothing else is given."""
    from transformers import GenerationConfig

    model, inputs = stock
    model.generation_config = GenerationConfig()
    expected = stock_generate(model, dict(inputs), 8, (), meter=CostMeter())
    model.generation_config = GenerationConfig(
        repetition_penalty=3.0, no_repeat_ngram_size=1, do_sample=True, min_p=0.5
    )
    assert stock_generate(model, dict(inputs), 8, (), meter=CostMeter()) != expected
    drop_sampling(model)
    assert stock_generate(model, dict(inputs), 8, (), meter=CostMeter()) == expected
