"""Needles: exact sequences, results that survive kills, reports that need no model, one line for bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import warm_server
from support.costs import without_cost
from support.frames import write_frames
from support.refusals import refused
from typer.testing import CliRunner

from lvctx.artifacts.jsonl_log import JsonlLog, read_jsonl
from lvctx.artifacts.manifest import Provenance
from lvctx.cli.app import app
from lvctx.errors import InputError
from lvctx.eval.niah.compare import compare_needles, comparison_warnings
from lvctx.eval.niah.heatmap import draw_heatmaps, trained_at
from lvctx.eval.niah.job import plan_text
from lvctx.eval.niah.longva_format import read_longva
from lvctx.eval.niah.niah_config import TextNiahConfig
from lvctx.eval.niah.results import build_results, read_needle_results, wilson
from lvctx.eval.niah.text_needles import (
    NEEDLE,
    PREFIX,
    QUESTION,
    TextNeedle,
    question_and_answer,
    read_haystack,
    sentence_ends,
)
from lvctx.eval.niah.text_task import TextNeedleTask
from lvctx.eval.report.collect import collect_report
from lvctx.eval.report.thumbnails import Thumbnails
from lvctx.inference.prefix_scorer import PrefixScorer


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def essays(nano: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("essays")
    for name in ("love.txt", "gba.txt"):
        (out / name).write_text((nano.essays / name).read_text(encoding="utf-8"), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def frames(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lvctx.models.vision_encoder import load_tower

    return encode(load_tower(tiny_vlm, dtype=None), tmp_path_factory.mktemp("frames") / "a.frames.safetensors")


def encode(tower: Any, target: Path) -> Path:
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (10, 48, 48, 3), dtype=np.uint8)
    inputs = {"tower": tower.fingerprint, "video": "none"}
    made = Provenance(schema="lvctx.frames/1", command="encode-video", config={"frame_mode": "pad"}, inputs=inputs)
    write_frames(target, tower.encode_images(squares), [float(i) for i in range(10)], list(range(10)), made)
    return target


# --- sequences


def test_a_sequence_has_its_text_in_exactly_as_many_tokens(tiny_lm: Path, essays: Path) -> None:
    from lvctx.models.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_lm)
    hay = read_haystack([essays])
    test = TextNeedleTask(tokenizer, hay, distractors=3, seed=5)
    for cell in test.cells([300, 777], [0, 0.25, 0.5, 1], 3):
        ids, answer = test.sequence(cell)
        assert len(ids) == cell.length
        text = tokenizer.decode(ids)
        assert text.startswith(PREFIX)
        assert text.endswith(f": {cell.answer}")
        assert tokenizer.decode(ids[-answer:]).strip() == cell.answer
        assert 1_000_000 <= int(cell.answer) <= 9_999_999
        assert text.count(f"{cell.needle}\n") == 1
        before, _, after = text.partition(f"\n{cell.needle}\n")
        assert text.count("The special magic") == 1 + 3 + 1  # the needle, look-alikes, the question
        city = cell.needle.split()[3]
        assert text.count(f"special magic {city} number is: ") == 2
        assert city in cell.question
        story = before.removeprefix(PREFIX).rstrip(" \n\"')")
        assert cell.depth in (0, 1) or story.endswith((".", "!", "?"))
        if cell.depth == 1:
            assert after.startswith("</book>")


def test_true_depth_is_at_most_a_sentence_before_the_asked_one(tiny_lm: Path, essays: Path) -> None:
    from lvctx.models.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_lm)
    hay = read_haystack([essays])
    ends = sentence_ends(tokenizer, np.array(tokenizer(hay).input_ids))
    longest_sentence = int(np.diff(ends).max())
    test = TextNeedleTask(tokenizer, hay, distractors=0, seed=0)
    for cell in test.cells([900], [0, 0.25, 0.4, 0.75, 1], 1):
        assert cell.depth is not None
        target = int(cell.depth * (900 - (900 - test._haystack_length(900, 0))))
        assert 0 <= target - cell.position <= longest_sentence


OSLO = TextNeedle(
    sentences=(NEEDLE.format(city="Oslo", number="7654321"),),
    question="What is the special magic Oslo number?",
    start="The special magic Oslo number is:",
    answers=("7654321",),
)
ASKED = QUESTION.format(question=OSLO.question, start=OSLO.start)


def tokenizer_where(split_digits: bool) -> Any:
    """A byte-level BPE whose space before a number is a token of its own, or is not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    words = [ASKED, NEEDLE.format(city="Oslo", number="7654321")] * 5
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=600, initial_alphabet=byte_level.alphabet(), show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("split_digits", [True, False])
def test_the_tokenizer_decides_whose_the_space_is(split_digits: bool) -> None:
    tokenizer = tokenizer_where(split_digits)
    question, answer = question_and_answer(tokenizer, OSLO)
    assert tokenizer.decode(question + answer) == ASKED + " 7654321"
    assert tokenizer.decode(answer) == ("7654321" if split_digits else " 7654321")
    # The needle says it in the same tokens, else the answer could not be copied.
    said = tokenizer(NEEDLE.format(city="Oslo", number="7654321")).input_ids
    assert any(said[i : i + len(answer)] == answer for i in range(len(said)))


