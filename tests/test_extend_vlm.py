"""extend-lm on the language model inside a VLM, and the LoRA that it stores separately."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.mrope_models import opinionated, save
from transformers import LlavaOnevisionForConditionalGeneration
from typer.testing import CliRunner

from lvctx.artifacts.manifest import read_manifest
from lvctx.cli.app import app
from lvctx.data.packed import PackedRows
from lvctx.models.loading import load_config, trained_length
from lvctx.parallel.context import ParallelContext
from lvctx.training.mrope_checkpoint import read_checkpoint
from lvctx.training.text_rows import RowLoss, shard_row


@pytest.fixture(scope="module")
def packed(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("text")
    (out / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    run(f"pack-text {out}/text.txt --tokenizer {tiny_vlm} --seq-len 64 --keep-short 1 -o {out}/packed")
    return out / "packed"


def run(command: str, *, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [*command.split(), "-q"])
    assert done.exit_code == code, done.output
    return done


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("lora", [0, 4])
def test_ntk_by_stages_trains_the_language_model_alone(tiny_vlm: Path, packed: Path, tmp_path: Path, lora: int) -> None:
    """Twice as far, and again: base * factor ** (d / (d - 2)) each time, d = 16 (bloc97's NTK-aware rule)."""
    command = (
        f"extend-lm --model {tiny_vlm} --data {packed} --rope ntk --factor 2 --steps 2 --batch-tokens 64 --lr 1e-2"
    )
    run(f"{command} --lora {lora} --stage context=1024 --stage context=2048 -o {tmp_path}/out")
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "out")
    text = model.config.text_config
    assert text.rope_parameters["rope_theta"] == pytest.approx(1e4 * 2 ** (16 / 14) * 2 ** (16 / 14))
    assert text.max_position_embeddings == 2048
    old, new = weights(tiny_vlm), weights(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all("language_model" in name or "lm_head" in name for name in changed)
    assert any("mlp" in name for name in changed) is (lora == 0)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file() is (lora > 0)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_vlm / name).read_bytes()


def test_the_adapter_alone_gives_the_same_model(tiny_vlm: Path, packed: Path, tmp_path: Path) -> None:
    command = f"extend-lm --model {tiny_vlm} --rope yarn --factor 4 --lora 4"
    run(f"{command} --data {packed} --pose --steps 2 --batch-tokens 64 --lr 1e-2 -o {tmp_path}/trained")
    run(f"{command} --steps 0 --adapter {tmp_path}/trained/adapter -o {tmp_path}/again")
    run(f"{command} --steps 0 -o {tmp_path}/plain")
    trained, again, plain = (weights(tmp_path / name) for name in ("trained", "again", "plain"))
    assert any(not torch.equal(trained[name], plain[name]) for name in trained)
    for name in trained:  # the adapter is kept in bfloat16
        torch.testing.assert_close(again[name], trained[name], rtol=2**-7, atol=1e-4)
    refused = run(f"extend-lm --model {tiny_vlm} --steps 0 --adapter {packed} -o {tmp_path}/x", code=2)
    assert "--lora" in str(refused.exception) + refused.output


