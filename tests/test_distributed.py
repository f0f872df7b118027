"""Many processes, one run: sharded training, resuming at another number of ranks, signals, errors raised on all."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import warm_server
from support.forks import start_ranks
from support.refusals import refused
from test_niah import run
from test_ring import EXPERTS, reference, tiny_model
from torch import Tensor

from lvctx.artifacts.lock import only_writer
from lvctx.artifacts.manifest import Provenance
from lvctx.errors import InputError, Stopped
from lvctx.models.lora import ATTENTION, add_lora
from lvctx.parallel import hf_attention
from lvctx.parallel.context import ParallelContext, joined, make_context, propagate_errors
from lvctx.parallel.fsdp import full_tensor, gathering, shard_model
from lvctx.training.activations import checkpoint_layers
from lvctx.training.memory_model import Recomputation
from lvctx.training.parallel_config import ParallelConfig, RunControl
from lvctx.training.row_order import indices
from lvctx.training.task import ParameterGroup, TrainableModel, TrainConfig, TrainingTask
from lvctx.training.text_rows import RowLoss, shard_row
from lvctx.training.trainer import train


def row(number: int) -> Tensor:
    return torch.randint(0, 101, (1, 23), generator=torch.Generator().manual_seed(number))


def train_tiny(
    out: Path, world: ParallelContext, *, steps: int = 4, stop: tuple[int, int] | None = None, bad: int | None = None
) -> Any:
    """Three rows a step, so that two data-parallel groups cannot share them evenly; the trained model.

    `stop`: SIGTERM comes to a rank (or, alone, is raised) at its n-th row. `bad`: a row whose loss is not finite.
    """
    hf_attention.register()
    lm = tiny_model("llama", tie_word_embeddings=True)
    lm.set_attn_implementation(hf_attention.RING_ATTENTION)
    checkpoint_layers(lm.model, Recomputation(kept_layers=1), offload=True)
    row_loss = RowLoss(lm)
    shard_model(row_loss, lm.model.layers, world)
    task = TinyTask(row_loss, world, steps=steps, stop=stop, bad=bad)
    groups = [ParameterGroup(name="lm", modules=[lm], lr=1e-2)]
    train(task, groups, world, RunControl(out=out))
    return lm


class TinyTask(TrainingTask[int]):
    """See `train_tiny`."""

    provenance = Provenance(schema="tiny/1", command="tiny", config={}, inputs={})

    def __init__(
        self, row_loss: RowLoss, world: ParallelContext, *, steps: int, stop: tuple[int, int] | None, bad: int | None
    ) -> None:
        self.row_loss, self.world, self.stop, self.bad, self.calls = row_loss, world, stop, bad, 0
        self.train_config = TrainConfig(steps=steps, schedule="constant", warmup=0.0, weight_decay=0.1, save_every=1)

    def load(self, device: str) -> TrainableModel:
        raise NotImplementedError

    def build(self, trainable: TrainableModel, context: ParallelContext, parallel: ParallelConfig) -> RowLoss:
        raise NotImplementedError

    def batches(self, step: int) -> list[int]:
        return indices(step, batch=3, samples=7, seed=0)

    def loss(self, micro: int) -> tuple[Tensor, int]:
        self.calls += 1
        if self.stop == (self.world.rank, self.calls):
            if self.world.size == 1:
                raise Stopped
            os.kill(os.getpid(), signal.SIGTERM)
        total, count = self.row_loss(**shard_row(row(micro), self.world, None))
        return total * (math.inf if micro == self.bad else 1.0), count

    def describe(self, micro: int) -> str:
        return f"row {micro}"

    def save(
        self, model: Any, out: Path, metrics: Sequence[dict[str, Any]], gather: Any
    ) -> tuple[list[str], dict[str, Any]]:
        raise NotImplementedError


def metrics(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k in ("step", "loss", "tokens", "lr", "norm")} for r in rows]


def steps_saved(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoint").iterdir())


def check_resume_is_bitwise(out: Path, world: ParallelContext) -> None:
    train_tiny(out / "whole", world)
    with pytest.raises(Stopped):
        train_tiny(out / "parts", world, stop=(1, 5))
    assert "step-00000002" in steps_saved(out / "parts"), "the last finished step is saved"
    train_tiny(out / "parts", world)
    world.barrier()
    assert metrics(out / "parts") == metrics(out / "whole")
    assert steps_saved(out / "parts") == ["step-00000003", "step-00000004"], "the newest two stay"


def check_nothing_to_save_yet(out: Path, world: ParallelContext) -> None:
    with pytest.raises(Stopped):
        train_tiny(out / "early", world, stop=(0, 1))
    assert not (out / "early" / "checkpoint").exists()


def check_a_bad_loss_stops_all(out: Path, world: ParallelContext) -> None:
    """In step 0 the rows are shared as 1st and 3rd to rank 0, 2nd to rank 1."""
    rows = indices(0, batch=3, samples=7, seed=0)
    with pytest.raises(InputError, match=rf"step 0: rank 1: loss (inf|nan) on row {rows[1]}; gradient norm"):
        train_tiny(out / "bad", world, bad=rows[1])
    assert metrics(out / "bad") == []


def fail_or_wait(world: ParallelContext) -> None:
    if world.rank == 1:
        raise InputError("no such shard", where="packed")
    world.barrier()


def check_an_error_is_told(world: ParallelContext) -> None:
    """Rank 1 fails and goes away, rank 0 waits for it: both end at once with the error of rank 1."""
    began = time.monotonic()
    with pytest.raises(InputError, match="packed: no such shard") as caught, propagate_errors():
        fail_or_wait(world)
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith("rank 1: ") == (world.rank == 0)
    assert time.monotonic() - began < 30


def two(rank: int, out: Path) -> None:
    torch.set_num_threads(1)
    with joined(out / "store2", rank=rank, size=2):
        world = make_context(device="cpu", cp=1)
        check_resume_is_bitwise(out, world)
        check_nothing_to_save_yet(out, world)
        check_a_bad_loss_stops_all(out, world)
        with pytest.raises(Stopped):
            train_tiny(out / "handed", make_context(device="cpu", cp=2), stop=(0, 4))
        check_an_error_is_told(world)


def check_sharded_gradients(world: ParallelContext, lm: Any) -> None:
    """FSDP over 2 x 2 in float32: the mean over ranks, times ranks, is stock transformers' gradient."""
    hf_attention.register()
    ids = torch.cat([row(10 + i) for i in range(2)])
    expected = [reference(lm, one[None], one[None], None)[1] for one in ids]
    lm.set_attn_implementation(hf_attention.RING_ATTENTION)
    lm.zero_grad(set_to_none=True)
    row_loss = RowLoss(lm)
    shard_model(row_loss, lm.model.layers, replace(world, compute_dtype=torch.float32))
    total, _ = row_loss(**shard_row(ids[world.dp_rank][None], world, None))
    total.backward()
    for name, p in lm.named_parameters():
        truth = expected[0][name] + expected[1][name]
        assert (full_tensor(p.grad) * world.size - truth).norm() / truth.norm() < 1e-5, name


