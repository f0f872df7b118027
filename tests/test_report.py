"""The page of `lvctx report`: what it is made of, that texts stay texts, and how it behaves in a browser."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import browser, report_runs
from typer.testing import CliRunner

from lvctx.artifacts.jsonl_log import read_jsonl, write_jsonl
from lvctx.artifacts.result_log import RESULTS
from lvctx.cli.app import app
from lvctx.eval.benchmarks import longvideobench, mlvu, nextqa, vhs, videomme
from lvctx.eval.benchmarks.accuracy import read_benchmark_run
from lvctx.eval.benchmarks.score_run import as_responses
from lvctx.eval.cost_summary import summarize_costs
from lvctx.eval.niah.frame_needles import FrameNeedles
from lvctx.eval.niah.job import input_facts
from lvctx.eval.niah.needle_sets import find_needles
from lvctx.eval.niah.niah_config import VideoNiahConfig
from lvctx.eval.niah.results import read_needle_results
from lvctx.eval.report.collect import ReportData, collect_report
from lvctx.eval.report.page import SCRIPTS, render_page
from lvctx.eval.report.thumbnails import Thumbnails
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling

PACKAGE = Path(__file__).resolve().parent.parent / "lvctx" / "eval" / "report"
HOSTILE = "</script><script>document.title='run'</script><!-- <img src=x onerror=\"document.title='run'\"> & \u2028 B"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)], catch_exceptions=False)


def collect(*paths: Path, thumbnails: int = 0) -> ReportData:
    return collect_report(paths, thumbnails=thumbnails, threshold=0.9, on_progress=lambda done, total, note: None)


class Elements(HTMLParser):
    """The elements of a page and the text in each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.texts[-1] += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of every kind."""
    here = tmp_path_factory.mktemp("runs")
    report_runs.needle_run(here / "needles", seed=1, reach=100_000)
    report_runs.benchmark_run(here / "first", seed=1, skill=0.6)
    report_runs.benchmark_run(here / "second", seed=2, skill=0.4, failed=6)
    report_runs.training_run(here / "model", seed=0, steps=1200)
    report_runs.answers_file(here / "answers.jsonl", video=here / "gone<img src=x>.mp4", replies=("Bicycles.", HOSTILE))
    return here


def test_needles_have_the_results_of_niah_report_and_every_trial(runs: Path) -> None:
    (section,) = collect(runs / "needles").runs
    results = read_needle_results(runs / "needles")
    assert section["grid"] == results.to_dict(0.9)
    assert len(section["trials"]) == section["samples"] == 150
    rows = read_jsonl(runs / "needles" / RESULTS)
    for d in range(len(results.depths)):
        for n in range(len(results.lengths)):
            trials = [t for t in section["trials"] if t["cell"] == [d, n]]
            assert sum(t["verdict"] == "right" for t in trials) == results.correct[d][n]
            assert sum(t["verdict"] != "failed" for t in trials) == results.trials[d][n]
    assert [t["log_prob"] for t in section["trials"] if "log_prob" in t] == [
        r["log_prob"] for r in rows if "error" not in r
    ]
    assert section["failures"] == [{"error": "CUDA out of memory", "count": 1}]
    assert section["beyond"] == 3, "two of five lengths exceed 224,000 tokens"


def test_a_benchmark_has_the_scores_of_its_command_and_each_rules_verdict(runs: Path) -> None:
    data = collect(runs / "first", runs / "second")
    first = data.runs[0]
    scored = read_benchmark_run(runs / "first", videomme)
    expected = videomme.score(as_responses(scored, "first"))
    assert first["rules"] == expected["rules"]
    assert first["by"]["duration"] == expected["by_duration"]
    for i, rule in enumerate(first["rules"]):
        verdicts = [q["verdicts"][i]["correct"] for q in first["questions_list"]]
        counted = [v for v in verdicts if v is not None]
        assert (len(counted), sum(counted) / len(counted)) == (
            expected["rules"][rule]["counted"],
            pytest.approx(expected["rules"][rule]["mean"]),
        )
    done = CliRunner().invoke(
        app, ["videomme", "score", *(str(write_responses(runs / n)) for n in ("first", "second")), "--json"]
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    (pair,) = data.comparisons
    assert {rule: pair["rules"][rule] for rule in pair["rules"]} == lines[-1]["difference"]
    failed = [q for q in data.runs[1]["questions_list"] if "error" in q]
    assert len(failed) == 6
    assert not any("verdicts" in q for q in failed)


def write_responses(directory: Path) -> Path:
    """A run's replies as a responses file."""
    rows = [row for row in read_jsonl(directory / RESULTS) if "error" not in row]
    videos: dict[str, dict[str, Any]] = {}
    for row in rows:
        video = videos.setdefault(row["video"], {**row["groups"], "video_id": row["video"], "questions": []})
        fields = {"question_id": row["id"], "task_type": row["groups"]["task_type"], "question": row["question"]}
        video["questions"].append({**fields, **{k: row[k] for k in ("options", "answer", "response")}})
    target = directory.with_suffix(".json")
    target.write_text(json.dumps(list(videos.values())))
    return target


