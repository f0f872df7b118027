"""Video-MME: three scorers, intervals against independent computations, runs that equal plain generation."""

import csv
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.eval.benchmarks.accuracy import accuracy, difference
from lvctx.eval.benchmarks.accuracy_plot import accuracy_series
from lvctx.eval.benchmarks.answers import BenchmarkReply, extract_letter, is_correct, is_degenerate, response_warnings
from lvctx.eval.benchmarks.responses import read_responses
from lvctx.eval.statistics import Difference, clustered_mean, paired_difference


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(autouse=True)
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are for terminals; with --json there are JSON lines in any case."""
    monkeypatch.setattr("lvctx.cli.output.stdout_is_terminal", lambda: True)


# --- letters


READ = [
    # reply, the released script's letter, lmms-eval 0.7.3's (both from running them), a strict reader's
    ("B", "B", "B", "B"),
    ("B.", "B", "B", "B"),
    ("(C)", "C", "C", "C"),
    ("The best answer is: D", "D", "D", ""),
    ("Best answer: C", "B", "C", ""),
    ("C. A man walks", "C", "C", "C"),
    ("A man walks a dog", "A", "A", ""),
    ("I cannot tell", "", "", ""),
    ("Considering option A, I choose (B)", "C", "B", ""),
    ("the answer is (d)", "", "", ""),
    ("Answer: B) Blue", "B", "B", ""),
    ("It is not A. The answer is C", "A", "C", ""),
    ("Both A and D", "B", "D", ""),
    ("D\nBecause B is wrong", "D", "D", "D"),
    ("", "", "", ""),
]


@pytest.mark.parametrize(("text", "official", "lmms", "strict"), READ)
def test_each_rule_reads_the_letter_that_its_scorer_reads(text: str, official: str, lmms: str, strict: str) -> None:
    reply = BenchmarkReply(id="1", video="v", answer="C", response=text)
    assert [extract_letter(reply, rule) for rule in ("official", "lmms-eval", "strict")] == [official, lmms, strict]
    assert is_correct(reply, "official") is (official == "C" if official else None)
    assert is_correct(reply, "lmms-eval") is (lmms == "C")
    assert is_correct(reply, "strict") is (strict == "C")


def test_signs_of_trouble() -> None:
    def replies(*texts: str) -> list[BenchmarkReply]:
        return [BenchmarkReply(id=str(i), video="v", answer="ABCD"[i % 4], response=t) for i, t in enumerate(texts)]

    assert response_warnings(replies(*"ABCDABCD")) == []
    assert response_warnings(replies(*"AAAAAAAA")) == ["8 of 8 letters are A, the answer to 25% of the questions"]
    assert response_warnings(replies("A", "", "!!!!!!!!", "the the the the the")) == [
        "1 of 4 replies are empty",
        "2 of 4 replies repeat one token",
    ]
    assert not any(map(is_degenerate, ["A", "no no", "Mississippi", "A. The man and the dog and the man", "100"]))


# --- intervals


def test_intervals_equal_a_bootstrap_over_videos_and_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    ability = rng.random(200)
    sizes = rng.integers(1, 6, 200)
    clusters = np.repeat(np.arange(200), sizes)
    values = (rng.random(len(clusters)) < ability[clusters]).astype(float)
    found = clustered_mean(values.tolist(), [str(c) for c in clusters])
    assert found.mean == pytest.approx(values.mean())
    sums, counts = np.bincount(clusters, weights=values), np.bincount(clusters)
    drawn = rng.integers(0, 200, (20_000, 200))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    assert found.low is not None
    assert found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * means.std(), rel=0.03)
    naive = 1.96 * values.std() / np.sqrt(len(values))
    assert (found.high - found.low) / 2 > 1.2 * naive, "correlated questions are worth fewer answers"
    # With clusters of one size the mean is that of independent cluster means: the textbook's standard error.
    thirds = rng.random((50, 3)).round()
    even = clustered_mean(thirds.ravel().tolist(), [str(i) for i in range(50) for _ in range(3)])
    assert even.high is not None
    assert even.high - thirds.mean() == pytest.approx(1.959964 * thirds.mean(1).std(ddof=1) / np.sqrt(50))


def test_p_values_equal_sign_flips_and_needed_questions_find_the_difference() -> None:
    """Of three differences per video that are -1, 0 or 1 and correlated."""
    rng = np.random.default_rng(1)

    def draw(videos: int, mean: float) -> np.ndarray:
        lean = rng.normal(mean, 0.3, (videos, 1))
        return np.clip(np.rint(lean + rng.normal(0, 0.4, (videos, 3))), -1, 1)

    def compare(values: np.ndarray, detect: float) -> Difference:
        clusters = np.repeat(np.arange(len(values)), 3).astype(str)
        return paired_difference(values.ravel().tolist(), clusters.tolist(), detect=detect)

    sample = draw(300, 0.07)
    found = compare(sample, 0.05)
    flips, seen = abs(rng.choice([-1, 1], (20_000, 300)) @ sample.sum(1)), abs(sample.sum())
    assert found.p_value == pytest.approx((np.mean(flips > seen) + np.mean(flips >= seen)) / 2, abs=0.015)
    assert found.needed is not None
    shift = 0.05 / draw(200_000, 0.1).mean() * 0.1  # a mean of 0.05, as the mean is nearly linear in it
    enough = [compare(draw(found.needed // 3, shift), 0.05).p_value for _ in range(200)]
    assert np.mean([p is not None and p < 0.05 for p in enough]) == pytest.approx(0.8, abs=0.1)


def test_differences_at_the_edges() -> None:
    assert paired_difference([], []).p_value is None
    assert paired_difference([1.0, 0.0], ["v", "v"]).needed is None
    same = paired_difference([0.0] * 9, [str(i // 3) for i in range(9)])
    assert (same.mean, same.p_value, same.needed) == (0, 1, None)
    assert paired_difference([1.0] * 6, [str(i) for i in range(6)]).p_value == 2 * 0.5**6, "a sign test"


def test_intervals_at_the_edges() -> None:
    assert clustered_mean([], []).mean is None
    alone = clustered_mean([1.0, 0.0, 1.0], ["v"] * 3)
    assert (alone.mean, alone.low, alone.high) == (pytest.approx(2 / 3), None, None)
    perfect = clustered_mean([1.0] * 30, [str(i // 3) for i in range(30)])
    z2 = 1.959964**2
    assert (perfect.low, perfect.high) == pytest.approx((10 / (10 + z2), 1)), "Wilson's interval of 10 of 10"


# --- files


def item(video: str, number: int, answer: str, response: str, **of_video: str) -> dict[str, Any]:
    return {
        "question_id": f"{video}-{number}",
        "task_type": ["Counting Problem", "OCR Problems", "Action Reasoning"][number % 3],
        "question": "What?",
        "options": ["A. a", "B. b", "C. c", "D. d"],
        "answer": answer,
        "response": response,
    }


def videos(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    made = []
    for v in range(count):
        ease = rng.random()
        questions = []
        for q in (1, 2, 3):
            answer = rng.choice("ABCD")
            said = answer if rng.random() < ease else rng.choice(["A", "B.", "(C)", "I cannot tell", "Answer: D"])
            questions.append(item(f"{v:03}", q, answer, said))
        made.append(
            {
                "video_id": f"{v:03}",
                "duration": ("short", "medium", "long")[3 * v // count],
                "domain": ("Knowledge", "Life Record")[v % 2],
                "sub_category": "Law",
                "questions": questions,
            }
        )
    return made


def test_others_files_are_read_leniently_and_every_leniency_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "theirs.json"
    file.write_text(
        """[
        {"video_id": "001", "duration_category": "short", "video_category": "Knowledge", "video_subcategory": "Law",
         "questions": [
            {"question_id": "001-1", "task_type": "OCR Problems", "question": "a, ]?", "choices": ["A. x", "B. y",],
             "answer": "A", "response": "A",},
            {"question_id": "001-2", "task_type": "OCR Problems", "answer": "B"},
            {"question_id": "001-3", "task_type": "OCR Problems", "response": "B"},
         ]},
        {"video_id": "002", "duration": "long", "missing": true, "questions": [{"answer": "A"}]},
        {"duration": "long", "sub_category": "Law", "questions": [{"answer": "C", "response": "(C)"}]},
        ]"""
    )
    read = read_responses(file)
    assert [(r.id, r.answer, r.response, r.groups["duration"]) for r in read.replies] == [
        ("001-1", "A", "A", "short"),
        ("001-2", "B", "", "short"),
        ("2-1", "C", "(C)", "long"),
    ]
    assert read.leniencies == {
        "trailing commas": 4,
        "questions without response, read as empty": 1,
        "questions without answer, left out": 1,
        "videos marked missing, left out": 1,
        "without video_id": 1,
        "without domain": 1,
        "without question_id": 1,
        "without task_type": 1,
    }
    rows = [json.loads(line) for line in run("videomme", "score", file, "--json").stdout.splitlines()]
    assert rows[0]["rules"]["official"]["counted"] == 2
    assert rows[0]["rules"]["official"]["mean"] == 1.0
    assert rows[0]["rules"]["lmms-eval"]["mean"] == pytest.approx(2 / 3)
    (tmp_path / "broken.json").write_text('[{"video_id": ')
    assert run("videomme", "score", tmp_path / "broken.json").exit_code == 3
    (tmp_path / "other.json").write_text('{"answer": "A"}')
    assert run("videomme", "score", tmp_path / "other.json").exit_code == 3


def test_a_report_of_two_files(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        made = videos(60, 7)
        rng = random.Random(seed)
        for video in made:
            for question in video["questions"]:
                if rng.random() < 0.3:
                    question["response"] = rng.choice("ABCD")
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    files = (tmp_path / "a.json", tmp_path / "b.json")
    done = run("videomme", "score", *files, "--csv", tmp_path / "c.csv", "--plot", tmp_path / "p.png", "--json")
    assert done.exit_code == 0, done.output
    first, second, versus = map(json.loads, done.stdout.splitlines())
    for rule in ("official", "lmms-eval", "strict"):
        a, b = (read_responses(f).replies for f in files)
        pairs = [(is_correct(x, rule), is_correct(y, rule)) for x, y in zip(a, b, strict=True)]
        expected = [float(x) - float(y) for x, y in pairs if x is not None and y is not None]
        assert versus["difference"][rule]["mean"] == pytest.approx(np.mean(expected))
        assert versus["difference"][rule]["counted"] == len(expected)
        assert versus["difference"][rule]["low"] < np.mean(expected) < versus["difference"][rule]["high"]
        # Paired, both runs answer mostly alike: the interval is narrower than that of two unrelated runs.
        wide = [s["rules"][rule]["high"] - s["rules"][rule]["low"] for s in (first, second)]
        assert versus["difference"][rule]["high"] - versus["difference"][rule]["low"] < np.hypot(*wide)
    assert difference(a, a, "strict").mean == 0
    with open(tmp_path / "c.csv", newline="") as f:
        cells = list(csv.DictReader(f))
    whole = [c for c in cells if (c["duration"], c["domain"], c["task_type"]) == ("all", "all", "all")]
    assert [float(c["mean"]) for c in whole[:4]] == [first["rules"][r]["mean"] for r in first["rules"]]
    leaves = [c for c in cells if "all" not in (c["duration"], c["domain"], c["task_type"]) and c["file"] == "a"]
    assert sum(int(c["counted"]) for c in leaves if c["rule"] == "strict") == 180
    short = accuracy([r for r in a if r.groups["duration"] == "short"], "official")
    assert first["by_duration"]["short"]["official"]["mean"] == short.mean
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    text = run("videomme", "score", files[0]).stdout
    assert "60 videos" in text
    assert "Life Record" in text


def finish_run(folder: Path, frames: int, made: list[dict[str, Any]], failed: int = 0) -> Path:
    """A run's directory as `run` leaves it, with the rows that scoring reads."""
    folder.mkdir()
    (folder / "responses.json").write_text(json.dumps(made))
    rows = [{"key": str(i), "frames": frames, "response": "A"} for i in range(3 * len(made))]
    rows += [{"key": f"x{i}", "error": "no video"} for i in range(failed)]
    rows += rows[-failed:] if failed else []  # asked again in vain: still one question
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What gets drawn: the arguments of every call, which goes on as it would."""
    from lvctx.eval.benchmarks import accuracy_plot

    calls, draw = [], accuracy_plot.draw_accuracy
    monkeypatch.setattr(accuracy_plot, "draw_accuracy", lambda *given: (calls.append(given), draw(*given)))
    return calls


def test_several_runs_are_drawn_over_their_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given in no order; the points are worked out from the files' letters by hand."""
    calls = drawn(monkeypatch)
    files = {n: finish_run(tmp_path / f"{n}-frames", n, videos(30, n)) for n in (128, 8, 32)}
    done = run("videomme", "score", *files.values(), "--rule", "lmms-eval", "--plot", tmp_path / "p.svg")
    assert done.exit_code == 0, done.output
    ((scores, frames, rule, target),) = calls
    assert (frames, rule, target) == ([128, 8, 32], "lmms-eval", tmp_path / "p.svg")
    lines = accuracy_series(scores, frames, rule)
    assert list(lines) == ["short", "medium", "long", "all"]
    for name, points in lines.items():
        assert [p.x for p in points] == [8, 32, 128]
        for point in points:
            replies = read_responses(files[int(point.x)]).replies
            right = [extract_letter(r, rule) == r.answer for r in replies if name in ("all", r.groups["duration"])]
            assert point.mean == pytest.approx(100 * sum(right) / len(right))
            assert point.low < point.mean < point.high
    picture = (tmp_path / "p.svg").read_text()
    assert all(f">{word}<" in re.sub(r"<!-- (.*?) -->", r">\1<", picture) for word in ("frames", "128", "8", "medium"))


