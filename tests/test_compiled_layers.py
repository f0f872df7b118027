"""`--compile`: compiled decoder layers against the same layers in float64, and what it refuses."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.aligning import align, draw, metrics, talk, write
from support.refusals import refused
from test_ring import tiny_model
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from lvctx.errors import MissingError, UsageError
from lvctx.models.lora import ATTENTION, add_lora
from lvctx.parallel import hf_attention
from lvctx.parallel.hf_attention import Shard
from lvctx.training import run_training
from lvctx.training.activations import checkpoint_layers
from lvctx.training.compiled_layers import check_compiler, compile_layers
from lvctx.training.memory_model import Recomputation


def has_compiler() -> bool:
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def gradients(model: Any, ids: Tensor, target: Tensor, **attention: Any) -> dict[str, Tensor]:
    model.zero_grad()
    hidden = model(input_ids=ids, use_cache=False, **attention).last_hidden_state
    (hidden * target.to(hidden.dtype)).sum().backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def largest_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert found.keys() == exact.keys()
    return max(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact if exact[name].any())


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize(
    ("kept", "offload", "lora", "documents"),
    [(2, False, False, False), (1, True, False, False), (0, False, True, True)],
)
def test_compiled_layers_are_as_near_to_float64_as_eager_ones(
    kept: int, offload: bool, lora: bool, documents: bool
) -> None:
    """And neither a row's length nor its documents compile them again: a third length adds no graph."""
    eager = tiny_model("llama", num_hidden_layers=2).model
    if lora:
        add_lora(eager.requires_grad_(False), rank=2, targets=ATTENTION, seed=0)
    compiled, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    for model in (eager, compiled, exact):
        if documents:
            hf_attention.use(model, where="tiny")
        checkpoint_layers(model, Recomputation(kept_layers=kept), offload=offload)
    names = [name for name, _ in compiled.named_parameters()]
    torch._dynamo.reset()
    counters.clear()
    compile_layers(compiled)
    assert [name for name, _ in compiled.named_parameters()] == names
    graphs = []
    for length in (24, 31, 40, 57, 66):
        torch.manual_seed(length)
        ids, target = torch.randint(0, 90, (1, length)), torch.randn(1, length, eager.config.hidden_size)
        attention = {"shard": Shard(starts=(0, 5, length // 2))} if documents else {}
        ours, plain, right = (gradients(model, ids, target, **attention) for model in (compiled, eager, exact))
        assert largest_error(ours, right) < 2 * largest_error(plain, right) < 1e-5
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[-1]


@pytest.mark.nano
@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_align_gives_the_losses_and_files_without_it(tiny_lm: Path, tiny_tower: Path, tmp_path: Path) -> None:
    """Samples of other lengths in each forward pass, and the second run in a process that has compiled before."""
    draw(tmp_path)
    rows = [talk("<image>\nWhat?", "red " * (9 - 2 * i), image=f"{i}.png") for i in range(4)]
    data = write(tmp_path / "data.json", rows)
    for name in ("eager", "compiled", "again"):
        parallel = {"dtype": "float32", "compile": name != "eager"}
        align(data, tmp_path / name, tiny_lm, tiny_tower, stage="full", lora=2, steps=2, parallel=parallel)
    eager, compiled, again = (tmp_path / name for name in ("eager", "compiled", "again"))
    for a, b in zip(metrics(eager), metrics(compiled), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["norm"] == pytest.approx(a["norm"], rel=1e-3)
    assert sorted(path.name for path in eager.iterdir()) == sorted(path.name for path in compiled.iterdir())
    assert load_file(eager / "model.safetensors").keys() == load_file(compiled / "model.safetensors").keys()
    assert metrics(compiled) == metrics(again)


@pytest.mark.nano
def test_tiles_are_refused(tiny_lm: Path, tiny_tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_training, "check_compiler", lambda device: None)
    draw(tmp_path)
    data = write(tmp_path / "data.json", [talk("<image>\nWhat?", "red", image="0.png")] * 3)
    with refused(UsageError, "--checkpoint-activations"):
        align(data, tmp_path / "out", tiny_lm, tiny_tower, checkpoint_activations="tiles", parallel={"compile": True})


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with refused(MissingError, "None"):
        check_compiler("cpu")
    with refused(UsageError, "None"):
        check_compiler("mps")
