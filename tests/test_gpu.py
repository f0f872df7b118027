"""What a CUDA device has to agree on with the CPU. Skipped, with the reason, where there is none: `make test-gpu`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.aligning import align, draw, metrics, talk, write
from test_distributed import extend, packed
from test_mrope_train import here
from test_niah import encode, essays, results, run
from torch import Tensor

from lvctx.cost import CostMeter
from lvctx.inference.engine_config import CachePlacement
from lvctx.inference.prefill_chunk import token_bytes
from lvctx.inference.prefix_scorer import PrefixScorer
from lvctx.models.loading import load_model
from lvctx.models.loss import shift_labels, token_loss
from lvctx.parallel import hf_attention
from lvctx.parallel.block_attention import FlashCUDA, Plain
from lvctx.parallel.ring_attention import ALONE, ring_attention
from lvctx.parallel.striped_attention import STRIPED_ATTENTION

CUDA = os.environ.get("LVCTX_TEST_DEVICE", "cuda")
"""Another device tries the tests themselves where there is no GPU."""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.nano,
    pytest.mark.skipif(CUDA == "cuda" and not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
__all__ = ["essays", "here", "packed"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]


@pytest.fixture(scope="module")
def half_lm(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny language model in bfloat16, which flash kernels take."""
    from lvctx.models.loading import load_tokenizer

    out = tmp_path_factory.mktemp("half_lm")
    load_model(tiny_lm, dtype=torch.bfloat16).save_pretrained(out)
    load_tokenizer(tiny_lm).save_pretrained(out)
    return out


# --- kernels


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(70, 70, True), (128, 300, False), (1, 513, False), (1, 1, True)]
)
@pytest.mark.parametrize("heads", [(4, 4), (9, 3)])
def test_the_flash_kernel_computes_a_block(queries: int, keys: int, causal: bool, heads: tuple[int, int]) -> None:
    """Output, log-sum-exp and gradients against matrix products in float64 of the same bfloat16 inputs."""
    q, grad = (draws(2, heads[0], queries, 64, seed=s) for s in (0, 1))
    k, v = (draws(2, heads[1], keys, 64, seed=s) for s in (2, 3))
    how: dict[str, Any] = {"causal": causal, "scale": 0.2}
    out, lse = FlashCUDA().forward(*(x.to(CUDA) for x in (q, k, v)), **how)
    wanted, wanted_lse = Plain().forward(q.double(), k.double(), v.double(), **how)
    torch.testing.assert_close(out.cpu().double(), wanted, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.cpu().double(), wanted_lse.double(), rtol=1e-3, atol=1e-3)
    found = FlashCUDA().backward(*(x.to(CUDA) for x in (grad, q, k, v)), out, lse, **how)
    true = Plain().backward(grad.double(), q.double(), k.double(), v.double(), wanted, wanted_lse, **how)
    for mine, theirs in zip(found, true, strict=True):
        # Of one key alone queries and keys have no gradient: what is left there is rounding.
        assert float((mine.cpu().double() - theirs).norm()) < 1e-2 * max(float(theirs.norm()), 1.0)