@pytest.mark.parametrize(
    ("bench", "answer", "letters", "groups", "responses"),
    [
        (nextqa, "B", "ABCDE", {"kind": "causal", "type": "CW"}, ("B", "C.", "", "Answer: B")),
        (mlvu, "B", "ABCD", {"task_type": "count"}, ("B", "(B)", "none", "A")),
        (mlvu, "A man walks.", "", {"task_type": "summary"}, ("A man.", "Walks.", "", "x")),
        (longvideobench, "B", "ABCD", dict.fromkeys(longvideobench.GROUPS, "15"), ("B", "?", "D", "B.")),
        (vhs, "yes", "", {"images": "2"}, ("Yes.", "No.", "Yes and no.", "maybe")),
    ],
)
def test_every_benchmarks_verdicts_add_up_to_its_score(
    bench: Any, answer: str, letters: str, groups: dict[str, str], responses: tuple[str, ...], tmp_path: Path
) -> None:
    shared = {"schema": "lvctx.questions/1", "bench": bench.NAME, "answer": answer, "letters": letters}
    rows = {
        str(i): {**shared, "groups": groups, "id": str(i), "video": f"v{i}", "response": response}
        for i, response in enumerate(responses)
    }
    report_runs.write_rows(tmp_path / "run", {"model": "m"}, rows)
    (section,) = collect(tmp_path / "run").runs
    for i, estimate in enumerate(section["rules"].values()):
        verdicts = [question["verdicts"][i] for question in section["questions_list"]]
        counted = [v["correct"] for v in verdicts if v["correct"] is not None]
        assert len(counted) == estimate["counted"]
        assert not counted or sum(counted) / len(counted) == pytest.approx(estimate["mean"])
        if estimate["counted"]:
            assert sum(v.get("letter") != "" for v in verdicts) / len(verdicts) == estimate["parsed"]
    assert render_page(collect(tmp_path / "run"))


def test_a_responses_file_is_a_run_too(runs: Path) -> None:
    (section,) = collect(write_responses(runs / "first")).runs
    (of_rows,) = collect(runs / "first").runs
    assert section["rules"] == of_rows["rules"]
    assert [q["verdicts"] for q in section["questions_list"]] == [q["verdicts"] for q in of_rows["questions_list"]]


def test_a_directory_of_runs_and_the_curves_and_costs_of_a_training(runs: Path) -> None:
    data = collect(runs)
    assert [(r["kind"], r["name"].split("/")[1]) for r in data.runs] == [
        ("benchmark", "first"), ("training", "model"), ("needles", "needles"), ("benchmark", "second"),
    ]  # fmt: skip
    training = data.runs[1]
    rows = read_jsonl(runs / "model" / "metrics.jsonl")
    assert (training["costs"]["samples"], training["costs"]["total"]["tokens"]) == (1200, 1200 * 224_000)
    step, loss = training["curves"]["loss"][0]
    assert (step, loss) == (3, pytest.approx(sum(row["loss"] for row in rows[:3]) / 3))
    assert len(training["curves"]["lr_lm"]) == 400


def test_costs_leave_out_what_failed(runs: Path) -> None:
    (section,) = collect(runs / "second").runs
    assert section["costs"] == summarize_costs(read_jsonl(runs / "second" / RESULTS))["cost"]
    assert section["costs"]["total"]["tokens_in"] == 54 * 4_700, "without those that failed"


