"""A benchmark's run in shards, merged: the rows of the run that is not sharded, or what is missing of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.costs import without_cost
from support.fault_server import MODEL, faults
from test_niah import results
from test_questions import DATA, rows_of, run

pytestmark = pytest.mark.nano


@pytest.fixture(scope="module")
def flags(nano: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Two questions about each of five videos, mixed; but for --endpoint and -o."""
    here = tmp_path_factory.mktemp("inputs")
    first = json.loads((DATA / "questions.json").read_text())[0]
    rows = [
        {**first, "video_id": f"{v}", "videoID": f"v{v}", "question_id": f"{v}-{q}", "question": f"{q} of {v}?"}
        for q in range(2)
        for v in range(5)
    ]
    (here / "questions.json").write_text(json.dumps(rows))
    (here / "clips").mkdir()
    for v in range(5):
        shutil.copy(nano.clips / "bikes.mp4", here / "clips" / f"v{v}.mp4")
    inputs = ("--videos", here / "clips", "--questions", here / "questions.json")
    return ("videomme", "run", "--model", MODEL, *inputs, "--frames", 1, "--frame-pixels", 2000, "--jobs", 1)


@pytest.fixture(scope="module")
def whole(flags: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is not sharded."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with faults() as server:
        assert run(*flags, "--endpoint", server.url, "-o", out).exit_code == 0
    return out


@pytest.fixture(scope="module")
def shards(flags: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same in three."""
    here = tmp_path_factory.mktemp("shards")
    outs = [here / f"shard-{i}" for i in (1, 2, 3)]
    with faults() as server:
        for i, out in enumerate(outs, start=1):
            done = run(*flags, "--endpoint", server.url, "--shard", f"{i}/3", "-o", out)
            assert done.exit_code == 0, done.output
            assert len(rows_of(done)) == (4, 4, 2)[i - 1]
        assert len(server.requests) == 10
    return outs


def test_merged_shards_are_the_run_row_for_row(whole: Path, shards: list[Path], tmp_path: Path) -> None:
    """Whatever their order; the file for the benchmark's own scorer too. Every row keeps what it cost."""
    costs = {row["key"]: row["cost"] for shard in shards for row in results(shard)}
    for order in (shards, shards[::-1]):
        done = run("bench", "merge", *order, "-o", tmp_path)
        assert done.exit_code == 0, done.output
        assert without_cost(results(tmp_path)) == without_cost(results(whole))
        assert {row["key"]: row["cost"] for row in results(tmp_path)} == costs
        assert (tmp_path / "responses.json").read_bytes() == (whole / "responses.json").read_bytes()
        (row,) = rows_of(done)
        assert (row["questions"], row["answered"], row["missing"], row["missing_shards"]) == (10, 10, [], [])


def test_what_is_missing_is_said_and_can_be_added(
    flags: tuple[object, ...], whole: Path, shards: list[Path], tmp_path: Path
) -> None:
    """By another merge, or by the run without --shard. A shard that was stopped counts by its questions."""
    out = tmp_path / "out"
    done = run("bench", "merge", shards[0], shards[0], shards[2], "-o", out)
    assert done.exit_code == 4
    assert "no row of shard 2/3" in done.stderr
    assert "4 questions are missing: 1-0, 1-1, 4-0, 4-1" in done.stderr
    assert len(results(out)) == 6
    assert run("bench", "merge", *shards, "-o", out).exit_code == 0
    assert without_cost(results(out)) == without_cost(results(whole))
    stopped = tmp_path / "stopped"
    shutil.copytree(shards[1], stopped)
    lines = (stopped / "results.jsonl").read_bytes().splitlines(keepends=True)
    (stopped / "results.jsonl").write_bytes(lines[0] + lines[1][:40])
    done = run("bench", "merge", shards[0], stopped, shards[2], "-o", out)
    assert done.exit_code == 4
    assert "3 questions are missing: 1-1, 4-0, 4-1" in done.stderr
    assert "no row of shard" not in done.stderr
    with faults() as server:
        assert run(*flags, "--endpoint", server.url, "-o", out).exit_code == 0
        assert len(server.requests) == 3
    assert sorted(map(str, without_cost(results(out)))) == sorted(map(str, without_cost(results(whole))))


def test_a_failed_question_gives_way_to_its_answer(
    flags: tuple[object, ...], whole: Path, shards: list[Path], tmp_path: Path
) -> None:
    with faults(lambda number, body: "400:no") as server:
        failing = ("--endpoint", server.url, "--shard", "2/3", "-o", tmp_path / "failed")
        assert run(*flags, *failing).exit_code == 4
    done = run("bench", "merge", shards[0], tmp_path / "failed", shards[2], "-o", tmp_path / "out")
    assert (done.exit_code, "4 questions failed" in done.stderr) == (4, True)
    assert sum("error" in row for row in results(tmp_path / "out")) == 4
    done = run("bench", "merge", tmp_path / "failed", *shards, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert without_cost(results(tmp_path / "out")) == without_cost(results(whole))


def test_what_cannot_be_merged(flags: tuple[object, ...], whole: Path, shards: list[Path], tmp_path: Path) -> None:
    """Runs that differ, naming what; other replies; directories that are no shards, and another run's output."""
    with faults() as server:
        endpoint = ("--endpoint", server.url, "--shard")
        other = ("--max-new-tokens", 3, "--jpeg-quality", 50)
        assert run(*flags, *endpoint, "2/3", *other, "-o", tmp_path / "other").exit_code == 0
        server.reply = lambda body: {"content": "E"}
        assert run(*flags, *endpoint, "1/3", "-o", tmp_path / "changed").exit_code == 0
        mixed = run(*flags, *endpoint, "2/3", "-o", shards[0])
        for wrong in ("0/3", "4/3", "x", "1/0"):
            done = run(*flags, *endpoint, wrong, "-o", tmp_path / "wrong")
            assert (done.exit_code, "no share of a run" in done.stderr) == (2, True), done.output
    assert (mixed.exit_code, "holds shard 1/3" in mixed.stderr) == (3, True), mixed.output
    out = ("-o", tmp_path / "out")
    for runs, words in (
        ((shards[0], tmp_path / "other"), "another run"),
        ((shards[0], tmp_path / "other"), "(other endpoint, sampling_params)"),
        ((shards[0], tmp_path / "changed"), "has another reply in"),
        ((whole, shards[0]), "no shard.json"),
    ):
        done = run("bench", "merge", *runs, *out)
        assert (done.exit_code, words in done.stderr) == (3, True), done.output
        assert not (tmp_path / "out" / "results.jsonl").exists()
    assert run("bench", "merge", tmp_path / "other", *out).exit_code == 4
    done = run("bench", "merge", *shards, *out)
    assert (done.exit_code, "holds results of another run" in done.stderr) == (3, True)
    assert run("bench", "merge", *shards, *out, "--force").exit_code == 0
    assert without_cost(results(tmp_path / "out")) == without_cost(results(whole))


def test_shards_in_process(nano: Any, loud_vlm: Path, tmp_path: Path) -> None:
    """NExT-QA by a model in this process; a shard more than there are videos is empty."""
    inputs = ("--videos", nano.clips, "--questions", DATA / "nextqa.csv", "--frames", 2, "--max-new-tokens", 3)
    asked = ("bench", "nextqa", "run", "--model", loud_vlm, *inputs)
    whole = run(*asked, "-o", tmp_path / "whole")
    videos = len({row["video"] for row in results(tmp_path / "whole")})
    outs = [tmp_path / f"{i}" for i in range(1, videos + 2)]
    for i, out in enumerate(outs, start=1):
        done = run(*asked, "--shard", f"{i}/{len(outs)}", "-o", out)
        assert done.exit_code in (0, whole.exit_code), done.output
    done = run("bench", "merge", *outs, "-o", tmp_path / "merged")
    assert done.exit_code == whole.exit_code, done.output
    assert without_cost(results(tmp_path / "merged")) == without_cost(results(tmp_path / "whole"))
