"""A sharded training reads, holds and saves parts of a model: the files are those of a single copy in memory."""

import filecmp
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.forks import start_ranks
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lvctx.artifacts.stored_tensors import read_rows
from lvctx.artifacts.weights import Weight, write_weight_shard
from lvctx.models import saving
from lvctx.models.loading import load_model, try_forward
from lvctx.models.lora import ATTENTION, add_lora, lora_parameters
from lvctx.models.saving import write_model
from lvctx.models.vlm_assembly import grow_embedding
from lvctx.parallel.context import joined, make_context
from lvctx.parallel.fsdp import gathering, shard_model
from lvctx.training.extend import resolve_extend
from lvctx.training.extend_config import ExtendConfig
from lvctx.training.parallel_config import ParallelConfig, RunControl
from lvctx.training.run_training import run_training
from lvctx.training.text_rows import RowLoss


class MemoryCount(TorchDispatchMode):
    """Most bytes at one time of the tensors that operations return, each memory once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is Tensor and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {place: kept for place, kept in self.alive.items() if not kept[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


def save_random(out: Path, *, tied: bool = False) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 101}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    LlamaForCausalLM(config).bfloat16().save_pretrained(out)
    return out


def changed_lora(model: Any) -> Any:
    """The model's decoder in LoRA whose product is not zero."""
    wrapped = add_lora(model.get_decoder(), rank=2, targets=ATTENTION, seed=0)
    for i, parameter in enumerate(lora_parameters(wrapped)):
        parameter.data.fill_(0.01 * (i % 7 - 3))
    return wrapped


RUNS = {"trained": False, "lora": True}
"""Name of a run: whether it is LoRA."""


def load_shard_and_save(rank: int, here: Path) -> None:
    torch.set_num_threads(1)
    with joined(here / "store", rank=rank, size=3):
        world = make_context(device="cpu", cp=1)
        for name, lora in RUNS.items():
            with MemoryCount() as count:
                model = load_model(here / f"model-{name}", device="meta").requires_grad_(not lora)
                try_forward(model, here)
                if lora:
                    changed_lora(model)
                stored = 2 * sum(p.numel() for place, p in model.named_parameters() if ".lora_" not in place)
                shard_model(RowLoss(model), model.model.layers, world)
                with gathering(model, world) as gather:
                    if gather is not None:
                        (here / name).mkdir()
                        write_model(model, here / name, dtype=torch.bfloat16, gather=gather)
            shard = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
            largest = max(p.numel() * p.element_size() for p in model.parameters())
            assert count.most <= 1.3 * (shard + largest) < (1 if lora else 2) * stored, "trained ones are float32"


def test_a_rank_holds_its_shard_and_the_result_has_the_bytes_of_one_process(tmp_path: Path) -> None:
    """Nowhere between loading and saving. Three ranks cannot share the rows evenly; one model's embedding is tied."""
    for name, lora in RUNS.items():
        save_random(tmp_path / f"model-{name}", tied=not lora)
    start_ranks(load_shard_and_save, tmp_path, ranks=3)
    for name, lora in RUNS.items():
        model = load_model(tmp_path / f"model-{name}")
        if lora:
            changed_lora(model).merge_and_unload()
        model.save_pretrained(tmp_path / "expected")
        for path in (tmp_path / "expected").iterdir():
            assert filecmp.cmp(path, tmp_path / name / path.name, shallow=False), path.name


@pytest.mark.nano
def test_new_positions_without_training_need_memory_for_one_tensor(tiny_lm: Path, tmp_path: Path) -> None:
    """`--steps 0`: the weights are copied from file to file, as they are."""
    path, out = save_random(tmp_path / "model"), tmp_path / "out"
    for file in tiny_lm.glob("tokenizer*"):
        shutil.copy(file, path)
    job = resolve_extend(ExtendConfig(model=str(path), out=out, rope_theta=5e6, context=4096, steps=0))
    with MemoryCount() as count:
        run_training(job.task(), ParallelConfig(device="cpu"), RunControl(out=out))
    stored, written = (load_file(folder / "model.safetensors") for folder in (path, out))
    assert count.most <= 1.3 * max(tensor.nbytes for tensor in stored.values())
    assert stored.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in stored.items())
    assert json.loads((out / "config.json").read_text())["rope_parameters"]["rope_theta"] == 5e6