def test_what_a_reply_contains_is_data(runs: Path) -> None:
    data = collect(runs / "answers.jsonl")
    page = render_page(data)
    assert HOSTILE.partition(" ")[0] not in page
    parsed = Elements(page)
    tags = [tag for tag, _ in parsed.found]
    assert tags.count("script") == 3
    assert tags.count("img") == 0
    content, images, script = parsed.texts
    assert json.loads(content)["runs"][0]["questions_list"][1]["response"] == HOSTILE
    assert json.loads(images) == []
    policy = next(a["content"] or "" for tag, a in parsed.found if tag == "meta" and "http-equiv" in a)
    allowed = re.search("script-src '(sha256-[^']+)'", policy)
    assert allowed is not None
    assert allowed[1] == "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_the_page_names_no_other_file_and_is_the_same_each_time(runs: Path) -> None:
    page = render_page(collect(runs / "first"))
    assert page == render_page(collect(runs / "first"))
    assert {a.get("src") or a.get("href") for _, a in Elements(page).found} <= {None, "data:,", "#main"}
    sources = "".join((PACKAGE / name).read_text() for name in ("report.css", "report.html", *SCRIPTS))
    assert (
        re.findall(
            r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|innerHTML|insertAdjacentHTML|document\.write|eval\(",
            sources,
        )
        == []
    )


def test_numbers_that_json_lacks_and_half_characters(runs: Path, tmp_path: Path) -> None:
    rows = read_jsonl(runs / "needles" / RESULTS)
    for row in rows:
        row |= {"log_prob": float("-inf"), "generated": "\ud83d"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RESULTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(tmp_path / "run", "-o", tmp_path / "page.html").exit_code == 0
    content = Elements((tmp_path / "page.html").read_text()).texts[0]
    assert json.loads(content, parse_constant=pytest.fail)["runs"][0]["trials"][0]["log_prob"] is None


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (RESULTS, ""),
        (RESULTS, '{"key": "a"}\n'),
        (RESULTS, '{"key": "a", "schema": "lvctx.niah/1", "length": "x"}\n'),
        (RESULTS, '{"key": "a", "schema": "lvctx.questions/1", "bench": "answers", "id": "1", "video": "v"}\n'),
        (RESULTS, '{"key": "a", "schema": "lvctx.questions/1", "bench": "../x", "id": "1", "video": "v"}\n'),
        (RESULTS, '{"key": "a", "schema": "lvctx.questions/1", "bench": "nextqa", "id": "1", "video": "v"}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": null}\n'),
        ("answers.jsonl", '{"schema": "lvctx.answer/1"}\n'),
        ("notes.txt", "text"),
        ("responses.json", "{}"),
    ],
)  # fmt: skip
def test_bad_results_are_3(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    for path in (tmp_path / file, tmp_path):
        done = run(path, "-o", tmp_path / "page.html")
        assert done.exit_code == 3
        assert str(tmp_path) in done.output
    assert not (tmp_path / "page.html").exists()


def test_other_errors(runs: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "none", "-o", tmp_path / "page.html").exit_code == 3
    assert run(runs / "first", "-o", runs / "first" / RESULTS).exit_code == 2
    assert run(runs / "first").exit_code == 2


def test_a_run_in_which_all_failed_is_shown(tmp_path: Path) -> None:
    report_runs.benchmark_run(tmp_path / "run", seed=0, skill=0.5, questions=6, failed=6)
    (section,) = collect(tmp_path / "run").runs
    assert sum(f["count"] for f in section["failures"]) == 6
    assert "rules" not in section


@pytest.mark.nano
def test_thumbnails_are_frames_that_the_model_was_shown(nano: Any, tmp_path: Path) -> None:
    clip = nano.clips / "bikes.mp4"
    report_runs.benchmark_run(tmp_path / "run", seed=0, skill=0.5, questions=6, video=clip)
    report_runs.answers_file(tmp_path / "answers.jsonl", video=clip, replies=("Bicycles.",))
    data = collect(tmp_path / "run", tmp_path / "answers.jsonl", thumbnails=3)
    shown = [round(frame.pts, 3) for frame in read_video(clip, VideoSampling(frames=32))]
    of_run = data.runs[0]["questions_list"][0]["images"]
    times = [data.images[number]["seconds"] for number in of_run]
    assert len(times) == 3
    assert (times[0], times[2]) == (shown[0], shown[-1])
    assert set(times) <= set(shown)
    assert all(q["images"] == of_run for q in data.runs[0]["questions_list"]), "one video, decoded once"
    assert [data.images[n]["seconds"] for n in data.runs[1]["questions_list"][0]["images"]] == [0.0, 1.0, 2.0]
    jpeg = base64.b64decode(data.images[0]["jpeg"])
    assert jpeg.startswith(b"\xff\xd8")
    assert len(jpeg) < 10_000
    assert collect(tmp_path / "run").images == []


def test_thumbnails_of_needles_and_missing_videos(runs: Path) -> None:
    data = collect(runs / "needles", runs / "answers.jsonl", thumbnails=2)
    assert len(data.images) == 5, "one of each needle, and none of a haystack that is gone"
    captions = {caption for trial in data.runs[0]["trials"] for caption, _ in trial["images"]}
    assert captions == {"needle"}
    assert data.videos_without_images == 1


@pytest.mark.parametrize(
    "options",
    [
        {"question": "code"},
        {"question": "code", "count": 3, "distractors": 2},
        {"question": "hops", "count": 3},
        {"question": "count", "count": 3, "needle_frames": 2},
        {"distractors": 2},
    ],
)
def test_thumbnails_of_several_needles_are_the_first_of_each_trial(options: dict[str, Any]) -> None:
    config = VideoNiahConfig(model="m", haystack=(Path("h"),), lengths=(4,), trials=2, seed=3, **options)
    task = FrameNeedles(find_needles(config, 48), seconds=np.arange(4.0), question=config.question)
    facts = {**input_facts(config, task), "made_of": {"seed": 3}}
    rows = [{**asdict(cell), **facts} for cell in task.cells([4], [0.5], 2)]
    images = Thumbnails(1, lambda done, total, note: None)
    assert images.of_needles(rows) == {row["needle"]: row["trial"] for row in rows}
    first = task.needles[0].image.convert("RGB")
    shown = Image.open(io.BytesIO(base64.b64decode(images.images[0]["jpeg"])))
    assert np.abs(np.asarray(first).astype(int) - np.asarray(shown)).mean() < 16


@pytest.mark.nano
@pytest.mark.parametrize(
    "values",
    [
        {"fps": "x"},
        {"fps": -1.0},
        {"fps": float("inf")},
        {"frames": 10**13},
        {"frames": "8"},
        {"frames": 8, "fps": 1.0},
        {"start": 1e9},
        {"end": [1]},
    ],
)
def test_what_cannot_be_sampled_has_no_images(values: dict[str, Any], nano: Any) -> None:
    images = Thumbnails(2, lambda done, total, note: None)
    assert images.of_video(str(nano.clips / "bikes.mp4"), sampling=values) == []
    assert images.of_video("/dev/zero", sampling={"frames": 2}) == []
    source = {"source": "drawn", "size": 10**9, "distractors": 0}
    row = {"trial": 0, "needle": "a", "position": 0, "length": 1, "modality": "video", "haystack": ["/dev/zero"]}
    small = {**source, "size": 48}
    many = ({**small, name: 10**9} for name in ("distractors", "count", "needle_frames"))
    odd = ({**small, "count": [2]}, {**small, "question": []}, {**small, "question": "hops"})
    for needles in (source, {**source, "size": "x"}, {}, {"source": "/nowhere", "size": 1}, *many, *odd):
        assert images.of_needles([{**row, "needles": needles, "made_of": {"seed": 0}}]) == {}
    assert images.of_haystack([row]) == {}
    assert images.images == []


@pytest.mark.nano
def test_a_needle_is_shown_between_the_frames_around_it(nano: Any, tiny_tower: Path, tmp_path: Path) -> None:
    """In a haystack that is a frames artifact, and in one that is the clip itself."""
    clip, artifact = nano.clips / "bikes.mp4", tmp_path / "frames" / "bikes.frames.safetensors"
    encoding = ("encode-video", clip, "--model", tiny_tower, "--frames", 6, "-o", artifact.parent)
    assert CliRunner().invoke(app, [*map(str, encoding)], catch_exceptions=False).exit_code == 0
    report_runs.needle_run(tmp_path / "run", seed=1, reach=100_000)
    row = next(r for r in read_jsonl(tmp_path / "run" / RESULTS) if r["trial"] == 0) | {"length": 2, "position": 1}
    for name, haystack in (("cache", artifact), ("clip", clip)):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / RESULTS, [{**row, "haystack": [str(haystack)]}])
    report_runs.answers_file(tmp_path / "answers.jsonl", video=artifact, replies=("A street.",))
    data = collect(*(tmp_path / name for name in ("cache", "clip", "answers.jsonl")), thumbnails=6)
    pts = [round(frame.pts, 3) for frame in read_video(clip, VideoSampling(frames=6))]
    seconds = [round(frame.pts, 3) for frame in read_video(clip, VideoSampling(fps=1))]
    for section, times in zip(data.runs, (pts, seconds), strict=False):
        (trial,) = section["trials"]
        shown = [(caption, data.images[number]["seconds"]) for caption, number in trial["images"]]
        assert shown == [("frame before", times[0]), ("needle", None), ("frame after", times[1])]
    assert [data.images[number]["seconds"] for number in data.runs[2]["questions_list"][0]["images"]] == pts


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_can_be_parsed() -> None:
    script = "\n".join((PACKAGE / name).read_text() for name in SCRIPTS)
    subprocess.run(["node", "--check", "-"], input=script, text=True, check=True)


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    if reason := browser.missing():
        pytest.skip(reason)
    with browser.headless() as window:
        yield window


