"""Perplexity by position against stock transformers in float64, whatever the chunks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import mrope_models
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.data.pack_text import plan_pack_text, run_pack_text
from lvctx.data.pack_text_config import PackTextConfig
from lvctx.data.packed import PackedRows


@pytest.fixture(scope="module")
def packed(tiny_lm: Path, nano: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tiny_lm, tmp_path_factory.mktemp("rows"))


def pack(tokenizer: Path, out: Path) -> Path:
    rng = np.random.default_rng(0)
    words = ["red", "blue", "time", "house", "near", "and", "the", "of"]
    (out / "a.txt").write_text(" ".join(words[i] for i in rng.integers(len(words), size=700)))
    config = PackTextConfig(
        inputs=(str(out / "a.txt"),), tokenizer=str(tokenizer), out=out / "rows", seq_len=100, min_long=10, mix="none"
    )
    run_pack_text(plan_pack_text(config), resume="auto", force=False, on_progress=lambda *_: None)
    return out / "rows"


@pytest.mark.nano
@pytest.mark.parametrize(("kind", "chunk"), [("llama", 7), ("llama", 2048), ("qwen2_vl", 7)])
def test_it_is_that_of_a_stock_forward(tiny_lm: Path, packed: Path, tmp_path: Path, kind: str, chunk: int) -> None:
    path = tiny_lm
    if kind != "llama":
        path = mrope_models.save(kind, tmp_path / kind)
        packed = pack(path, tmp_path)
    plot = tmp_path / "p.png"
    command = ["perplexity", str(path), "--data", str(packed), "--rows", "3", "--points", "4", "--device", "cpu"]
    done = CliRunner().invoke(app, [*command, "--dtype", "float32", "--prefill-chunk", str(chunk), "-o", str(plot)])
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    loader = AutoModelForCausalLM if kind == "llama" else AutoModelForImageTextToText
    model = loader.from_pretrained(path, dtype=torch.float64).eval()
    rows = torch.from_numpy(np.stack([PackedRows(packed).row(i) for i in range(3)]).astype(np.int64))
    with torch.no_grad():
        log_probs = model(rows).logits.log_softmax(-1)
    losses = -log_probs[:, :-1].gather(2, rows[:, 1:, None])[..., 0].mean(0)
    assert row["positions"] == [25, 50, 74, 99]
    for i, (begin, end) in enumerate(zip([0, 25, 50, 74], row["positions"], strict=True)):
        assert row["by_position"][i] == pytest.approx(losses[begin:end].mean().exp().item(), rel=1e-5)
        assert row["up_to_position"][i] == pytest.approx(losses[:end].mean().exp().item(), rel=1e-5)
    assert row["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert Image.open(plot).width > 100


@pytest.mark.nano
def test_rows_can_be_cut_and_wrong_input_is_named(tiny_lm: Path, packed: Path, tmp_path: Path) -> None:
    command = ["perplexity", str(tiny_lm), "--data", str(packed), "--rows", "1", "--points", "2", "-q"]
    done = CliRunner().invoke(app, [*command, "--seq-len", "50"])
    assert (json.loads(done.stdout)["seq_len"], json.loads(done.stdout)["positions"]) == (50, [24, 49])
    assert CliRunner().invoke(app, [*command, "-o", str(tmp_path / "x.txt")]).exit_code == 2
    assert CliRunner().invoke(app, [*command, "--seq-len", "5000"]).exit_code == 3
