"""The nano Qwen2-VL: stock transformers loads it, on text it equals SmolLM2; its extended config has M-RoPE++."""

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_niah import run

from lvctx.models.loading import load_model

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "recipes" / "nano"


@pytest.fixture(scope="module")
def built(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny language model: the same architecture in two layers."""
    out = tmp_path_factory.mktemp("giraffe") / "model"
    build = [sys.executable, NANO / "giraffe_model.py", "--lm", tiny_lm, "--context", "256", "-o", out]
    subprocess.run([*build, "--rope-theta", "1e4"], check=True, cwd=ROOT)
    return out


def test_stock_transformers_sees_with_it(built: Path) -> None:
    """A chat with a picture, by the stock template and processor, through the stock forward."""
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = Qwen2VLForConditionalGeneration.from_pretrained(built).eval()
    tokenizer = AutoTokenizer.from_pretrained(built)
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert text.count("<|vision_start|><|image_pad|><|vision_end|>") == 1
    for side, tokens in ((48, 4), (96, 16)):
        seen = Qwen2VLImageProcessorPil.from_pretrained(built)(
            images=[np.zeros((side, side, 3), np.uint8)], return_tensors="pt"
        )
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * tokens), return_tensors="pt").input_ids
        kinds = (ids == model.config.image_token_id).int()
        logits = model(input_ids=ids, mm_token_type_ids=kinds, **seen).logits
        assert logits.shape == (1, ids.shape[1], len(tokenizer))
        assert torch.isfinite(logits).all()


def script(name: str) -> Any:
    sys.path.insert(0, str(NANO))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(NANO))


def check_text(lm: Path) -> None:
    vlm, tokenizer = script("giraffe_model").build(str(lm))
    model = load_model(lm, dtype=torch.float32)
    ids = tokenizer("A star is yellow, <|im_end|> and the house beside it is not.", return_tensors="pt").input_ids
    with torch.inference_mode():
        ours, theirs = vlm(input_ids=ids).logits, model(ids).logits
    torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs, rtol=0, atol=1e-4)
    assert vlm.config.get_text_config().max_position_embeddings == model.config.max_position_embeddings


def test_to_text_it_is_its_language_model(tiny_lm: Path) -> None:
    check_text(tiny_lm)


@pytest.mark.nano
def test_to_text_it_is_smollm2(nano: Any) -> None:
    check_text(nano.lm)


def test_the_extended_config_describes_mrope_pp(built: Path, tmp_path: Path) -> None:
    done = run("mrope-extend", "--model", built, "--scale", "4", "--verify", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = config["text_config"]["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["attention_factor"]) == ("yarn", 4, 1)
    assert config["text_config"]["max_position_embeddings"] == 1024


def test_the_shortest_conversations_have_no_position_above_255() -> None:
    """11 tokens of the system's turn, 25 of each question; an image is two delimiters and its longer side in tokens."""
    data = script("giraffe_data")
    for index in range(500):
        sizes = data.choose_sizes(np.random.default_rng(index), "shortest")
        assert len(sizes) >= 6
        assert 11 + 6 * 25 + sum(2 + size // 24 for size in sizes) <= 256


def test_the_schemes_differ_in_which_channels_they_interpolate() -> None:
    """Channels 0 to 7 are time, 8 to 19 height, 20 to 31 width; YaRN's ramp is over channels 1 to 18."""
    factors = script("giraffe_schemes").factors
    yarn, index, wavelength = (factors(name) for name in ("yarn", "index", "wavelength"))
    assert (yarn[:2] == 1).all()
    np.testing.assert_allclose(1 - yarn[2:18], 7 / 8 * np.arange(1, 17) / 17)
    np.testing.assert_allclose(yarn[18:], 1 / 8)
    for ours in (index, wavelength):
        np.testing.assert_allclose(ours[:8], 1)
        np.testing.assert_allclose(ours[19:], 1 / 8)
    np.testing.assert_allclose(1 - index[8:19], 7 / 8 * np.arange(1, 12) / 12)
    turns = 1e3 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(1 - wavelength[8:19], 7 / 8 * (turns[7] - turns[8:19]) / (turns[7] - turns[19]))


def test_differences_between_schemes_are_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two trainings, two needles, one length: in one training YaRN loses a needle, and 2 of each log-probability."""
    schemes = script("giraffe_schemes")
    for scheme, seed in itertools.product(("index", "yarn"), (0, 1)):
        worse = (scheme, seed) == ("yarn", 0)
        out = tmp_path / f"{scheme}-{seed}"
        out.mkdir()
        cell = {"length": 8, "point": 0.0, "log_prob": -2.0 if worse else 0.0}
        rows = [{**cell, "key": str(trial), "trial": trial, "correct": bool(trial) or not worse} for trial in (0, 1)]
        (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    schemes.print_results(tmp_path)
    said = capsys.readouterr().out
    assert "yarn at 8: 1/2 2/2, all 0.750; log-probability -2.00 0.00, all -1.00" in said
    # Over needles, whose means are 0.5 and 0: 0.25 +- 1.96 x 0.25. Over trainings, 0.5 and 0: 0.25 +- 12.706 x 0.25.
    right = "+0.250 (-0.240 to +0.740), n 4; by seed +0.50 +0.00, over trainings -2.93 to +3.43"
    assert f"index - yarn at 8, right: {right}" in said
    log_prob = "+1.000 (+1.000 to +1.000), n 4; by seed +2.00 +0.00, over trainings -11.71 to +13.71"
    assert f"index - yarn at 8, log-probability: {log_prob}" in said