def test_a_row_of_documents_and_its_gradients() -> None:
    starts = (0, 33, 34, 100)
    inputs = [draws(1, heads, 150, 64, seed=heads + i) for i, heads in enumerate((6, 2, 2))]
    found = []
    for device, kernel in (("cpu", Plain()), (CUDA, FlashCUDA())):
        mine = [x.to(device).detach().requires_grad_() for x in inputs]
        out = ring_attention(*mine, ring=ALONE, kernel=kernel, scale=0.125, starts=starts)
        out.backward(draws(*out.shape, seed=9).to(device))
        found.append([out.detach().cpu().float(), *(x.grad.cpu().float() for x in mine if x.grad is not None)])
    for theirs, ours in zip(*found, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-2


# --- reading


@pytest.mark.parametrize("kv_cache", ["device", "host", "int8"])
def test_needles_score_the_same(half_lm: Path, kv_cache: CachePlacement) -> None:
    """Chunks, a shared beginning and one key head for two query heads, wherever the cache lives."""
    rng = np.random.default_rng(0)
    head = rng.integers(0, 1000, 200)
    sequences = [np.concatenate([head, rng.integers(0, 1000, 40)]) for _ in range(2)]
    models = [load_model(half_lm, device=d) for d in ("cpu", CUDA)]
    scorers = [PrefixScorer(model, chunk=64, kv_cache=kv_cache) for model in models]
    assert models[1].config._attn_implementation == STRIPED_ATTENTION, "by kernels that need no mask"
    for ids in sequences:
        here, there = (scorer.score(ids, 5, generate=3) for scorer in scorers)
        assert there.log_prob == pytest.approx(here.log_prob, rel=1e-2)
        assert there.forced == here.forced


def test_single_precision_needles_score_the_same(tiny_lm: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 1000, 200)
    here, there = (PrefixScorer(load_model(tiny_lm, device=d), chunk=64).score(ids, 5) for d in ("cpu", CUDA))
    assert there.log_prob == pytest.approx(here.log_prob, abs=1e-2)
    assert there.forced == here.forced


@torch.inference_mode()
def test_a_prompt_is_computed_in_chunks_for_the_free_memory(half_lm: Path) -> None:
    """The longest ones for a tiny model; the difference of two chunks' peaks is at most what was counted for it."""
    scorer = PrefixScorer(load_model(half_lm, device=CUDA))
    assert scorer.chunk == 32_768
    ids_1L = np.zeros((1, 16_384), dtype=np.int64)
    scorer._run(scorer._prefix, ids_1L, keep=1)  # the cache gets its size
    peaks = []
    for scorer.chunk in (4096, 8192):
        scorer._crop(0)
        torch.cuda.reset_peak_memory_stats()
        scorer._run(scorer._prefix, ids_1L, keep=1)
        peaks.append(torch.cuda.max_memory_allocated())
    counted = token_bytes(scorer.lm.config, 2)
    assert counted is not None
    assert peaks[1] - peaks[0] < 1.1 * 4096 * counted


def test_peak_memory_is_that_of_the_sample() -> None:
    meter = CostMeter()
    kept = torch.empty(1 << 20, dtype=torch.uint8, device=CUDA)
    meter.take()
    with meter.phase("encode"):
        torch.empty(64 << 20, dtype=torch.uint8, device=CUDA)
    peaks = [meter.take()["cost"]["peak_memory_bytes"] for _ in range(2)]
    assert peaks[0] - peaks[1] == 64 << 20
    assert peaks[1] >= kept.numel()


def twice(command: Callable[[str, Path], Any], tmp_path: Path) -> Iterator[Path]:
    """Where a command wrote on the CPU, and where on the GPU."""
    for device in ("cpu", CUDA):
        done = command(device, tmp_path / f"on-{device}")
        assert done.exit_code == 0, done.output
        yield tmp_path / f"on-{device}"


def test_both_niahs(tiny_lm: Path, tiny_vlm: Path, essays: Path, tmp_path: Path) -> None:
    from lvctx.models.vision_encoder import load_tower

    frames = encode(load_tower(tiny_vlm, dtype=None), tmp_path / "a.frames.safetensors")
    grids = {
        "text": ("--model", tiny_lm, "--haystack", essays, "--lengths", "130,200"),
        "video": ("--model", tiny_vlm, "--haystack", frames, "--lengths", "4,10"),
    }
    for name, grid in grids.items():

        def ask(device: str, out: Path, name: str = name, grid: tuple[object, ...] = grid) -> Any:
            return run("niah", name, *grid, "--depths", "0,0.5,1", "--trials", 2, "--device", device, "-o", out)

        here, there = (results(out) for out in twice(ask, tmp_path / name))
        for a, b in zip(here, there, strict=True):
            assert (a["key"], a["correct"]) == (b["key"], b["correct"])
            assert b["log_prob"] == pytest.approx(a["log_prob"], rel=1e-2)


def test_frames_and_answers(loud_vlm: Path, nano: Any, tmp_path: Path) -> None:
    from lvctx.vlm.feature_cache import read_feature_cache

    def see(device: str, out: Path) -> Any:
        clip = nano.clips / "bikes.mp4"
        return run("encode-video", clip, "--model", loud_vlm, "--frames", 6, "--device", device, "-o", out)

    here, there = (read_feature_cache(out / "bikes.frames.safetensors").features for out in twice(see, tmp_path))
    torch.testing.assert_close(there, here, rtol=2e-2, atol=2e-2)

    def answer(device: str) -> list[str]:
        frames = tmp_path / "on-cpu" / "bikes.frames.safetensors"
        done = run("vqa", frames, "--model", loud_vlm, "--ask", "What?", "--max-new-tokens", 5, "--device", device)
        assert done.exit_code == 0, done.output
        return [json.loads(line)["answer"] for line in done.stdout.splitlines()]

    assert answer(CUDA) == answer("cpu")


# --- training


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in metrics(out)]