def test_parameters_in_files_have_the_values_of_loaded_ones(tmp_path: Path) -> None:
    path = save_random(tmp_path / "model", tied=True)
    for dtype in ("auto", torch.float16):
        model, loaded = load_model(path, dtype=dtype, device="meta"), load_model(path, dtype=dtype)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        for (name, lazy), (_, real) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
            assert lazy.untyped_storage().nbytes() == 2, name
            assert torch.equal(read_rows(lazy, 0, len(lazy)), real), name
            for first, end in ((1, 3), (2, 2)):
                assert torch.equal(read_rows(lazy, first, end), real[first:end]), name
        for (name, lazy), (_, real) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
            assert torch.equal(lazy, real), name
        assert model.config.to_dict() == loaded.config.to_dict()
        assert model.generation_config.to_dict() == loaded.generation_config.to_dict()


def test_shards_and_their_index_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SHARD_SIZE", "100KB")
    model = load_model(save_random(tmp_path / "model"))
    model.save_pretrained(tmp_path / "expected", max_shard_size="100KB")
    (tmp_path / "ours").mkdir()
    write_model(model, tmp_path / "ours")
    files = sorted(path.name for path in (tmp_path / "expected").iterdir())
    assert sum("-of-" in name for name in files) > 2
    assert files == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in files:
        assert filecmp.cmp(tmp_path / "expected" / name, tmp_path / "ours" / name, shallow=False), name


def test_a_tensor_is_converted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "BLOCK", 100)
    model = load_model(save_random(tmp_path / "model"), dtype=torch.float32)
    with torch.no_grad(), MemoryCount() as count:
        write_model(model, tmp_path, dtype=torch.bfloat16, gather=Tensor.clone)
    assert count.most <= 1.1 * max(p.nbytes for p in model.parameters())
    assert filecmp.cmp(tmp_path / "model/model.safetensors", tmp_path / "model.safetensors", shallow=False)


def test_experts_that_are_merged_when_loaded_are_loaded_and_saved_whole(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 101}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model", device="meta")
    assert all(not hasattr(p, "stored") and p.is_contiguous() for p in model.parameters())
    (tmp_path / "ours").mkdir()
    write_model(model, tmp_path / "ours")
    assert filecmp.cmp(tmp_path / "model/model.safetensors", tmp_path / "ours/model.safetensors", shallow=False)


def test_a_growing_embedding_stays_in_its_file(tmp_path: Path) -> None:
    """Rows for new tokens are the mean of the stored ones, in the file or in memory; a tied head stays tied."""
    for tied in (True, False):
        path = save_random(tmp_path / f"{tied}", tied=tied)
        stored = load_file(path / "model.safetensors")
        for device in ("meta", "cpu"):
            model = load_model(path, device=device)
            grow_embedding(model, 103)
            head, embedding = model.lm_head, model.get_input_embeddings()
            assert (head.weight is embedding.weight) == tied
            assert head.out_features == embedding.num_embeddings == model.config.vocab_size == 128
            for module, name in ((embedding, "model.embed_tokens.weight"), (head, "lm_head.weight")):
                if device == "meta":
                    assert module.weight.untyped_storage().nbytes() == 2
                values = stored["model.embed_tokens.weight" if tied else name]
                mean = values.double().mean(0).bfloat16()
                grown = torch.cat([values, mean.expand(27, -1)])
                for first, end in ((0, 128), (90, 110), (101, 128), (3, 101)):
                    assert torch.equal(read_rows(module.weight, first, end), grown[first:end]), (name, first)


def test_a_tensor_that_is_written_is_freed_before_the_next_is_made(tmp_path: Path) -> None:
    made: list[weakref.ref[Any]] = []

    def make() -> Any:
        assert all(array() is None for array in made)
        array = np.zeros(8, np.uint8)
        made.append(weakref.ref(array))
        return array

    def chunks() -> Iterator[Any]:
        yield make()
        yield make()

    weights = {name: Weight(dtype="F32", shape=(4,), chunks=chunks) for name in "ab"}
    write_weight_shard(tmp_path / "model.safetensors", weights)
    assert len(made) == 4
