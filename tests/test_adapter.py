"""The adapter beside merged weights: stock PEFT reads it, and no other file in the directory disturbs a runtime."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import aligning
from support.aligning import draw, talk, write
from transformers import AutoModelForCausalLM, LlavaOnevisionForConditionalGeneration
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.errors import InputError
from lvctx.models.adapter import load_adapter
from lvctx.models.loading import load_model
from lvctx.models.lora import ATTENTION, add_lora


@pytest.fixture(scope="module")
def packed(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("text")
    (out / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    run(f"pack-text {out}/text.txt --tokenizer {tiny_lm} --seq-len 64 --keep-short 1 -o {out}/packed")
    return out / "packed"


def run(command: str, *, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [*command.split(), "-q"])
    assert done.exit_code == code, done.output
    return done


def test_peft_puts_the_lora_of_extend_lm_on_its_model(tiny_lm: Path, packed: Path, tmp_path: Path) -> None:
    """The base with the same positions and PEFT's own merge give the weights that extend-lm wrote."""
    command = f"extend-lm --model {tiny_lm} --rope yarn --factor 4 --lora 4"
    run(f"{command} --data {packed} --steps 2 --batch-tokens 64 --lr 1e-2 -o {tmp_path}/trained")
    run(f"extend-lm --model {tiny_lm} --rope yarn --factor 4 --steps 0 -o {tmp_path}/base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, tmp_path / "trained" / "adapter").merge_and_unload().state_dict()
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").state_dict()
    assert merged.keys() == want.keys()
    assert any(not torch.equal(plain[name], want[name]) for name in want)
    for name in want:  # the adapter is kept in bfloat16
        torch.testing.assert_close(merged[name], want[name], rtol=2**-7, atol=1e-4)


def test_peft_puts_lora_and_projector_of_align_on_its_model(tmp_path: Path, tiny_lm: Path, tiny_tower: Path) -> None:
    """On the VLM as it was assembled; the tower, whose projections have the same names, stays as it was."""
    draw(tmp_path)
    rows = [talk("<image>\nWhat color?", ["red", "blue"][i % 2], image=f"{i}.png") for i in range(4)]
    data = write(tmp_path / "data.json", rows)
    still = {"lr": 1e-30, "projector_lr": 1e-30, "steps": 1}
    aligning.align(data, tmp_path / "base", tiny_lm, tiny_tower, stage="full", lora=4, **still)
    aligning.align(data, tmp_path / "trained", tiny_lm, tiny_tower, stage="full", lora=4, lr=1e-2)
    base, want = (LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / n) for n in ("base", "trained"))
    adapted = PeftModel.from_pretrained(base, tmp_path / "trained" / "adapter")
    assert not any("lora" in name and "vision_tower" in name for name, _ in adapted.named_parameters())
    merged = adapted.merge_and_unload().state_dict()
    for name, tensor in want.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=2**-7, atol=1e-4)


def test_an_adapter_with_another_scale_or_other_tensors_is_refused(tiny_lm: Path, packed: Path, tmp_path: Path) -> None:
    command = f"extend-lm --model {tiny_lm} --rope yarn --factor 4 --lora 4"
    run(f"{command} --data {packed} --steps 1 --batch-tokens 64 -o {tmp_path}/trained")
    adapter = tmp_path / "trained" / "adapter"
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    refused = run(f"{command} --steps 0 --adapter {adapter} -o {tmp_path}/x", code=3)
    assert "lora_alpha" in str(refused.exception) + refused.output
    config.write_text("[]")
    run(f"{command} --steps 0 --adapter {adapter} -o {tmp_path}/x", code=3)
    config.unlink()
    run(f"{command} --steps 0 --adapter {adapter} -o {tmp_path}/x", code=3)
    model = load_model(tiny_lm)
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError):
        load_adapter(tmp_path / "other.safetensors", model, add_lora(model.model, rank=4, targets=ATTENTION, seed=0))
    assert load_file(adapter / "adapter_model.safetensors")