# --- runs


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def text_arguments(model: Path, essays: Path, out: Path) -> list[object]:
    grid = ["--lengths", "130,200", "--depths", "0,0.5,1", "--trials", 2, "--scoring", "both"]
    return ["niah", "text", "--model", model, "--haystack", essays, *grid, "-o", out]


def test_a_run_and_its_files(tiny_lm: Path, essays: Path, tmp_path: Path) -> None:
    done = run(*text_arguments(tiny_lm, essays, tmp_path / "a"))
    assert done.exit_code == 0
    rows = results(tmp_path / "a")
    assert [json.loads(line) for line in done.stdout.splitlines()] == rows
    assert len(rows) == len({r["key"] for r in rows}) == 12
    assert all(r["teacher_forced"] == (r["share"] == 1) == r["correct"] and r["trained_length"] == 512 for r in rows)
    assert "chance 0.00" in done.stderr
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["lengths"] == [130, 200]
    assert summary["trials"] == [[2, 2]] * 3
    assert (tmp_path / "a/heatmap.png").read_bytes()[:4] == b"\x89PNG"

    again = run(*text_arguments(tiny_lm, essays, tmp_path / "a"))
    assert (again.exit_code, again.stdout) == (0, "")
    # A device with other free memory chooses another chunk, and continues the run.
    again = run(*text_arguments(tiny_lm, essays, tmp_path / "a"), "--resume", "must", "--prefill-chunk", 64)
    assert (again.exit_code, again.stdout) == (0, "")
    other = run(*text_arguments(tiny_lm, essays, tmp_path / "b"), "-q", "--prefill-chunk", 64)
    assert other.exit_code == 0
    assert "text: accuracy" not in other.stderr
    assert without_cost(results(tmp_path / "b")) == without_cost(rows)
    for name in ("summary.json", "heatmap.json"):
        same = (tmp_path / "a" / name).read_text().replace('"name": "a"', '"name": "b"')
        assert same == (tmp_path / "b" / name).read_text(), name


def test_a_torn_line_is_redone_and_a_grid_grows(tiny_lm: Path, essays: Path, tmp_path: Path) -> None:
    arguments = text_arguments(tiny_lm, essays, tmp_path / "a")
    assert run(*arguments).exit_code == 0
    whole = results(tmp_path / "a")
    log = tmp_path / "a/results.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:40])
    assert run(*arguments, "--resume", "must").exit_code == 0
    assert [r["key"] for r in results(tmp_path / "a")] == [r["key"] for r in whole]
    assert [r["correct"] for r in results(tmp_path / "a")] == [r["correct"] for r in whole]
    arguments[arguments.index("130,200")] = "200,260"
    grown = run(*arguments)
    assert len(grown.stdout.splitlines()) == 6
    assert {json.loads(x)["length"] for x in grown.stdout.splitlines()} == {260}
    assert read_needle_results(tmp_path / "a").lengths == [130, 200, 260]
    assert run(*arguments, "--resume", "never").exit_code == 3
    assert run(*text_arguments(tiny_lm, essays, tmp_path / "new"), "--resume", "must").exit_code == 3
    for flags, what in ((("--seed", 9), "seed"), (("--dtype", "bfloat16"), "dtype")):
        refused = run(*arguments, *flags)
        assert refused.exit_code == 3
        assert f"another run (other {what})" in refused.stderr
    assert len(run(*arguments, "--seed", 9, "--force").stdout.splitlines()) == 12


def test_kill_9_loses_no_finished_cell(tiny_lm: Path, essays: Path, tmp_path: Path) -> None:
    arguments = [str(a) for a in text_arguments(tiny_lm, essays, tmp_path / "a")]
    with warm_server.Command(*arguments) as running:
        assert running.stdout
        seen = [json.loads(running.stdout.readline())["key"] for _ in range(3)]
        running.kill()
    assert not (tmp_path / "a/summary.json").exists()
    assert run("niah", "report", tmp_path / "a", "-o", tmp_path / "partial.png").exit_code == 0
    assert run(*arguments).exit_code == 0
    keys = [r["key"] for r in results(tmp_path / "a")]
    assert keys[:3] == seen
    assert len(set(keys)) == len(keys) == 12