def test_runs_of_as_many_frames_are_bars_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = drawn(monkeypatch)
    files = [finish_run(tmp_path / name, 8, videos(30, seed)) for seed, name in enumerate("ab")]
    only_short = [v for v in videos(30, 2) if v["duration"] == "short"]
    (tmp_path / "responses.json").write_text(json.dumps(only_short))
    files.append(tmp_path / "responses.json")
    assert run("videomme", "score", *files, "--plot", tmp_path / "p.png").exit_code == 0
    ((scores, frames, rule, _),) = calls
    assert frames is None
    bars = accuracy_series(scores, None, rule)
    assert {name: [p.x for p in points] for name, points in bars.items()} == {
        "a": [0, 1, 2, 3],
        "b": [0, 1, 2, 3],
        "responses": [0, 3],
    }
    assert bars["b"][3].mean == pytest.approx(100 * scores[1]["rules"]["official"]["mean"])


def test_failures_are_reported_and_files_with_the_same_name_distinguished(tmp_path: Path) -> None:
    for name, failed in (("a", 0), ("b", 2)):
        finish_run(tmp_path / name, 8, videos(4, 0), failed)
    files = [tmp_path / name / "responses.json" for name in "ab"]
    rows = [json.loads(line) for line in run("videomme", "score", *files, "--json").stdout.splitlines()]
    assert [row.get("failed") for row in rows] == [0, 2, None]
    assert (rows[2]["first"], rows[2]["second"]) == tuple(map(str, files))
    said = run("videomme", "score", tmp_path / "b").stdout
    assert "12 questions about 4 videos, 2 failed and left out" in said


@pytest.mark.alone
def test_scoring_2700_questions_takes_a_second_and_no_torch(tmp_path: Path) -> None:
    """Seconds of CPU, which a busy machine does not change."""
    (tmp_path / "r.json").write_text(json.dumps(videos(900, 0)))
    code = "import sys, time; sys.argv = ['lvctx', 'videomme', 'score', 'r.json']\nfrom lvctx.__main__ import main\n"
    code += "try: main()\nfinally: print('TORCH' if 'torch' in sys.modules else 'LIGHT', time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    kind, seconds = done.stdout.split()[-2:]
    row = json.loads(done.stdout.splitlines()[0])
    assert (row["questions"], row["videos"]) == (2700, 900)
    assert kind == "LIGHT"
    assert float(seconds) < 1


def test_warnings_come_first(tmp_path: Path) -> None:
    made = videos(10, 0)
    for video in made:
        for question in video["questions"]:
            question["response"] = "A"
    (tmp_path / "r.json").write_text(json.dumps(made))
    assert run("videomme", "score", tmp_path / "r.json").stdout.startswith("WARNING r: 30 of 30 letters are A")
