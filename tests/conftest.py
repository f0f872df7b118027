"""Fixtures: the nano assets (a real small language model, essays, clips) and tiny random models for unit tests."""

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("lvctx", deadline=None)
hypothesis.settings.load_profile("lvctx")

ROOT = Path(__file__).resolve().parent.parent
TINY_VOCABULARY = 8192
"""Tokens of the tiny language model: one of 49,152 takes a third of a second wherever it is loaded."""

# What is imported lives to the end. Looking for garbage in it, again and again, took a fifth of the time.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def freeze_what_a_module_imported() -> Iterator[None]:
    yield
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Nano:
    """The real small inputs of the demo."""

    lm: Path
    essays: Path
    clips: Path


@pytest.fixture(scope="session")
def nano() -> Nano:
    """SmolLM2-135M-Instruct, essays and clips, fetched once into `.cache/nano`."""
    base = ROOT / ".cache" / "nano"
    subprocess.run([sys.executable, ROOT / "recipes" / "nano" / "fetch.py", "-o", base], check=True)
    return Nano(lm=base / "lm", essays=base / "essays", clips=base / "clips")


@pytest.fixture(scope="session")
def tiny_lm(nano: Nano, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with grouped-query attention and 8,192 tokens of SmolLM2: for unit tests only."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp("tiny_lm")
    AutoTokenizer.from_pretrained(nano.lm).save_pretrained(out)
    stored = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = {token: i for token, i in stored["model"]["vocab"].items() if i < TINY_VOCABULARY}
    merges = [pair for pair in stored["model"]["merges"] if "".join(pair) in vocabulary]
    stored["model"] |= {"vocab": vocabulary, "merges": merges}
    (out / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(out)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every forward pass of `extend-lm` in this test."""
    from lvctx.training.text_rows import RowLoss

    counts: list[int] = []
    forward = RowLoss.forward

    def counted(self: RowLoss, ids: Any, *more: Any, **named: Any) -> Any:
        counts.append(len(ids))
        return forward(self, ids, *more, **named)

    monkeypatch.setattr(RowLoss, "forward", counted)
    return counts


@pytest.fixture(scope="session")
def tiny_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer CLIP tower of 48 px and patch 12: 16 features, 4 tokens a frame."""
    return save_tower(tmp_path_factory.mktemp("tiny_tower"))


def save_tower(out: Path) -> Path:
    """Write that tower."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=12
    )
    CLIPVisionModel(config).save_pretrained(out)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 48},
        "crop_size": {"height": 48, "width": 48},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return out


@pytest.fixture(scope="session")
def tiny_vlm(tiny_lm: Path, tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two and a random projector: a VLM that says nothing of sense, and hardly two things."""
    from lvctx.models.loading import load_model

    return save_tiny_vlm(load_model(tiny_lm), tiny_lm, tiny_tower, tmp_path_factory.mktemp("tiny_vlm"))


@pytest.fixture(scope="session")
def loud_vlm(tiny_lm: Path, tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose answers differ, as its weights are ten times the usual, and that reads 2,048 positions."""
    import torch

    from lvctx.models.loading import load_model

    lm = load_model(tiny_lm)
    lm.config.max_position_embeddings = 2048
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lm.model.layers.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return save_tiny_vlm(lm, tiny_lm, tiny_tower, tmp_path_factory.mktemp("loud_vlm"))


def save_tiny_vlm(lm: Any, tiny_lm: Path, tiny_tower: Path, out: Path) -> Path:
    """Write a language model with the tiny tower and a random projector in front."""
    from transformers import CLIPVisionModel

    from lvctx.models.loading import load_tokenizer
    from lvctx.models.vlm_assembly import assemble, save_vlm

    tokenizer, tower = load_tokenizer(tiny_lm), CLIPVisionModel.from_pretrained(tiny_tower).eval()
    save_vlm(assemble(lm, tower, tokenizer, where=tiny_lm, seed=0), tokenizer, tiny_tower, out)
    return out


@pytest.fixture(scope="session")
def small_inputs(
    nano: Nano, tiny_lm: Path, tiny_tower: Path, tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder in which the commands of `support.small_commands` run."""
    from support.small_commands import prepare

    folder = tmp_path_factory.mktemp("small_inputs")
    prepare(folder, tiny_lm, tiny_tower, tiny_vlm, nano.essays)
    return folder