def test_a_failing_cell_is_a_row_and_is_run_again(
    tiny_lm: Path, essays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = PrefixScorer.score

    def fails(self: PrefixScorer, ids: np.ndarray, answer: int, *, generate: int = 0) -> Any:
        if len(ids) == 200:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return score(self, ids, answer, generate=generate)

    arguments = text_arguments(tiny_lm, essays, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(PrefixScorer, "score", fails)
        done = run(*arguments)
    assert done.exit_code == 4
    assert done.stderr.count("CUDA out of memory") == 1
    errors = [row["error"] for row in results(tmp_path / "a") if "error" in row]
    assert [error.startswith("200 tokens: out of memory (CUDA out of memory.)") for error in errors] == [True] * 6
    assert json.loads((tmp_path / "a/summary.json").read_text())["errors"] == 6
    assert run(*arguments).exit_code == 0
    grid = read_needle_results(tmp_path / "a")
    assert (grid.errors, grid.trials) == (0, [[2, 2]] * 3)


def test_video(tiny_vlm: Path, frames: Path, tmp_path: Path) -> None:
    hay = ["--haystack", frames, "--haystack", frames]
    arguments = ["niah", "video", "--model", tiny_vlm, *hay, "--lengths", "4,15", "--depths", "0,0.5,1"]
    done = run(*arguments, "--trials", 2, "-o", tmp_path / "a")
    assert done.exit_code == 0
    rows = results(tmp_path / "a")
    assert len(rows) == 12
    assert {r["chance"] for r in rows} == {0.1}
    assert "chance 0.10" in done.stderr
    assert {(r["length"], r["depth"], r["position"]) for r in rows} >= {(15, 0.5, 7), (15, 1.0, 15), (4, 0.0, 0)}
    drawn_again = Thumbnails(1, lambda *_: None).of_needles(rows)
    assert set(drawn_again) == {r["needle"] for r in rows}
    lengths = {r["length"]: r["tokens"] for r in rows if r["trial"] == 0}
    assert lengths[15] - lengths[4] == 11 * 4  # a frame of the tiny tower is four tokens
    plan = json.loads(run(*arguments, "--dry-run", "-o", tmp_path / "a").stdout)
    assert plan["tokens_once"] < plan["tokens"]
    assert plan["cells"] == 30
    assert plan["cache_bytes"] > 0


def test_several_clips_in_a_video(tiny_vlm: Path, frames: Path, tmp_path: Path) -> None:
    """The order of three clips of two frames each."""
    arguments = ["niah", "video", "--model", tiny_vlm, "--haystack", frames, "--lengths", 6, "--depths", "0,0.5"]
    several = ["--question", "order", "--count", 3, "--needle-frames", 2, "--trials", 2, "--scoring", "both"]
    assert run(*arguments, *several, "-o", tmp_path / "a").exit_code == 0
    rows = results(tmp_path / "a")
    assert len(rows) == 4
    assert {round(r["chance"], 4) for r in rows} == {0.1667}
    assert all(len(r["answer"].split(", ")) == 3 for r in rows)
    assert run(*arguments, "--question", "order", "-o", tmp_path / "no").exit_code == 2


def test_lengths_that_end_in_the_first_of_two_artifacts(tiny_vlm: Path, frames: Path, tmp_path: Path) -> None:
    arguments = ["niah", "video", "--model", tiny_vlm, "--lengths", "4", "--depths", "0.5", "--trials", 1]
    assert run(*arguments, "--haystack", frames, "--haystack", frames, "-o", tmp_path / "two").exit_code == 0
    assert run(*arguments, "--haystack", frames, "-o", tmp_path / "one").exit_code == 0
    two, one = results(tmp_path / "two"), results(tmp_path / "one")
    assert [r["log_prob"] for r in two] == [r["log_prob"] for r in one]


def test_needles_of_a_folder(tiny_vlm: Path, frames: Path, tmp_path: Path) -> None:
    folder = tmp_path / "needles"
    folder.mkdir()
    Image.new("RGB", (60, 40), (255, 0, 0)).save(folder / "red.png")
    row = {"image": "red.png", "question": "What color is the flag?", "answer": "Red"}
    arguments = [
        "niah",
        "video",
        "--model",
        tiny_vlm,
        "--haystack",
        frames,
        "--lengths",
        4,
        "--depths",
        0,
        "--needles",
        folder,
    ]

    def asked(lines: str, trials: int = 1) -> Any:
        (folder / "needles.jsonl").write_text(lines)
        return run(*arguments, "--trials", trials, "-o", tmp_path / "out")

    done = asked(json.dumps(row))
    assert done.exit_code == 0
    assert (json.loads(done.stdout)["question"], json.loads(done.stdout)["chance"]) == (row["question"], None)
    for lines, said in (
        (json.dumps(row) + "\n{oops", "needles.jsonl:2: malformed JSON"),
        (json.dumps(row | {"answer": " "}), "needles.jsonl:1: an empty answer"),
        (json.dumps(row | {"image": "none.png"}), "none.png: no such image"),
    ):
        done = asked(lines)
        assert done.exit_code == 3
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    assert asked(json.dumps(row), trials=2).exit_code == 2


def test_bad_input_is_one_line(
    tiny_lm: Path, tiny_tower: Path, tiny_vlm: Path, frames: Path, essays: Path, tmp_path: Path
) -> None:
    from lvctx.models.vision_encoder import load_tower

    def refused(code: int, said: str, *changes: object, video: bool = False) -> None:
        arguments = text_arguments(tiny_lm, essays, tmp_path / "out")
        if video:
            arguments = [
                "niah",
                "video",
                "--model",
                tiny_vlm,
                "--haystack",
                frames,
                "--lengths",
                4,
                "-o",
                tmp_path / "out",
            ]
        done = run(*arguments, *changes)
        assert (done.exit_code, done.stderr.count("\n")) == (code, 1), done.stderr
        assert said in done.stderr
        assert not (tmp_path / "out").exists()

    refused(3, "cannot hold needle and question", "--lengths", "40,200")
    refused(3, "exceed the haystack", "--lengths", 1_000_000)
    refused(2, "depths have to be between 0 and 1", "--depths", "0,1.5")
    refused(2, "lengths have to be at least 1", "--lengths", "0,200")
    refused(2, "whole numbers", "--lengths", "200.5")
    refused(2, "comma-separated numbers", "--depths", "a")
    refused(2, "comma-separated numbers", "--depths", "nan")
    refused(3, "no such file or folder", "--haystack", tmp_path / "none")
    refused(3, "no such model directory", "--model", "./none")
    refused(3, "exceed the haystack (it has 10)", "--lengths", 11, video=True)
    refused(2, "has no vision tower", "--model", tiny_lm, video=True)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    refused(3, "not UTF-8", "--haystack", tmp_path / "binary.txt")
    (tmp_path / "torn.frames.safetensors").write_bytes(frames.read_bytes()[:-9])
    refused(3, "not a whole safetensors file", "--haystack", tmp_path / "torn.frames.safetensors", video=True)
    from transformers import CLIPVisionModel

    trained = CLIPVisionModel.from_pretrained(tiny_tower)
    next(trained.parameters()).data.add_(1)
    trained.save_pretrained(tmp_path / "tower")
    (tmp_path / "tower/preprocessor_config.json").write_text((tiny_tower / "preprocessor_config.json").read_text())
    foreign = encode(load_tower(tmp_path / "tower", dtype=None), tmp_path / "foreign.frames.safetensors")
    refused(3, "features of another vision tower", "--haystack", foreign, video=True)


@pytest.mark.nano
def test_forced_scoring_is_greedy_generation_on_a_real_model(nano: Any, tmp_path: Path) -> None:
    grid = ["--lengths", "200", "--depths", "0,0.6,1", "--trials", 2, "--distractors", 3, "--scoring", "both"]
    done = run("niah", "text", "--model", nano.lm, "--haystack", nano.essays, *grid, "-o", tmp_path / "a")
    assert done.exit_code == 0
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 6
    assert all(r["teacher_forced"] == (r["share"] == 1) for r in rows)
    assert sum(r["correct"] for r in rows) >= 4


@pytest.mark.parametrize(("question", "chance"), [("code", 23**-5), ("hops", 0.1)])
def test_needles_with_text_are_scored_forced_and_by_generation(
    question: str, chance: float, tiny_vlm: Path, frames: Path, tmp_path: Path
) -> None:
    grid = ["--lengths", 4, "--depths", 0.5, "--trials", 1, "--count", 3, "--scoring", "both", "--question", question]
    done = run("niah", "video", "--model", tiny_vlm, "--haystack", frames, *grid, "-o", tmp_path / "a")
    assert done.exit_code == 0, done.stderr
    (row,) = results(tmp_path / "a")
    assert {"teacher_forced", "log_prob", "generated", "share"} <= row.keys()
    assert row["cost"]["frames_shown"] == 4 + 3
    assert row["chance"] == pytest.approx(chance)


# --- reports


def cells(modality: str, lengths: dict[int, float], **shared: Any) -> list[dict[str, Any]]:
    base = {"modality": modality, "chance": 0.1, "trained_length": 224_000, "longest_sample": 0, **shared}
    return [
        {**base, "length": n, "depth": d / 5, "tokens": 144 * n, "correct": 30 * i < 30 * 30 * share - 1e-6}
        for n, share in lengths.items()
        for i, d in enumerate([0, 1, 2, 3, 4, 5] * 5)
    ]


PUBLISHED = {
    **dict.fromkeys((200, 400, 600, 800, 1000, 1200), 1.0),
    **{1400: 0.933, 1600: 0.967, 1800: 0.933, 2000: 0.9, 2200: 0.933, 2400: 0.667, 2600: 0.8, 2800: 0.733, 3000: 0.767},
}
"""LongVA-7B's V-NIAH, mean over six depths and five needles, by frames (LongVA's repository, figure 4)."""


def longva_file(target: Path) -> Path:
    """LongVA's file with its published averages by frames. Which of the thirty needles of a length were found is not
    published: here the missing ones are filled in from the first depth on.
    """
    cells = []
    for frames, share in PUBLISHED.items():
        missing = 30 - round(30 * share)
        for d in range(6):
            lost = min(5, max(0, missing - 5 * d))
            cells.append({"Num. Frame": frames, "Frame Depth": 20.0 * d, "Score": (5 - lost) / 5})
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(cells, indent=4))
    return target


def test_published_averages_come_out_of_longvas_own_file(tmp_path: Path) -> None:
    grid = read_longva(longva_file(tmp_path / "LongVA-7B/all_accuracies.json"), trained_length=224_000)
    assert grid.name == "LongVA-7B"
    assert [round(grid.by_length(i) or 0, 3) for i in range(15)] == list(PUBLISHED.values())
    assert grid.total == (409, 450)
    assert round(grid.mean or 0, 3) == 0.909
    # 224,000 tokens are 1,555 frames: the line goes between 1,400 and 1,600.
    assert trained_at(grid) == grid.lengths.index(1400) + 0.5
    # The published row is at 0.9 or above up to 2,200 frames and at 0.667 at 2,400.
    assert grid.to_dict(0.9)["effective_length"] == 2200
    assert grid.to_dict(0.95)["effective_length"] == 1200
    assert grid.to_dict(0.6)["falls"] is False
    assert "at least 3,000 frames (432,000 tokens)" in grid.verdict(0.6)
    assert grid.effective(1.01) is None


def test_longvas_file_in_and_out_through_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = longva_file(tmp_path / "LongVA-7B/all_accuracies.json")
    out = tmp_path / "copy/all_accuracies.json"
    assert run("niah", "report", given, "-o", out).exit_code == 0
    assert json.loads(out.read_text()) == json.loads(given.read_text())
    done = run("niah", "report", given, "--training-length", 224_000, "--json", "-o", tmp_path / "a.json")
    [line] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line] == json.loads((tmp_path / "a.json").read_text())
    assert (line["effective_length"], line["effective_tokens"], line["trained_length"]) == (2200, 316_800, 224_000)
    with monkeypatch.context() as patch:
        patch.setattr("lvctx.cli.output.stdout_is_terminal", lambda: True)
        table = run("niah", "report", given, "-o", tmp_path / "a.svg").stdout
    for said in ("2,400 │ 345,600 │", "effective at 0.9 │"):
        assert said in table, said
    assert re.search(r"95 % │ +│ +– ", table), "the file does not tell which needles were found"
    assert "effective length 2,200 frames (316,800 tokens) at 0.9" in (tmp_path / "a.svg").read_text()
    assert run("niah", "report", given, given, "-o", out).exit_code == 2
    for broken in ("{}", '[{"Num. Frame": 1}]', '[{"Num. Frame": 1, "Frame Depth": 0, "Score": 0.123456}]'):
        given.write_text(broken)
        done = run("niah", "report", given)
        assert (done.exit_code, done.stderr.count("\n")) == (3, 1)


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (409, 450), (1, 2)])
def test_wilson_is_where_the_score_test_turns(right: int, n: int) -> None:
    """Its ends are the shares p0 at which |p - p0| is 1.96 standard errors of p0 itself; that is how it is defined."""
    low, high = wilson(right, n) or (0, 0)
    for end in (low, high):
        if 0 < end < 1:
            assert abs(right / n - end) == pytest.approx(1.959964 * (end * (1 - end) / n) ** 0.5, rel=2e-3)
    assert (low == 0) == (right == 0)
    assert (high == 1) == (right == n)


