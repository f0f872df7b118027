"""extend-lm on models whose layers differ in RoPE: full attention is scaled, sliding windows stay (Gemma 3)."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import generic_models
from test_positions import by_hand
from test_ring import tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.data.packed import PackedRows
from lvctx.errors import InputError
from lvctx.inference.prefix_scorer import PrefixScorer
from lvctx.models.loading import load_model
from lvctx.rope.scaling import resolve_scaling
from lvctx.rope.spec import RopeSpec
from lvctx.training.text_rows import RowLoss

CONTEXT, WINDOW, HEAD = 4096, 16, 32
"""Of the tiny model in `support.generic_models`."""


def run(command: str, *, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [*command.split(), "-q"])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vlm`, a tiny Gemma 3; `lm`, its language model alone; `packed`, rows of 64 tokens: four windows."""
    folder = tmp_path_factory.mktemp("gemma")
    vlm = AutoModelForImageTextToText.from_pretrained(generic_models.save("gemma3", folder / "vlm"))
    lm = AutoModelForCausalLM.from_config(vlm.config.text_config)
    lm.model.load_state_dict(vlm.model.language_model.state_dict())
    lm.save_pretrained(folder / "lm")
    for path in (folder / "vlm").glob("tokenizer*"):
        (folder / "lm" / path.name).write_bytes(path.read_bytes())
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 6)
    run(f"pack-text {folder}/text.txt --tokenizer {folder}/lm --seq-len 64 --keep-short 1 -o {folder}/packed")
    return folder


@pytest.mark.parametrize("kind", ["lm", "vlm"])
@pytest.mark.parametrize(
    ("options", "formula", "spec"),
    [
        ("theta --rope-theta 5e6", "theta", {"theta": 5e6}),
        ("pi --factor 4", "pi", {"theta": 1e6, "factor": 4.0}),
        ("ntk --factor 4", "ntk", {"theta": 1e6, "factor": 4.0}),
        ("yarn --factor 4", "yarn", {"theta": 1e6, "factor": 4.0, "original": CONTEXT}),
    ],
)
def test_full_attention_is_scaled_and_windows_are_not(
    gemma: Path, tmp_path: Path, kind: str, options: str, formula: str, spec: dict[str, Any]
) -> None:
    run(f"extend-lm --model {gemma}/{kind} --rope {options} --steps 0 -o {tmp_path}/out")
    auto = AutoModelForCausalLM if kind == "lm" else AutoModelForImageTextToText
    rotary = auto.from_pretrained(tmp_path / "out").get_decoder().rotary_emb
    positions = torch.arange(0, 300, 7)[None]
    plain = RopeSpec(head_dim=HEAD, theta=1e4)
    for layers, scheme, one in (
        ("full_attention", formula, RopeSpec(head_dim=HEAD, **spec)),
        ("sliding_attention", "theta", plain),
    ):
        frequencies = torch.tensor([by_hand(scheme, one, i) for i in range(HEAD // 2)], dtype=torch.float64)
        angles = (positions[..., None] * frequencies).repeat(1, 1, 2)
        scale = 0.1 * np.log(4) + 1 if scheme == "yarn" else 1.0
        for ours, exact in zip(rotary(torch.zeros(1), positions, layers), (angles.cos(), angles.sin()), strict=True):
            torch.testing.assert_close(ours.double(), scale * exact, rtol=0, atol=1e-4)
    assert not [name for name in ("vllm.json", "sglang", "llama.cpp.txt") if (tmp_path / "out" / name).exists()]


@pytest.mark.parametrize(("kind", "lora"), [("lm", 0), ("vlm", 4)])
def test_training_starts_from_stocks_loss(gemma: Path, tmp_path: Path, kind: str, lora: int) -> None:
    """The mean over all rows of stock's own forward with the new positions, windows included."""
    rows = PackedRows(gemma / "packed")
    command = f"extend-lm --model {gemma}/{kind} --rope yarn --factor 4 --lora {lora} --dtype float32"
    run(f"{command} --data {gemma}/packed --steps 1 --batch-tokens {64 * len(rows)} --lr 1e-2 -o {tmp_path}/out")
    run(f"{command.replace(f' --lora {lora} --dtype float32', '')} --steps 0 -o {tmp_path}/plain")
    auto = AutoModelForCausalLM if kind == "lm" else AutoModelForImageTextToText
    stock, ids = auto.from_pretrained(tmp_path / "plain"), torch.tensor(np.stack([*map(rows.row, range(len(rows)))]))
    with torch.no_grad():
        expected = stock(input_ids=ids.long(), labels=ids.long()).loss.item()
        trained = auto.from_pretrained(tmp_path / "out")(input_ids=ids.long(), labels=ids.long()).loss.item()
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert trained < expected


def test_a_shared_prefix_gives_stocks_scores(gemma: Path) -> None:
    """Sequences that share more and less than a window, longer and shorter than it, in chunks that cut it."""
    stock, scorer = load_model(gemma / "lm"), PrefixScorer(load_model(gemma / "lm"), chunk=10)
    ids = np.random.default_rng(0).integers(0, 256, (4, 70))
    for row, shared, length in ((1, 50, 70), (2, 12, 33), (3, 60, 61)):
        ids[row, :shared] = ids[0, :shared]
        tokens = torch.from_numpy(ids[row, :length])[None]
        with torch.no_grad():
            logits = stock(input_ids=tokens).logits[0, -4:-1]
        expected = -F.cross_entropy(logits, tokens[0, -3:], reduction="sum").item()
        scorer.score(ids[0], 3)
        assert scorer.score(ids[row, :length], 3).log_prob == pytest.approx(expected, rel=1e-4)


def test_moved_parts_of_a_row_do_not_fit_a_window(gemma: Path, tmp_path: Path) -> None:
    """A window is counted in tokens: it would hold tokens from both sides of a jump in the positions."""
    command = f"extend-lm --model {gemma}/lm --data {gemma}/packed --steps 1 --batch-tokens 64 -o {tmp_path}/x"
    run(f"{command} --pose --context 8192", code=3)


def test_positions_that_no_scheme_describes_are_refused() -> None:
    """Layers without one of full attention, and Gemma 4's, which rotate a part of each head in proportion."""
    sliding = {"sliding_attention": {"rope_theta": 1e4}}
    config = SimpleNamespace(rope_parameters=sliding, max_position_embeddings=CONTEXT, head_dim=HEAD)
    with pytest.raises(InputError, match="layer to layer"):
        resolve_scaling(config, scheme="theta", theta=None, factor=None, context=None, seq_len=0)
    proportional = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    config.rope_parameters = {"full_attention": proportional, **sliding}
    for scheme in ("theta", "yarn"):
        with pytest.raises(InputError, match="proportional"):
            resolve_scaling(config, scheme=scheme, theta=None, factor=None, context=8192, seq_len=0)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("gemma3_text", {"final_logit_softcapping": 30.0, "sliding_window": 16}),
        ("cohere", {}),
        ("granite", {"logits_scaling": 8.0}),
    ],
)
def test_a_loss_that_would_not_be_stocks_is_refused(kind: str, changed: dict[str, Any]) -> None:
    """Capped logits; Cohere and Granite scale theirs."""
    with pytest.raises(InputError, match="logit"):
        RowLoss(tiny_model(kind, **changed))
