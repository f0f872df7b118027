"""The nano Qwen2-VL: stock transformers loads it, on text it equals SmolLM2; its extended config has M-RoPE++."""

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


def check_text(lm: Path) -> None:
    sys.path.insert(0, str(NANO))
    try:
        from giraffe_model import build
    finally:
        sys.path.remove(str(NANO))
    vlm, tokenizer = build(str(lm))
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
