"""Alignment under torchrun: two processes give the losses of one, in every stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.aligning import draw, metrics, talk, write

LAUNCHERS = {
    "one": [sys.executable],
    "two": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"],
}


@pytest.mark.nano
@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tiny_lm: Path, tiny_tower: Path, tmp_path: Path) -> None:
    """A frozen language model, LoRA on preferences, and samples that two ranks cannot share evenly."""
    draw(tmp_path)
    rows = [talk("<image>\nWhat color?", ["red", "blue"][i % 2], image=f"{i}.png") for i in range(4)]
    data = write(tmp_path / "data.json", [*rows, talk("Say hi.", "hi")])
    pairs = [
        {"prompt": "<image>What?", "image": f"{i}.png", "chosen": "red", "rejected": "blue or so"} for i in range(3)
    ]
    preferred = write(tmp_path / "pairs.jsonl", pairs, lines=True)

    def align(launcher: str, out: str, *flags: object) -> None:
        given = ["--images", tmp_path, "--steps", 2, "--batch", 3, "--micro-tokens", 64, "-o", tmp_path / out]
        command = [*LAUNCHERS[launcher], "-m", "lvctx", "align", *map(str, [*given, *flags])]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=580)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1, "one rank speaks"

    for launcher in LAUNCHERS:
        align(launcher, launcher, "--lm", tiny_lm, "--tower", tiny_tower, "--data", data, "--lr", 1e-2)
        flags = ("--stage", "dpo", "--init", tmp_path / "one", "--data", preferred, "--lora", 4, "--lr", 1e-3)
        align(launcher, f"dpo-{launcher}", *flags)
    for stage in ("", "dpo-"):
        one, two = (metrics(tmp_path / f"{stage}{launcher}") for launcher in LAUNCHERS)
        assert [row["step"] for row in two] == [1, 2]
        for a, b in zip(one, two, strict=True):
            assert a["tokens"] == b["tokens"]
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
    lines = [(tmp_path / f"dpo-{name}" / "reference.jsonl").read_text().splitlines() for name in LAUNCHERS]
    found = [{row["key"]: (row["chosen"], row["rejected"]) for row in map(json.loads, part)} for part in lines]
    assert len(lines[1]) == len(found[0]) == 3, "no pair is computed twice"
    for key, values in found[0].items():
        assert values == pytest.approx(found[1][key], rel=2e-2)
