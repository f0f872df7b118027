"""Runs that are killed with -9, anywhere and repeatedly: the log has every step once, the files are the whole run's."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import aligning, mrope_models
from support.aligning import draw, metrics, talk, write
from support.killing import RUNS, Toy, process
from support.refusals import refused
from test_niah import run
from test_pack_text import pack, write_lines
from torch.optim.optimizer import register_optimizer_step_post_hook

from lvctx.artifacts.jsonl_log import read_jsonl
from lvctx.artifacts.result_log import ResultLog
from lvctx.errors import InputError, Stopped
from lvctx.training.dpo import REFERENCE


@pytest.fixture(scope="module")
def folder(tiny_lm: Path, tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the trainings read; the longest sample of align comes in its first step."""
    here = tmp_path_factory.mktemp("resume")
    for name, path in (("lm", tiny_lm), ("tower", tiny_tower)):
        shutil.copytree(path, here / name)
    draw(here)
    write(here / "data.json", [talk("<image>\nWhat?", "red " * (9 - 2 * i), image=f"{i}.png") for i in range(4)])
    pairs = [{"prompt": "Say hi." * (i + 1), "chosen": "hi " * (i + 1), "rejected": "no"} for i in range(5)]
    write(here / "pairs.json", pairs)
    aligning.align(here / "data.json", here / "vlm", tiny_lm, tiny_tower, steps=1, batch=1)
    write_lines(here / "text.jsonl", [{"text": f"{i} " * 200} for i in range(9)])
    pack(here / "rows", here / "text.jsonl", tokenizer=tiny_lm)
    mrope_models.save("qwen2_5_vl", here / "qwen")
    Image.fromarray(np.zeros((70, 110, 3), np.uint8)).save(here / "a.png")
    rows = [talk("<image>What?", "Dots." * (i + 1), image="a.png") for i in range(3)]
    (here / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--interleaved", here / "chat.jsonl", "--media", here, "--long-share", 0, "--target-length", 100)
    done = run("pack-chat", "--model", here / "qwen", *flags, "-o", here / "chat")
    assert done.exit_code == 0, done.stderr
    return here


def contents(out: Path) -> dict[str, bytes]:
    """All files but the log, whose rows hold the clock."""
    files = (p for p in sorted(out.rglob("*")) if p.is_file() and p.name != "metrics.jsonl")
    return {str(p.relative_to(out)): p.read_bytes() for p in files if "checkpoint" not in p.parts}


BLOWS = [
    ("stop", 3),  # SIGTERM's way out: two steps are saved
    ("step", 1),  # inside the first step after it
    ("rewrite", 1),  # before the log is put in order
    ("row", 1),  # a row that no checkpoint has
    ("save", 2),  # all rows are written, and the last checkpoint is not
    ("end", 2),  # all steps are done, nothing is left but to write the model
]


@pytest.mark.parametrize("kind", ["extend", "align", pytest.param("dpo", marks=pytest.mark.slow), "mrope"])
def test_a_training_killed_again_and_again_ends_as_if_it_never_was(kind: str, folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole" / "model", tmp_path / "parts" / "model"  # mrope-extend writes the folder's name
    RUNS[kind](folder, whole)
    assert [row["step"] for row in metrics(whole)] == [1, 2, 3, 4]
    for blow in BLOWS:
        process(kind, folder, parts, blow)
        assert not (parts / "MANIFEST.json").exists()
    RUNS[kind](folder, parts)
    assert metrics(parts) == metrics(whole)
    assert contents(parts) == contents(whole)


@pytest.mark.parametrize(("place", "number"), [("step", 5), ("row", 5), ("save", 3)])
def test_a_kill_between_checkpoints(place: str, number: int, tmp_path: Path) -> None:
    """Checkpoints every second step; the first process makes one, two more do not come to the end of a step."""
    for blow in ((place, number), ("step", 1), ("step", 1)):
        process("toy", tmp_path, tmp_path / "parts", blow)
    for name in ("parts", "whole"):
        Toy(tmp_path / name).run()
    assert [row["step"] for row in metrics(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_the_reference_of_a_killed_run_has_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Killed between the rows of one forward: the pairs that are left are computed with the same company."""
    for blow in (("reference", 2), ("reference", 2)):
        process("dpo", folder, tmp_path / "parts", blow)
    for name in ("parts", "whole"):
        RUNS["dpo"](folder, tmp_path / name)
    whole, parts = ((tmp_path / name / REFERENCE).read_bytes() for name in ("whole", "parts"))
    assert parts == whole
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_an_older_checkpoint_does_not_double_steps(tmp_path: Path) -> None:
    """The newest was removed: the rows past the older one go, and come again once."""
    expected = Toy(tmp_path / "whole")
    expected.run()
    with pytest.raises(Stopped):
        Toy(tmp_path / "parts", stop_at=11).run()
    newest = sorted((tmp_path / "parts" / "checkpoint").glob("step-*"))
    assert [p.name for p in newest] == ["step-00000004", "step-00000005"]
    shutil.rmtree(newest[-1])
    with open(tmp_path / "parts" / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": 6, "loss"')  # a torn write
    Toy(tmp_path / "parts").run()
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_signal_between_a_step_and_its_row_loses_neither(tmp_path: Path) -> None:
    """SIGTERM while parameters are changed is raised when that is done: by then the row is written, too."""
    Toy(tmp_path / "whole").run()
    toy = Toy(tmp_path / "parts")
    held: list[int] = []

    def hook(*_: Any) -> None:
        held.append(1)
        if len(held) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handle = register_optimizer_step_post_hook(hook)
    try:
        with pytest.raises(KeyboardInterrupt):
            toy.run()
    finally:
        handle.remove()
    assert [row["step"] for row in metrics(tmp_path / "parts")] == [1, 2, 3]
    Toy(tmp_path / "parts").run()
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_changed_log_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Stopped):
        Toy(tmp_path, stop_at=8).run()
    path = tmp_path / "metrics.jsonl"
    rows = path.read_text().split("\n")
    path.write_text("\n".join([rows[0], *rows[2:]]))
    with pytest.raises(Stopped):
        Toy(tmp_path, stop_at=1).run()
    assert "1 of the 3 steps done so far are missing" in caplog.text
    path.write_text("\n".join(["nonsense", *rows]))
    with refused(InputError, "metrics.jsonl:1"):
        Toy(tmp_path).run()


def test_a_row_without_a_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for row in ("{}", '{"key": 5}', "[" * 100_000):
        path.write_text('{"key": "a"}\n' + row + "\n")
        with refused(InputError, "rows.jsonl:2"):
            ResultLog.open(path, {}).__enter__()
    path.write_text('{"key": "a\\u2028"}\n{"key": "b"}\r\n{"torn')
    assert [row["key"] for row in read_jsonl(path)] == ["a\u2028", "b"]