def check_lora_comes_back_whole(world: ParallelContext) -> None:
    """LoRA sharded, changed on every rank, and gathered on rank 0."""

    def make() -> Any:
        return add_lora(tiny_model("llama").bfloat16(), rank=4, targets=ATTENTION, seed=0)

    model, twin = make(), make()
    lm = model.get_base_model()
    hf_attention.register()
    lm.set_attn_implementation(hf_attention.RING_ATTENTION)
    row_loss = RowLoss(lm)
    shard_model(row_loss, lm.model.layers, world, offload=True)
    total, _ = row_loss(**shard_row(row(0), world, None))
    total.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    with torch.no_grad():
        for p in trained:
            p += 1
    with gathering(model, world) as gather:
        assert (gather is None) == (world.rank > 0)
        if gather is not None:
            full = {name: gather(p) for name, p in model.named_parameters()}
            for name, p in twin.named_parameters():
                assert torch.equal(full[name], p + p.requires_grad), name


def four(rank: int, out: Path) -> None:
    torch.set_num_threads(1)
    with joined(out / "store4", rank=rank, size=4):
        world = make_context(device="cpu", cp=2)
        check_sharded_gradients(world, tiny_model("qwen2", tie_word_embeddings=True))
        check_sharded_gradients(world, tiny_model("qwen3_moe", **EXPERTS))
        check_lora_comes_back_whole(world)
        train_tiny(out / "handed", world, steps=4)