def test_intervals_are_clustered_by_needle() -> None:
    """Four needles with 4, 3, 3 and 2 of 4 cells right: se^2 = 4/3 (1 + 0 + 0 + 1) / 16^2, by Cochran's ratio."""
    found = {"a": 4, "b": 3, "c": 3, "d": 2}
    rows = [
        {**row, "trial": trial, "needle": needle, "correct": i < found[needle], "depth": i / 3}
        for trial, needle in enumerate(found)
        for i, row in enumerate(cells("video", {10: 1.0})[:4])
    ]
    grid = build_results(rows, "one")
    half = 1.959964 * (4 / 3 * 2) ** 0.5 / 16
    assert grid.interval == grid.interval_by_length[0] == pytest.approx((0.75 - half, 0.75 + half), abs=1e-4)
    assert grid.to_dict()["interval"] == grid.interval
    one = build_results([row for row in rows if row["needle"] == "a"], "one")
    assert (one.interval, one.interval_by_length) == (None, [None]), "one needle"
    # Needles of which two cells are right but for one: they differ less than cells that are drawn one by one.
    even = build_results([row | {"correct": i % 4 < (2 if i < 12 else 1)} for i, row in enumerate(rows)], "one")
    assert even.interval == wilson(7, 16)
    # Where all needles have the same result, the interval is Wilson's for the needles, not for the cells.
    same = build_results([row | {"correct": True} for row in rows], "one")
    assert same.interval == wilson(4, 4)