def opened(chromium: browser.Browser, page: Path, *arguments: object) -> None:
    """Write a report and open it; nothing may be reported in the console."""
    assert run(*arguments, "-o", page).exit_code == 0
    chromium.open(page.as_uri())


def test_in_a_browser(runs: Path, tmp_path: Path, chromium: browser.Browser) -> None:
    paths = [runs / name for name in ("needles", "first", "second", "answers.jsonl", "model")]
    opened(chromium, tmp_path / "page.html", *paths)
    headings = chromium.run("return [...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert headings == ["Runs", "Needle tests", "Benchmarks", "Answers", "Training", "Costs", "Provenance"]
    assert "7 samples failed" in chromium.text(".notice")

    cell = ".heat tbody tr:nth-child(4) td:last-child button"
    assert "60%" in chromium.run("return document.querySelector(arguments[0]).ariaLabel", cell)
    chromium.click(cell)
    panel = chromium.text(".panel")
    assert panel.count("Trial ") == 5
    assert all(words in panel for words in ("log-probability", "What color is the", "CUDA out of memory"))
    assert chromium.run("return document.activeElement.textContent").startswith("Depth 60%, 3,000 frames")
    chromium.press("\ue00c")  # Escape
    assert chromium.run("return document.querySelectorAll('.panel').length") == 0
    assert chromium.run("return document.activeElement === document.querySelector(arguments[0])", cell)

    (first,) = collect(runs / "first").runs
    rules = list(first["rules"])
    state = "[...document.querySelectorAll('#run-1 [role=status]')].map(s => s.textContent)[0]"
    choose = f"""
      const has = (s) => [...s.options].some((o) => o.value === arguments[0]);
      const s = [...document.querySelectorAll('#run-1 select')].find(has);
      s.value = arguments[0];
      s.dispatchEvent(new Event('change'));
      return {state}"""
    for rule in rules:
        chromium.run(choose, rule)
        verdicts = [q["verdicts"][rules.index(rule)] for q in first["questions_list"]]
        wanted = {
            "right": sum(v["correct"] is True for v in verdicts),
            "wrong": sum(v["correct"] is False for v in verdicts),
            "unparsed": sum(v["letter"] == "" for v in verdicts),
            "disagreement": sum(len({v["correct"] for v in q["verdicts"]}) > 1 for q in first["questions_list"]),
            "all": 60,
        }
        for verdict, count in wanted.items():
            assert chromium.run(choose, verdict) == f"{count} of 60 questions", (rule, verdict)
    assert chromium.run("return document.querySelectorAll('#run-1 .list > li').length") == 25
    chromium.click("#run-1 .pages button:last-child")
    assert "Page 2 of 3" in chromium.text("#run-1 .pages")
    chromium.type("#run-1 input[type=search]", "How OFTEN")
    assert chromium.run(f"return {state}") == "15 of 60 questions"
    chromium.run("document.querySelector('#run-1 .list summary').focus()")
    chromium.press("\ue007")  # Enter
    chromium.wait_for("#run-1 .list details[open] dl")
    answer = chromium.text("#run-1 .list details[open]")
    assert all(words in answer for words in ("right answer", "strict", "second:", "Reasoning"))

    chromium.click("#run-3 .list > li:nth-child(2) summary")
    chromium.wait_for("#run-3 .list details[open] dl")
    assert HOSTILE.partition("\u2028")[0] in chromium.text("#run-3 .list details[open]")
    assert chromium.run("return document.title") == "lvctx report"
    assert chromium.run("return document.querySelectorAll('main img, main script').length") == 0
    assert chromium.log("browser") == []
    assert [url for url in chromium.requested() if not url.startswith("data:")] == [(tmp_path / "page.html").as_uri()]


def test_the_page_can_be_read_aloud(runs: Path, tmp_path: Path, chromium: browser.Browser) -> None:
    """Tables have captions and headers with a scope, controls have names, and no id occurs twice."""
    report_runs.benchmark_run(tmp_path / "failed", seed=0, skill=0.5, questions=6, failed=6)
    lvb = {"schema": "lvctx.questions/1", "bench": "longvideobench", "answer": "B", "letters": "ABCD", "response": "B"}
    lvb["groups"] = dict.fromkeys(longvideobench.GROUPS, "15")
    questions = {str(i): {**lvb, "id": str(i), "video": f"v{i}"} for i in range(2)}
    report_runs.write_rows(tmp_path / "lvb", {"model": "m"}, questions)
    paths = [runs / "needles", runs / "first", tmp_path / "failed", tmp_path / "lvb", runs / "model"]
    opened(chromium, tmp_path / "page.html", *paths)
    assert chromium.run("return document.querySelectorAll('h3').length") == 5
    chromium.run("for (const d of document.querySelectorAll('main details')) d.open = true")
    chromium.wait_for("#provenance details:last-of-type table")
    problems = """
      const found = [];
      for (const t of document.querySelectorAll('table')) {
        if (!t.caption?.textContent.trim()) found.push('table without caption');
        for (const h of t.querySelectorAll('th')) if (!h.scope) found.push('th without scope');
        for (const r of t.tBodies[0].rows) if (r.cells[0].scope !== 'row') found.push('row without th');
      }
      for (const b of document.querySelectorAll('button, a, summary'))
        if (!(b.ariaLabel || b.textContent).trim()) found.push('nameless ' + b.tagName);
      for (const i of document.querySelectorAll('input, select')) if (!i.labels.length) found.push('no label');
      for (const s of document.querySelectorAll('svg'))
        if (s.getAttribute('aria-hidden') !== 'true' && !s.getAttribute('aria-label')) found.push('nameless svg');
      for (const i of document.querySelectorAll('img')) if (!i.alt) found.push('img without alt');
      const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
      if (new Set(ids).size < ids.length) found.push('ids twice');
      return found;
    """
    assert chromium.run(problems) == []
    assert chromium.log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(
    scheme: str, runs: Path, tmp_path: Path, chromium: browser.Browser
) -> None:
    """By at least 4.5 to 1, WCAG's bound for small text."""
    chromium.set_scheme(scheme)
    opened(chromium, tmp_path / "page.html", *(runs / name for name in ("needles", "second")))
    ratios = """
      const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
      const luminance = (color) => {
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
          .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const under = (e) => {
        for (; e; e = e.parentElement) {
          const color = getComputedStyle(e).backgroundColor;
          if (color !== 'rgba(0, 0, 0, 0)') return color;
        }
      };
      const found = {};
      for (const e of document.querySelectorAll('.heat button, small, a, p, th, td, caption, .badge, summary, label')) {
        const [a, b] = [luminance(getComputedStyle(e).color), luminance(under(e))].sort((x, y) => x - y);
        const ratio = (b + 0.05) / (a + 0.05);
        const name = `${e.tagName} ${e.className}`;
        found[name] = Math.min(found[name] ?? 99, ratio);
      }
      return found;
    """
    shades = "for (let q = 0; q <= 10; q++) document.querySelector('.heat td').append("
    shades += "Object.assign(document.createElement('button'), { className: `q${q}` }))"
    chromium.run(shades)
    found = chromium.run(ratios)
    assert len(found) > 10
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}


@pytest.mark.alone
def test_2700_questions_open_in_a_second(tmp_path: Path, chromium: browser.Browser) -> None:
    report_runs.benchmark_run(tmp_path / "run", seed=0, skill=0.5, questions=2700)
    opened(chromium, tmp_path / "page.html", tmp_path / "run")
    times = []
    for _ in range(3):
        chromium.open((tmp_path / "page.html").as_uri())
        times.append(chromium.run("return performance.getEntriesByType('navigation')[0].domComplete"))
    assert min(times) < 1000
    assert chromium.text("[role=status]") == "2,700 of 2,700 questions"