def test_ranks_train_stop_resume_and_fail_together(tmp_path: Path) -> None:
    """One run handed from 1 process to 2 to 4 and back to 1, beside one that stays where it is."""
    alone = ParallelContext(device="cpu")
    train_tiny(tmp_path / "alone", alone, steps=5)
    with pytest.raises(Stopped):
        train_tiny(tmp_path / "handed", alone, stop=(0, 5))
    start_ranks(two, tmp_path, ranks=2)
    start_ranks(four, tmp_path, ranks=4)
    train_tiny(tmp_path / "handed", alone, steps=5)
    handed, stayed = metrics(tmp_path / "handed"), metrics(tmp_path / "alone")
    assert [r["step"] for r in handed] == [1, 2, 3, 4, 5]
    for a, b in zip(handed, stayed, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3), "bfloat16 alone may differ"
    for a, b in zip(metrics(tmp_path / "whole"), stayed, strict=False):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


def test_an_output_has_one_writer_and_its_lock_dies_with_it(tmp_path: Path) -> None:
    script = f"""
import sys, time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from lvctx.artifacts.lock import only_writer
with only_writer(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    with refused(InputError, tmp_path.name), only_writer(tmp_path):
        pass
    child.kill()
    child.communicate()
    with only_writer(tmp_path), pytest.raises(InputError), only_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
LVCTX = ["-m", "lvctx"]


@pytest.fixture(scope="module")
def packed(tiny_lm: Path, nano: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "p"
    flags = ["--tokenizer", tiny_lm, "--seq-len", 101, "--keep-short", 1, "--separator", "<|endoftext|>", "-o", out]
    done = run("pack-text", nano.essays / "love.txt", nano.essays / "avg.txt", *flags)
    assert done.exit_code == 0, done.stderr
    return out


def extend(launcher: list[str], lm: Path, packed: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    given = ["--model", lm, "--data", packed, "--rope-theta", 5e4, "--steps", 2, "--batch-tokens", 202, "--lr", 1e-3]
    command = [*launcher, "extend-lm", *map(str, [*given, "-o", out, *more])]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def extend_on_two_nodes(*given: Any) -> subprocess.CompletedProcess[str]:
    """The command of both nodes as docs/scaling.md starts it, on this machine; all that both print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free.getsockname()[1]}"]
    node = [*TORCHRUN[:-1], "1", "--nnodes", "2", "--rdzv-id", "two", *rendezvous, *LVCTX]
    with ThreadPoolExecutor(2) as nodes:
        first, second = nodes.map(lambda _: extend(node, *given), range(2))
    texts = first.stdout + second.stdout, first.stderr + second.stderr
    return subprocess.CompletedProcess(node, first.returncode or second.returncode, *texts)


@pytest.mark.nano
def test_extend_lm_under_torchrun(tiny_lm: Path, packed: Path, tmp_path: Path) -> None:
    """The real command on two nodes that share rows of an odd length with documents, and on one process."""
    alone = [str(warm_server.start())]
    one = extend(alone, tiny_lm, packed, tmp_path / "one", "--doc-mask")
    assert one.returncode == 0, one.stderr
    both = extend_on_two_nodes(tiny_lm, packed, tmp_path / "two", "--doc-mask", "--cp", 2)
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("\n") == 1, "one rank speaks"
    assert json.loads(both.stdout)["doc_mask"] is True
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert not (tmp_path / "two" / "checkpoint").exists()
    again = extend(warm_server.torchrun(2), tiny_lm, packed, tmp_path / "two", "--doc-mask", "--cp", 2)
    assert again.stdout == both.stdout, "a finished run is done"
    wrong = extend(alone, tiny_lm, packed, tmp_path / "x", "--cp", 2)
    assert wrong.returncode == 2
    assert "--cp 2 does not divide the run's 1 process" in wrong.stderr


@pytest.mark.nano
@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_the_run_continues(tiny_lm: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    given = ["--model", tiny_lm, "--data", packed, "--steps", 60, "--batch-tokens", 202, "-o", out]
    command = [*TORCHRUN, *LVCTX, "extend-lm", *map(str, given), "--cp", "2", "--cp-kind", "ulysses"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.terminate()
    _, said = child.communicate(timeout=60)
    assert "run the same command again" in said
    assert steps_saved(out)[-1] >= "step-00000003"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in metrics(out)] == list(range(1, 61))