def test_labels_are_true_and_bytes_repeat(tmp_path: Path) -> None:
    rows = [r | {"depth": d} for d in (0.25, 0.333, 1) for r in cells("video", {10: 1.0, 20: 0.5}, trained_length=2000)]
    grids = [build_results(rows, "one"), build_results(cells("text", {100: 0.2}), "two")]
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        draw_heatmaps(grids, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    for label in ("25%", "33.3%", "100%", "(1,440)", "chance 0.10", "2,000 tokens (red line)", "all within"):
        assert label in drawn, label
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_fourth_panel_begins_a_new_line(tmp_path: Path) -> None:
    sizes = {}
    for panels in (3, 4):
        draw_heatmaps([build_results(cells("video", {10: 1.0}), str(n)) for n in range(panels)], tmp_path / "a.svg")
        found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', (tmp_path / "a.svg").read_text())
        assert found
        sizes[panels] = tuple(map(float, found.groups()))
    assert sizes[4][0] == sizes[3][0]
    assert sizes[4][1] > 1.5 * sizes[3][1]


def test_report_needs_no_torch_and_rebuilds(tmp_path: Path) -> None:
    for name, share in (("before", 0.2), ("after", 0.8)):
        (tmp_path / name).mkdir()
        rows = [r | {"key": str(i)} for i, r in enumerate(cells("video", {100: share, 200: share}))]
        (tmp_path / name / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code = "import sys\nfrom lvctx.__main__ import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    both = [str(tmp_path / "before"), str(tmp_path / "after")]
    for more in ([], ["-o", str(tmp_path / "both.svg")], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "niah", "report", *both, *more], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert [json.loads(line)["accuracy"] for line in done.stdout.splitlines()] == [0.2, 0.8]
    assert (tmp_path / "both.svg").is_file()
    assert (tmp_path / "after/summary.json").is_file()
    assert run("niah", "report", tmp_path).exit_code == 3
    assert run("niah", "report", tmp_path / "after", "-o", tmp_path / "x.gif").exit_code == 2


def test_a_report_of_nothing_is_refused() -> None:
    with refused(InputError, "empty"):
        build_results([], "empty")


def test_info_knows_a_results_directory(tiny_lm: Path, essays: Path, tmp_path: Path) -> None:
    run(*text_arguments(tiny_lm, essays, tmp_path / "a"))
    facts = json.loads(run("info", tmp_path / "a", "--json").stdout)
    assert (facts["schema"], facts["cells"], facts["errors"]) == ("lvctx.niah/1", 12, 0)


# --- two runs compared


def paired_rows(right: dict[tuple[int, int], bool], *, lengths: tuple[int, ...] = (100, 200)) -> list[dict[str, Any]]:
    """Rows of a run with ten cells a needle; `right` says so for (trial, length), else a cell is wrong."""
    base = {
        "schema": "lvctx.niah/1",
        "modality": "text",
        "chance": None,
        "trained_length": None,
        "longest_sample": 0,
        "point": None,
    }
    return [
        {
            **base,
            **{"length": n, "depth": d / 5, "trial": trial, "needle": f"n{trial}", "question": "?", "answer": "1"},
            **{"position": d, "tokens": n, "correct": right.get((trial, n), False), "key": f"{n} {d} {trial}"},
        }
        for trial in range(24)
        for n in lengths
        for d in range(5)
    ]


def test_two_runs_are_compared_by_pairs_of_cells(tmp_path: Path) -> None:
    """The mean and the standard error of 24 needles' mean differences, by their definition; all others are dropped."""
    rng = np.random.default_rng(0)
    first, second = ({(t, n): bool(rng.random() < p) for t in range(24) for n in (100, 200)} for p in (0.8, 0.4))
    rows = [paired_rows(first, lengths=(100, 200, 300)), paired_rows(second)[::-1]]
    rows[1][0] = {"error": "out of memory", **{k: v for k, v in rows[1][0].items() if k != "correct"}}
    rows[1][1] |= {"needle": "another"}
    del rows[0][:3]  # rows[1] is in reverse, so five cells of 240 are missing in one or the other
    found = compare_needles(*rows)
    assert list(found) == ["all", "100", "200"]
    assert (found["all"].counted, found["200"].counted, found["all"].clusters) == (235, 118, 24)
    means = np.array([float(first[t, 200]) - float(second[t, 200]) for t in range(24)])
    whole = compare_needles(paired_rows(first), paired_rows(second))["200"]
    assert whole.needed is not None
    error = means.std(ddof=1) / 24**0.5
    assert whole.mean == pytest.approx(means.mean())
    assert (whole.low, whole.high) == pytest.approx(
        (means.mean() - 1.96 * error, means.mean() + 1.96 * error), abs=1e-4
    )
    assert whole.p_value == pytest.approx(2 * (1 - NormalDist().cdf(abs(means.mean()) / error)))
    # As many cells as bring 2.8 standard errors (1.96 + 0.84) to two points.
    assert whole.needed == pytest.approx(120 * (2.8016 * error / 0.02) ** 2, rel=1e-3)
    assert compare_needles(paired_rows(first), cells("text", {100: 1.0})) == {}
    for name, run_rows in (("a", paired_rows(first)), ("b", paired_rows(second))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run_rows))
    both = tmp_path / "a", tmp_path / "b"
    lines = [json.loads(line) for line in run("niah", "report", *both, "--json", "--detect", 4).stdout.splitlines()]
    assert [line["schema"] for line in lines] == ["lvctx.niah/1", "lvctx.niah/1", "lvctx.score/1"]
    assert lines[2]["warnings"] == []
    assert lines[2]["difference"]["200"]["needed"] == pytest.approx(whole.needed / 4, abs=1)
    assert lines[2]["difference"]["200"]["low"] == whole.low
    assert run("niah", "report", both[0], "--detect", 4, "-o", tmp_path / "a.png").exit_code == 2
    pages = collect_report(both, thumbnails=0, threshold=0.9, on_progress=lambda *_: None).comparisons
    assert [pair["rules"]["200"]["mean"] for pair in pages] == [whole.mean]


def test_shares_are_compared_where_answers_have_parts() -> None:
    first, second = paired_rows({}), paired_rows({})
    assert "share found" not in compare_needles(first, second)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        a["share"], b["share"] = i % 4 / 4, 0.25
    found = compare_needles(first, second)
    assert (found["all"].mean, found["share found"].mean) == (0, pytest.approx(0.375 - 0.25))
    assert found["share found"].counted == len(first)


def test_a_comparison_warns_of_few_needles_and_of_another_scoring_or_text() -> None:
    made_of = {"scoring": "forced", "haystack": "a", "model": "m"}

    def warnings(trials: int, modality: str = "text", **other: str) -> int:
        first, second = (
            [row | {"modality": modality, "made_of": run} for row in paired_rows({}) if row["trial"] < trials]
            for run in (made_of, made_of | other)
        )
        return len(comparison_warnings(first, second, compare_needles(first, second)))

    assert [warnings(24), warnings(5), warnings(24, model="n")] == [0, 1, 0]
    assert [warnings(24, haystack="b"), warnings(24, "video", haystack="b"), warnings(5, scoring="both")] == [1, 0, 2]


# --- many processes


def test_ranks_write_one_file_with_no_row_twice(tiny_lm: Path, essays: Path, tmp_path: Path) -> None:
    alone = run(*text_arguments(tiny_lm, essays, tmp_path / "alone"))
    command = [*warm_server.torchrun(2), *(str(a) for a in text_arguments(tiny_lm, essays, tmp_path / "two"))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    shown = {row["key"]: row for row in map(json.loads, done.stdout.splitlines())}
    stored = {row["key"]: row for row in results(tmp_path / "two")}
    assert len(results(tmp_path / "two")) == len(stored) == 12
    assert shown == stored
    rows = without_cost(map(json.loads, alone.stdout.splitlines()))
    assert {row["key"]: row for row in without_cost(stored.values())} == {row["key"]: row for row in rows}
    assert done.stderr.count(": accuracy") == 1
    summary = json.loads((tmp_path / "two/summary.json").read_text())
    assert summary | {"name": "alone"} == json.loads((tmp_path / "alone/summary.json").read_text())


def test_a_torn_line_of_another_process_is_dropped(tmp_path: Path) -> None:
    with JsonlLog(tmp_path / "r.jsonl") as one, JsonlLog(tmp_path / "r.jsonl") as two:
        one.append({"key": "a"})
        with open(tmp_path / "r.jsonl", "ab") as killed:
            killed.write(b'{"key": "b", "to')
        two.append({"key": "c"})
        one.append({"key": "d"})
    assert [row["key"] for row in read_jsonl(tmp_path / "r.jsonl")] == ["a", "c", "d"]


def test_results_of_another_model_are_refused(tiny_lm: Path, essays: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run(*text_arguments(tiny_lm, essays, tmp_path / "a")).exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(tmp_path / "other")
    refused = run(*text_arguments(tmp_path / "other", essays, tmp_path / "a"))
    assert (refused.exit_code, refused.stderr.count("\n")) == (3, 1)
    assert "another run (other model)" in refused.stderr


def test_a_base_is_tried_as_if_the_model_had_it(tiny_lm: Path, essays: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = text_arguments(tiny_lm, essays, tmp_path / "a")
    assert run(*arguments, "--rope", "theta:3e4,theta:1e6").exit_code == 0
    assert (tmp_path / "a/heatmap.png").is_file()
    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    model.save_pretrained(tmp_path / "1e6")
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(tmp_path / "1e6")
    assert run(*text_arguments(tmp_path / "1e6", essays, tmp_path / "b")).exit_code == 0
    scores = [[r["log_prob"] for r in results(d)] for d in (tmp_path / "a/theta-1e+06", tmp_path / "b")]
    assert scores[0] == scores[1]
    assert scores[0] != [r["log_prob"] for r in results(tmp_path / "a/theta-30000")]
    assert run(*arguments, "--rope", "theta:0.5").exit_code == 2


@pytest.mark.parametrize("rope", [("theta", 1e6), ("yarn", 4.0)])
def test_other_positions_leave_nothing_of_the_old_ones(tiny_lm: Path, essays: Path, rope: Any, tmp_path: Path) -> None:
    """What is tried is what `extend-lm` would write: nothing of a former stretch may stay behind."""
    from transformers import AutoConfig

    path = tmp_path / "lm"
    shutil.copytree(tiny_lm, path)
    config = AutoConfig.from_pretrained(tiny_lm)
    old = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 512}
    config.rope_parameters = old
    config.save_pretrained(path)
    asked = TextNiahConfig(model=str(path), haystack=(essays,), lengths=(130,), rope=(rope,))
    got = plan_text(asked).model_config().rope_parameters
    want = {"rope_type": "default", "rope_theta": 1e6} if rope[0] == "theta" else old | {"factor": 4.0}
    assert {key: got[key] for key in want} == want
    assert rope[0] == "yarn" or got == want


def test_stretches_are_tried_as_if_the_model_had_them(tiny_lm: Path, essays: Path, tmp_path: Path) -> None:
    arguments = text_arguments(tiny_lm, essays, tmp_path / "a")
    assert run(*arguments, "--rope", "yarn:2,pi:2").exit_code == 0
    extended = ["extend-lm", "--model", str(tiny_lm), "--rope", "yarn", "--factor", "2", "--steps", "0"]
    assert run(*extended, "-o", str(tmp_path / "yarn")).exit_code == 0
    assert run(*text_arguments(tmp_path / "yarn", essays, tmp_path / "b")).exit_code == 0
    yarn, stock, pi = ([r["log_prob"] for r in results(tmp_path / d)] for d in ("a/yarn-2", "b", "a/pi-2"))
    assert yarn == stock != pi
    for wrong in ("yarn", "yarn:0.5", "longrope:2"):
        assert run(*arguments, "--rope", wrong).exit_code == 2


def test_lists_are_scored_by_what_is_written(tiny_lm: Path, essays: Path, tmp_path: Path) -> None:
    arguments = text_arguments(tiny_lm, essays, tmp_path / "a")
    arguments[arguments.index("130,200")] = "300"
    refused = run(*arguments, "--task", "multi-value")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    at = arguments.index("--scoring")
    arguments[at : at + 2] = ["--task", "multi-value", "--depths", "nested", "--kv-cache", "int8"]
    done = run(*arguments)
    assert done.exit_code == 0
    rows = results(tmp_path / "a")
    assert {(r["kv_cache"], r["share"], r["correct"]) for r in rows} == {("int8", 0, False)}
    assert all(len(r["answer"].split(", ")) == 4 and r["point"] is not None for r in rows)
    assert read_needle_results(tmp_path / "a").labels[-1] == "at the end"
