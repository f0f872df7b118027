"""Under torchrun the processes share a benchmark's videos: one results file, no question twice, resumable."""

import json
import os
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import mrope_models, warm_server
from support.costs import without_cost
from test_cp_reading import ENV, torchrun
from test_niah import results, run
from test_questions import DATA


@pytest.fixture(scope="module")
def flags(nano: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Six questions about two videos, but for -o."""
    vlm = mrope_models.save("qwen2_5_vl", tmp_path_factory.mktemp("model") / "vlm")
    inputs = ["--videos", str(nano.clips), "--questions", str(DATA / "questions.json"), "--frames", "4"]
    return ["videomme", "run", "--model", str(vlm), *inputs, "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def alone(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    assert run(*flags, "-o", out).exit_code == 0
    return out


def by_key(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in without_cost(rows)}


@pytest.mark.nano
def test_two_processes_share_the_videos(flags: list[str], alone: Path, tmp_path: Path) -> None:
    """From the first two rows of a run that stopped; rank 0 prints every row that is new."""
    out = tmp_path / "out"
    out.mkdir()
    lines = (alone / "results.jsonl").read_bytes().splitlines(keepends=True)
    (out / "results.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:30])
    command = [*warm_server.torchrun(2), *flags, "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    assert "6 of 6 questions answered" in done.stderr
    printed = by_key([json.loads(line) for line in done.stdout.splitlines()])
    assert len(done.stdout.splitlines()) == len(printed) == 4
    assert by_key(results(out)) == by_key(results(alone))
    assert Counter(row["key"] for row in results(out)).most_common(1)[0][1] == 1
    assert (out / "responses.json").read_bytes() == (alone / "responses.json").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert (again.returncode, again.stdout) == (0, ""), again.stderr


@pytest.mark.slow
def test_kill_9_of_one_process_loses_the_running_questions_alone(flags: list[str], alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*torchrun(2), *flags, "-o", str(out), "--no-reuse", "--prefill-chunk", "16"]
    log = out / "results.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV) as running:
        while not log.exists() or not log.read_bytes().count(b"\n"):
            assert running.poll() is None
            time.sleep(0.005)
        ranks = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(ranks[1]), 9)
        running.wait(timeout=120)
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    assert Counter(row["key"] for row in results(out)) == Counter(row["key"] for row in results(alone))