def test_loss_and_gradients_agree(tiny_lm: Path) -> None:
    ids = torch.randint(0, 1000, (1, 200), generator=torch.Generator().manual_seed(0))
    gradients = []
    for device in ("cpu", CUDA):
        model = load_model(tiny_lm, device=device)
        hidden = model.model(input_ids=ids.to(device), use_cache=False).last_hidden_state
        total, _ = token_loss(hidden[0], model.lm_head.weight, shift_labels(ids.to(device))[0])
        total.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.cpu())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "flags",
    [(), ("--lora", 4, "--pose"), ("--doc-mask",), ("--offload-activations",)],
    ids=lambda flags: " ".join(map(str, flags)) or "full",
)
def test_extend_lm_trains_the_same(tiny_lm: Path, packed: Path, tmp_path: Path, flags: tuple[object, ...]) -> None:
    def learn(device: str, out: Path) -> Any:
        given = ("--model", tiny_lm, "--data", packed, "--rope-theta", 5e4, "--context", 1024, "--steps", 3)
        rate = ("--batch-tokens", 202, "--lr", 1e-3)
        return run("extend-lm", *given, *rate, *flags, "--device", device, "-o", out)

    here, there = (losses(out) for out in twice(learn, tmp_path))
    assert there == pytest.approx(here, rel=5e-3)
    assert here[0] != here[-1]


def test_extend_lm_under_torchrun(tiny_lm: Path, packed: Path, tmp_path: Path) -> None:
    """NCCL, sharded parameters that live in host memory, and our ring on flash kernels, with one rank."""
    alone = extend([sys.executable], tiny_lm, packed, tmp_path / "cpu", "--doc-mask")
    assert alone.returncode == 0, alone.stderr
    done = extend(
        [sys.executable, *TORCHRUN], tiny_lm, packed, tmp_path / "gpu", "--doc-mask", "--offload", "--device", CUDA
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=5e-3)


@pytest.mark.parametrize(
    "flags", [{"stage": "projector"}, {"stage": "full", "lora": 2}, {"stage": "full", "lora": 2, "pose": True}], ids=str
)
def test_align_trains_the_same(tiny_lm: Path, tiny_tower: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    """Sequences of one row kept apart by transformers' mask, or where positions jump by our kernels."""
    draw(tmp_path)
    rows = [talk("<image>What?", f"a {i} thing", image=f"{i}.png") for i in range(4)]
    data = write(tmp_path / "data.json", rows)
    for device in ("cpu", CUDA):
        align(data, tmp_path / f"on-{device}", tiny_lm, tiny_tower, device=device, **flags)
    here, there = (losses(tmp_path / f"on-{device}") for device in ("cpu", CUDA))
    assert there == pytest.approx(here, rel=1e-2)


def test_align_dpo_trains_the_same(tiny_vlm: Path, tmp_path: Path) -> None:
    draw(tmp_path)
    rows = [{"prompt": "<image>What?", "chosen": f"a {i}", "rejected": "no", "image": f"{i}.png"} for i in range(4)]
    data = write(tmp_path / "data.json", rows)
    for device in ("cpu", CUDA):
        out = tmp_path / f"on-{device}"
        align(data, out, None, None, stage="dpo", init=str(tiny_vlm), lora=2, beta=0.1, device=device)
    here, there = (losses(tmp_path / f"on-{device}") for device in ("cpu", CUDA))
    assert there == pytest.approx(here, rel=1e-2)


def test_mrope_extend_trains_the_same(here: Path, tmp_path: Path) -> None:
    def learn(device: str, out: Path) -> Any:
        flags = ("--model", here / "model", "--scale", 2, "--media", here, "--data", here / "chat", "--steps", 2)
        return run("mrope-extend", *flags, "--device", device, "-o", out)

    first, second = (losses(out) for out in twice(learn, tmp_path))
    assert second == pytest.approx(first, rel=1e-2)


# --- what stands on both


def test_doctor_compares_on_it(tiny_lm: Path) -> None:
    given = ["-m", "lvctx", "doctor", "--model", str(tiny_lm), "--cp", "1", "--length", "65", "--device", CUDA]
    done = subprocess.run([sys.executable, *TORCHRUN, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_plain_forward_uses_torchs_own_attention(half_lm: Path) -> None:
    """`lvctx_ring` without documents, one rank: causal attention as SDPA's."""
    ids = torch.randint(0, 1000, (1, 64), generator=torch.Generator().manual_seed(0)).to(CUDA)
    model = load_model(half_lm, device=CUDA)
    stock = model(ids).logits
    hf_attention.use(model.model, where=half_lm)
    torch.testing.assert_close(model(ids).logits, stock, rtol=2e-2, atol=2e-2)
