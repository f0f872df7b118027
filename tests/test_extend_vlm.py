"""extend-lm on the language model inside a VLM, and the LoRA that it stores separately."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.mrope_models import save
from transformers import LlavaOnevisionForConditionalGeneration
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.models.loading import trained_length


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


def test_three_axes_are_for_mrope_extend(tmp_path: Path) -> None:
    qwen = save("qwen2_vl", tmp_path / "qwen")
    refused = run(f"extend-lm --model {qwen} --steps 0 -o {tmp_path}/x", code=3)
    assert "mrope-extend" in str(refused.exception) + refused.output
