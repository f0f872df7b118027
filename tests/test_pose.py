"""Positional skip-wise training: the positions of a short row, whose two parts still attend to each other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ring import reference, tiny_model
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.parallel.context import ParallelContext
from lvctx.rope.pose import skipped
from lvctx.training.text_rows import RowLoss, shard_row


@given(st.integers(1, 80), st.integers(0, 300), st.integers(0, 99))
def test_positions_count_up_with_one_jump_inside_the_context(length: int, more: int, seed: int) -> None:
    positions = skipped(length, length + more, np.random.default_rng(seed))
    steps = np.diff(positions)
    assert positions[0] == 0
    assert positions[-1] < length + more
    assert (steps >= 1).all()
    assert (steps > 1).sum() <= 1


def test_every_cut_and_every_skip_is_drawn() -> None:
    """Rows of 4 in a context of 7: 3 cuts times 4 skips, all of them equally often (a skip of 0 hides its cut)."""
    rng = np.random.default_rng(0)
    drawn = [tuple(skipped(4, 7, rng).tolist()) for _ in range(2400)]
    expected = {(0, 1, 2, 3)} | {
        tuple(i + skip * (i >= cut) for i in range(4)) for cut in (1, 2, 3) for skip in (1, 2, 3)
    }
    assert set(drawn) == expected
    assert all(150 < drawn.count(one) < 250 for one in expected - {(0, 1, 2, 3)}), "200 each are expected"
    assert 520 < drawn.count((0, 1, 2, 3)) < 680


def test_a_jump_does_not_part_the_row_into_documents() -> None:
    """transformers reads a jump in the positions as a new document, unless it is given a mask."""
    lm = tiny_model("llama")
    ids = torch.randint(0, 101, (1, 23), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(23)[None] + 70 * (torch.arange(23) >= 9)
    truth, gradients = reference(lm, ids, ids, None, positions)
    lm.zero_grad(set_to_none=True)
    total, count = RowLoss(lm)(**shard_row(ids, ParallelContext(device="cpu"), None, positions))
    total.backward()
    assert count == 22
    assert total.item() == pytest.approx(truth, rel=1e-5)
    for name, p in lm.named_parameters():
        assert (p.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name


def test_each_epoch_spreads_a_row_anew_and_a_short_context_is_refused(tmp_path: Path, tiny_lm: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    run = CliRunner().invoke
    pack = f"pack-text {tmp_path}/text.txt --tokenizer {tiny_lm} --seq-len 64 --keep-short 1 -o {tmp_path}/packed -q"
    packed = run(app, pack.split())
    assert packed.exit_code == 0, packed.output
    rows = json.loads((tmp_path / "packed" / "MANIFEST.json").read_text())["rows"]
    assert rows < 10, "so that 20 steps read every row twice"
    extend = (
        f"extend-lm --model {tiny_lm} --data {tmp_path}/packed --rope yarn --pose --lr 0 --batch-tokens 64 -q".split()
    )
    done = run(app, [*extend, "--steps", "20", "--context", "4096", "-o", f"{tmp_path}/out"])
    assert done.exit_code == 0, done.output
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(set(losses)) == 20, "nothing is learned, so the same positions would give the same loss again"
    refused = run(app, [*extend, "--factor", "1", "--context", "64", "-o", f"{tmp_path}/short"])
    assert refused.exit_code == 2
    assert "--pose" in str(refused.exception) + refused.output


@pytest.mark.parametrize("flags", ["--pose", "--checkpoint-activations none", "--doc-mask"])
def test_rows_read_together_teach_what_they_teach_one_by_one(
    tmp_path: Path, tiny_lm: Path, flags: str, rows_read: list[int]
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"Fox {i} jumps over dog {7 * i}." for i in range(120)))
    pack = f"pack-text {tmp_path}/text.txt --tokenizer {tiny_lm} --seq-len 64 --keep-short 1 -o {tmp_path}/packed -q"
    assert CliRunner().invoke(app, pack.split()).exit_code == 0
    given = f"extend-lm --model {tiny_lm} --data {tmp_path}/packed --rope yarn --context 4096 --steps 3 --lr 1e-3"
    losses = {}
    for tokens in (64, 200):
        flags_here = f"{flags} --batch-tokens 320 --micro-tokens {tokens} -q -o {tmp_path}/{tokens}"
        done = CliRunner().invoke(app, f"{given} {flags_here}".split())
        assert done.exit_code == 0, done.output
        lines = (tmp_path / str(tokens) / "metrics.jsonl").read_text().splitlines()
        losses[tokens] = [json.loads(line)["loss"] for line in lines]
    one_by_one = [1] * 5 * 3
    assert rows_read == one_by_one + (one_by_one if flags == "--doc-mask" else [3, 2] * 3)
    assert losses[200] == pytest.approx(losses[64], rel=1e-3)  # rounding of bfloat16
    assert losses[64][0] != losses[64][2]