def test_how_long_it_was_trained_goes_with_the_adapter(tiny_vlm: Path, packed: Path, tmp_path: Path) -> None:
    """A model trained to 32 tokens, then on rows of 64, by a run or by the LoRA that a run left."""
    shutil.copytree(tiny_vlm, tmp_path / "vlm")
    config = json.loads((tiny_vlm / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 32
    (tmp_path / "vlm" / "config.json").write_text(json.dumps(config))
    (tmp_path / "vlm" / "MANIFEST.json").unlink(missing_ok=True)
    command = f"extend-lm --model {tmp_path}/vlm --rope yarn --factor 4 --lora 4"
    run(f"{command} --data {packed} --steps 1 --batch-tokens 64 -o {tmp_path}/trained")
    run(f"{command} --steps 0 --adapter {tmp_path}/trained/adapter -o {tmp_path}/again")
    run(f"{command} --steps 0 -o {tmp_path}/plain")
    assert [trained_length(tmp_path / name) for name in ("trained", "again", "plain")] == [64, 64, 32]


def test_log_n_scaling_changes_the_attention_factor_alone(tiny_vlm: Path, packed: Path, tmp_path: Path) -> None:
    """A stretched model read more sharply: the same weights, positions and lengths."""
    command = f"extend-lm --model {tiny_vlm} --rope yarn --rope-theta 20000 --factor 4 --attention-factor 1.4 --lora 4"
    run(f"{command} --data {packed} --steps 1 --batch-tokens 64 -o {tmp_path}/before")
    command = f"extend-lm --model {tmp_path}/before --rope yarn --factor 4 --attention-factor 1.56"
    run(f"{command} --steps 0 -o {tmp_path}/after")
    before, after = (
        LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("before", "after")
    )
    torch.testing.assert_close(after.state_dict(), before.state_dict(), rtol=0, atol=0)
    rotary, sharper = (model.model.language_model.rotary_emb for model in (before, after))
    torch.testing.assert_close(sharper.inv_freq, rotary.inv_freq, rtol=0, atol=0)
    assert (rotary.attention_scaling, sharper.attention_scaling) == (1.4, 1.56)
    assert trained_length(tmp_path / "after") == trained_length(tmp_path / "before")
    assert after.config.text_config.max_position_embeddings == before.config.text_config.max_position_embeddings


def test_an_adapter_that_does_not_fit_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    """An alignment's projector means nothing to a language model, and stages would each start from the same LoRA."""
    save_file({"multi_modal_projector.linear_1.weight": torch.zeros(2, 2)}, tmp_path / "projector.safetensors")
    command = f"extend-lm --model {tiny_lm} --lora 4 --adapter {tmp_path}/projector.safetensors -o {tmp_path}/x"
    refused = run(f"{command} --steps 0", code=3)
    assert "projector" in str(refused.exception) + refused.output
    refused = run(f"{command} --stage steps=0 --stage steps=0", code=2)
    assert "--adapter" in str(refused.exception) + refused.output


@pytest.fixture(scope="module")
def qwens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and text packed with their tokenizer."""
    folder = tmp_path_factory.mktemp("qwens")
    for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        save(kind, folder / kind)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    run(f"pack-text {folder}/text.txt --tokenizer {folder}/qwen2_vl --seq-len 64 --keep-short 1 -o {folder}/packed")
    return folder


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_loss_of_a_qwen_vl_is_its_stock_forwards(qwens: Path, kind: str) -> None:
    """The stock model places text itself: the same position on all three axes, counted from 0."""
    rows = PackedRows(qwens / "packed")
    ids = torch.from_numpy(np.stack([rows.row(0), rows.row(1)]).astype("int64"))
    model = opinionated(kind)
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() * 63 for row in ids]
    with torch.no_grad():
        total, count = RowLoss(model)(**shard_row(ids, ParallelContext(device="cpu"), None))
    assert (float(total), count) == (pytest.approx(sum(losses), rel=1e-5), 126)


@pytest.mark.parametrize(
    ("kind", "method", "lora"), [("qwen2_vl", "mrope++", 0), ("qwen2_5_vl", "ntk", 4), ("qwen3_vl", "pi", 0)]
)
def test_text_trains_the_language_model_of_a_qwen_vl(
    qwens: Path, tmp_path: Path, kind: str, method: str, lora: int
) -> None:
    """Positions as `mrope-extend` writes them, by which the result can then train at a larger scale."""
    original = 16_384
    command = f"extend-lm --model {qwens}/{kind} --data {qwens}/packed --rope {method} --original-length {original}"
    flags = f"--steps 1 --batch-tokens 128 --lr 1e-2 --lora {lora}"
    run(f"{command} --factor 4 {flags} -o {tmp_path}/out")
    scaled = f"mrope-extend --model {qwens}/{kind} --method {method} --original-length {original}"
    run(f"{scaled} --scale 4 -o {tmp_path}/same")
    configs = [load_config(tmp_path / name).get_text_config() for name in ("out", "same")]
    assert configs[0].rope_parameters == configs[1].rope_parameters
    assert configs[0].max_position_embeddings == configs[1].max_position_embeddings == 4 * original
    files = [tmp_path / name / "vllm.json" for name in ("out", "same")]
    ours, theirs = (json.loads(path.read_text()) if path.exists() else None for path in files)
    assert ours == theirs
    old, new = weights(qwens / kind), weights(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert not any("visual" in name for name in changed)
    assert any("mlp" in name for name in changed) is (lora == 0)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["rope_scaling"]["factor"], manifest["rope_scaling"]["original"]) == (4, original)
    before, after = (read_checkpoint(path) for path in (qwens / kind, tmp_path / "out"))
    assert (after.mrope, after.length) == (before.mrope, original)
    # `--rope none` keeps positions and record, also of a checkpoint that mrope-extend scaled.
    run(f"extend-lm --model {tmp_path}/same --data {qwens}/packed --rope none {flags} -o {tmp_path}/kept")
    assert read_checkpoint(tmp_path / "kept") == replace(read_checkpoint(tmp_path / "same"), path=tmp_path / "kept")


def test_a_qwen_vl_extended_on_text_trains_on_chat_next(qwens: Path, tmp_path: Path) -> None:
    """GIRAFFE, table 2: text first, then multimodal rows, in two stages from the pretrained length."""
    packed, model = qwens / "packed", qwens / "qwen2_vl"
    stages = "--stage factor=2,context=65536 --stage factor=4,context=131072"
    command = f"extend-lm --model {model} --data {packed} --rope mrope++ {stages} --steps 1 --batch-tokens 64"
    run(f"{command} -o {tmp_path}/text")
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Good day."}]})
    )
    command = f"pack-chat --model {tmp_path}/text --text {tmp_path}/chat.jsonl --long-share any --target-length 128"
    run(f"{command} -o {tmp_path}/chat")
    scales = "--stage scale=4 --stage scale=8"
    command = f"mrope-extend --model {tmp_path}/text --data {tmp_path}/chat --scale 8 {scales} --steps 1"
    run(f"{command} -o {tmp_path}/out")
    run(f"mrope-extend --model {model} --scale 8 -o {tmp_path}/plain")
    extended, plain = (load_config(tmp_path / name).get_text_config() for name in ("out", "plain"))
    assert extended.rope_parameters == plain.rope_parameters
    assert extended.max_position_embeddings == plain.max_position_embeddings == 262_144
    assert read_checkpoint(tmp_path / "out").scaling == read_checkpoint(tmp_path / "plain").scaling


def test_what_a_qwen_vl_does_not_have_is_refused(qwens: Path, tiny_lm: Path, tmp_path: Path) -> None:
    """M-RoPE++ for one axis or interleaved axes; an unknown pretrained length; another type with M-RoPE."""
    flags = f"--steps 0 --factor 4 -o {tmp_path}/x"
    for model in (tiny_lm, qwens / "qwen3_vl"):
        run(f"extend-lm --model {model} --rope mrope++ {flags}", code=2)
    config = json.loads((qwens / "qwen2_5_vl" / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 128_000
    shutil.copytree(qwens / "qwen2_5_vl", tmp_path / "released")
    (tmp_path / "released" / "config.json").write_text(json.dumps(config))
    refused = run(f"extend-lm --model {tmp_path}/released --rope yarn {flags}", code=3)
    assert "--original-length" in str(refused.exception) + refused.output
    save("qwen3_vl_moe", tmp_path / "moe")
    run(f"extend-lm --model {tmp_path}/moe --rope yarn {flags}", code=3)
