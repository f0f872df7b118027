"""extend-lm on mixtures of experts: losses, gradients and files are those of stock transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import generic_models
from test_ring import EXPERTS, tiny_config, tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.data.packed import PackedRows
from lvctx.parallel.context import ParallelContext
from lvctx.training import activations
from lvctx.training.activations import checkpoint_layers
from lvctx.training.memory_model import Recomputation
from lvctx.training.text_rows import RowLoss, shard_row

KINDS = {"qwen3_moe": EXPERTS, "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recomputation", [Recomputation(), Recomputation(mlp_tiles=True)])
def test_gradients_are_stocks(kind: str, recomputation: Recomputation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of router and experts too. The router's auxiliary loss, here in config.json, is not part of our loss."""
    plain, ours = tiny_model(kind, **KINDS[kind]), tiny_model(kind, **KINDS[kind], output_router_logits=True)
    ids = torch.randint(0, 101, (2, 25), generator=torch.Generator().manual_seed(0))
    expected = plain(input_ids=ids, labels=ids).loss
    expected.backward()
    monkeypatch.setattr(activations, "MLP_TILE", 4)
    checkpoint_layers(ours.model, recomputation)
    total, count = RowLoss(ours)(**shard_row(ids, ParallelContext(device="cpu"), None))
    (total / count).backward()
    assert total.item() / count == pytest.approx(expected.item(), rel=1e-6)
    of_stock = dict(plain.named_parameters())
    assert {"gate", "experts"} <= {part for name in of_stock for part in name.split(".")}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, of_stock[name].grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("kind", "lora"), [("qwen3_moe", 0), ("qwen3_moe", 4), ("mixtral", 0)])
def test_stock_loads_what_was_trained(tmp_path: Path, kind: str, lora: int) -> None:
    """An expert has its own tensors in the files, as on the hub; LoRA changes the attention alone."""
    tokenizer = generic_models.tokenizer()
    tokenizer.save_pretrained(tmp_path / "lm")
    config = tiny_config(kind, **KINDS[kind], **{"vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    run(f"pack-text {tmp_path}/text.txt --tokenizer {tmp_path}/lm --seq-len 64 --keep-short 1 -o {tmp_path}/packed")
    rows = PackedRows(tmp_path / "packed")
    ids = torch.from_numpy(np.stack([rows.row(0), rows.row(1)]).astype("int64"))
    command = f"extend-lm --model {tmp_path}/lm --data {tmp_path}/packed --rope none --dtype float32 --lora {lora}"
    run(f"{command} --steps 1 --batch-tokens 128 --lr 1e-2 -o {tmp_path}/out")
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(input_ids=ids, labels=ids).loss.item()
            for name in ("lm", "out")
        )
    assert after < before
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(before, rel=1e-5)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("lm", "out"))
    assert old.keys() == new.keys()
    assert any(".experts.3." in name for name in new)
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert any("experts" in name or "gate" in name for name in changed) is (lora == 0)
    assert any("self_attn.q_proj" in name for name in changed)


def run(command: str) -> None:
    done = CliRunner().invoke(app, [*command.split(), "-q"])
    assert done.exit_code == 0, done.output
