"""Every benchmark's format is read, asked and scored end to end; each scorer has the rule of its authors' script."""

import json
import re
import shutil
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import mrope_models
from test_questions import DATA, row_of, rows_of, run

from lvctx.errors import InputError
from lvctx.eval.benchmarks import (
    egoschema,
    longtimescope,
    longvideo_reason,
    longvideobench,
    lvbench,
    mlvu,
    timescope,
    vhs,
    videoeval_pro,
    videomme_v2,
    vnbench,
)
from lvctx.eval.benchmarks.answers import Question
from lvctx.eval.benchmarks.benchmark_list import BENCHMARKS, load_benchmark, run_command
from lvctx.eval.benchmarks.input_checks import read_questions
from lvctx.eval.benchmarks.run_benchmark import BenchmarkConfig, plan_benchmark, run_benchmark
from lvctx.eval.benchmarks.subtitles import read_subtitles
from lvctx.inference.engine import Engine
from lvctx.inference.engine_config import EngineConfig
from lvctx.inference.open_engine import open_engine
from lvctx.inference.sampling_params import SamplingParams
from lvctx.parallel.context import open_context
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.registry import open_vlm

SETS = DATA / "benchmarks"
FILES = {
    "videomme": DATA / "questions.json",
    "videomme-v2": SETS / "videomme_v2.jsonl",
    "lvbench": SETS / "lvbench.meta.jsonl",
    "timescope": SETS / "timescope.jsonl",
    "longtimescope": SETS / "longtimescope.jsonl",
    "vnbench": SETS / "vnbench.json",
    "egoschema": SETS / "egoschema.jsonl",
    "videoeval-pro": SETS / "videoeval_pro.jsonl",
    "longvideo-reason": SETS / "longvideo_reason.jsonl",
    "mlvu": SETS / "mlvu.json",
    "longvideobench": SETS / "longvideobench.json",
    "nextqa": DATA / "nextqa.csv",
}
SUBTITLES = SETS / "videomme-v2-subtitles"


def draw(path: Path) -> None:
    """Two seconds of a square that moves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(8):
            image = np.zeros((48, 64, 3), np.uint8)
            image[16:32, 6 * i : 6 * i + 16] = (200, 30, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mrope_models.save("qwen2_5_vl", tmp_path_factory.mktemp("model") / "vlm")


@pytest.fixture(scope="module")
def engine(saved: Path) -> Engine:
    return open_engine(open_vlm(saved), EngineConfig(device="cpu"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The videos of all samples, in the folders that the questions name."""
    folder = tmp_path_factory.mktemp("videos")
    draw(folder / "drawn.mp4")
    for name, file in FILES.items():
        for question in load_benchmark(name).samples(file):
            target = folder / name / (question.video if Path(question.video).suffix else f"{question.video}.mp4")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "drawn.mp4", target)
    return folder


def answered(
    name: str, engine: Engine, videos: Path, out: Path, questions: Path | None = None, subtitles: Path | None = None
) -> list[dict[str, Any]]:
    config = BenchmarkConfig(
        model="vlm",
        videos=videos / name,
        questions=questions or FILES[name],
        prompt="official",
        subtitles=subtitles,
        params=SamplingParams(max_new_tokens=1),
    )
    job = plan_benchmark(load_benchmark(name), config, engine, VideoSampling(frames=2))
    with open_context(device="cpu") as parallel:
        rows = run_benchmark(
            job, out, engine, parallel=parallel, resume="auto", force=False, on_progress=lambda *_: None
        )
        return list(rows)


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("videomme", "nextqa")])
def test_a_sample_of_every_format_is_asked_and_scored(name: str, engine: Engine, videos: Path, tmp_path: Path) -> None:
    rows = answered(name, engine, videos, tmp_path)
    expected = load_benchmark(name).samples(FILES[name])
    assert {row["id"] for row in rows} == {question.id for question in expected}
    assert not [row["error"] for row in rows if "error" in row]
    done = run("bench", name, "score", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    scored = rows_of(done)[0]
    lettered = [q for q in expected if q.options and q.answer]
    assert scored["questions"] == len(lettered)
    if "official" in scored:
        assert 0 < scored["official"]["chance"] < 1
        assert all(0 <= score["mean"] <= 1 for score in scored["official"]["scores"].values())


def test_videomme_v2_has_all_words_of_its_subtitles(engine: Engine, videos: Path, tmp_path: Path) -> None:
    lines = FILES["videomme-v2"].read_text().splitlines()
    (tmp_path / "first.jsonl").write_text("\n".join(line for line in lines if '-1"' in line))
    rows = answered("videomme-v2", engine, videos, tmp_path / "out", tmp_path / "first.jsonl", SUBTITLES)
    tokens = {row["id"]: row["tokens"] for row in rows}
    assert tokens["001-1"] > tokens["002-1"] > tokens["003-1"], "the same question with fewer words"
    words = read_subtitles(SUBTITLES / "001.jsonl")
    assert words.text == "A red square. It moves. Now"
    assert words.lines == ((0.0, 0.9, "A red square."), (1.05, 1.6, "It moves."), (2.4, 2.6, "Now"))
    question = videomme_v2.samples(FILES["videomme-v2"])[0]
    assert videomme_v2.prompt(question, "official", words.text).startswith(
        "These are the frames of a video. This video's subtitles are listed below:\nA red square. It moves. Now\n"
        "Question: Which color is the square at the start?\nA. red\nB. green\n"
    )
    assert videomme_v2.prompt(question, "official", None).startswith("These are the frames of a video.Question: ")


def test_bench_list_has_every_benchmark_and_its_prompts() -> None:
    rows = rows_of(run("bench", "list", "--json"))
    assert [row["bench"] for row in rows] == list(BENCHMARKS)
    for row in rows:
        assert {"title", "dataset", "questions", "videos", "license"} <= set(row)
        bench = load_benchmark(row["bench"])
        assert (bench.NAME, row["prompts"]) == (row["bench"], list(bench.STYLES))
        names = run_command(row["bench"]).split()[1:]
        if len(bench.STYLES) == 1:
            continue
        text = " ".join(run(*names, "--help").stdout.replace("│", " ").split())
        assert all(style in text for style in bench.STYLES), text
    table = run("bench", "list").stdout
    assert all(info.dataset in table for info in BENCHMARKS.values())


# --- bad input


@pytest.mark.parametrize("name", FILES)
def test_questions_of_another_benchmark_are_named(name: str) -> None:
    for other in BENCHMARKS:
        if other in (name, "vhs") or {name, other} == {"timescope", "longtimescope"}:
            continue
        with pytest.raises(InputError) as refused:
            read_questions(load_benchmark(other), FILES[name])
        named = "timescope" if name == "longtimescope" else name
        assert (refused.value.fix, BENCHMARKS[named].title in refused.value.what) == (run_command(named), True)


def test_folders_without_any_of_the_videos_or_subtitles(saved: Path, videos: Path, tmp_path: Path) -> None:
    flags = ["bench", "videomme-v2", "run", "--model", saved, "--questions", FILES["videomme-v2"], "--frames", 2]
    missing = run(*flags, "--videos", tmp_path / "gone", "-o", tmp_path / "out")
    others = run(*flags, "--videos", videos / "lvbench", "-o", tmp_path / "out")
    (tmp_path / "subtitles").mkdir()
    (tmp_path / "subtitles" / "abc.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello.\n")
    wrong = run(*flags, "--videos", videos, "--subtitles", tmp_path / "subtitles", "-o", tmp_path / "out")
    for done, where in ((missing, "gone"), (others, "lvbench"), (wrong, "subtitles")):
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (3, "", 1), done.stderr
        assert str(where) in done.stderr.partition(": ")[2].partition(":")[0]


def test_thousands_of_failed_rows_are_the_first_line_of_the_score(
    engine: Engine, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = answered("lvbench", engine, videos, tmp_path)[:1]
    failed = [{**row, "key": f"k{i}", "id": f"f{i}", "error": "no video x"} for i in range(3000)]
    for one in failed:
        del one["response"]
    with open(tmp_path / "results.jsonl", "a") as f:
        f.writelines(json.dumps(one) + "\n" for one in failed)
    scored = rows_of(run("bench", "lvbench", "score", tmp_path, "--json"))[0]
    assert scored["failed"] == 3000
    assert all(part in scored["warnings"][0] for part in ("3,000 of 3,003", "no video x"))
    monkeypatch.setattr("lvctx.cli.output.stdout_is_terminal", lambda: True)
    assert "3,000 of 3,003" in run("bench", "lvbench", "score", tmp_path).stdout.splitlines()[0]


# --- scorers, against the rules of the authors' scripts

PIECES = (
    "The best answer is", "Final Answer:", "Best answer:", "Answer:", "answer: ", "the option is ", "The answer is",
    "A", "B", "C", "D", "E", "(A", "(B)", ")", ".", " ", "\n", "none of them", "a", "b", "H", "é", "<answer>",
    "</answer>", "A</answer>", "Therefore the final answer is: ",
)  # fmt: skip
replies = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


def first_of(text: str, letters: str, phrases: list[str]) -> str:
    """Remove phrases, then the first letter; more than ten words without a letter have none either."""
    text = text.strip()
    for phrase in phrases:
        text = text.replace(phrase, "")
    return next((character for character in text if character in letters), "")


V2 = ["Final Answer:", "The best answer is", "The correct answer is", "The answer is", "The answer"]
V2 += ["The best option is", "The correct option is", "Best answer:", "Best option:", "Answer:", "Option:"]
BY_HAND = {
    # Percent for 0000, 0001, 0010, ... 1111: which of the four questions are right.
    "[1,2,3,4]": [0] * 8 + [6.25] * 4 + [25, 25, 56.25, 100],
    "[1,[2,3],4]": [0] * 8 + [100 / 12] * 2 + [400 / 12] * 4 + [700 / 12, 100],
    "[[1,2],3,4]": [0] * 4 + [10] * 8 + [20, 20, 50, 100],
}


@pytest.mark.parametrize("structure", BY_HAND)
def test_scores_of_groups_are_those_by_hand(structure: str) -> None:
    for right, percent in zip(product((False, True), repeat=4), BY_HAND[structure], strict=True):
        assert 100 * videomme_v2.group_score("logic", structure, right) == pytest.approx(percent)
        assert videomme_v2.group_score("relevance", structure, right) == pytest.approx((sum(right) / 4) ** 2)


@given(said=st.lists(replies, min_size=12, max_size=12))
def test_videomme_v2_means_are_over_groups(said: list[str]) -> None:
    questions = videomme_v2.samples(FILES["videomme-v2"])
    scored = videomme_v2.score([row_of(q, s) for q, s in zip(questions, said, strict=True)])["official"]["scores"]
    right = [first_of(s, "ABCDEFGH", V2) == q.answer for q, s in zip(questions, said, strict=True)]
    relevance, linear = (sum(right[:4]) / 4) ** 2, sum(right[:4]) / 4
    number = [int("".join(str(int(r)) for r in right[i : i + 4]), 2) for i in (4, 8)]
    logic = [BY_HAND["[1,[2,3],4]"][number[0]] / 100, BY_HAND["[[1,2],3,4]"][number[1]] / 100]
    expected = {
        "total": (relevance + sum(logic)) / 3,
        "relevance (consistency)": relevance,
        "relevance, linear": linear,
        "logic (coherence)": sum(logic) / 2,
        "questions": sum(right) / 12,
        "level 1": relevance,
        "level 2": logic[0],
        "second head Reasoning": logic[1],
        "third head Order": logic[0],
    }
    assert {name: scored[name]["mean"] for name in expected} == pytest.approx(expected)
    assert "level None" not in scored


def test_videomme_v2_leaves_out_a_group_with_a_failed_question() -> None:
    questions = videomme_v2.samples(FILES["videomme-v2"])
    scored = videomme_v2.score([row_of(q, q.answer) for q in questions[1:]])
    assert scored["official"]["scores"]["total"]["counted"] == 2
    assert "1 of 3 groups" in scored["warnings"][-1]


@given(said=st.lists(replies, min_size=3, max_size=3))
def test_lvbench_counts_a_question_in_every_ability(said: list[str]) -> None:
    questions = lvbench.samples(FILES["lvbench"])
    scored = lvbench.score([row_of(q, s) for q, s in zip(questions, said, strict=True)])["official"]["scores"]
    right = []
    for question, reply in zip(questions, said, strict=True):
        inside = re.split(r"\)", reply.strip())[0].strip()
        inside = re.split(r"\(", inside)[1].strip() if "(" in inside else inside
        right.append((inside.split(" ")[0] or " ")[0] == question.answer)
    assert scored["overall"]["mean"] == pytest.approx(sum(right) / 3)
    for name, members in {
        "key information retrieval": right[:1],
        "entity recognition": right[1:2],
        "event understanding": right[1:2],
        "temporal grounding": right[2:],
        "reasoning": right[2:],
    }.items():
        assert scored[name]["mean"] == pytest.approx(sum(members) / len(members))


def test_lvbench_copies_with_a_row_a_question(tmp_path: Path) -> None:
    """As VideoChat-Flash has it: options in a column, the key with its text."""
    row = {"video": "a.mp4", "type": "tv", "question": "What?", "candidates": ["x", "y"], "answer": "(B) y"}
    row |= {"question_type": ["reasoning"], "time_reference": "00:01-00:02"}
    (tmp_path / "clean.json").write_text(json.dumps([row]))
    (question,) = lvbench.samples(tmp_path / "clean.json")
    assert (question.answer, question.groups["abilities"]) == ("B", "reasoning")
    assert lvbench.prompt(question, "videochat-flash", None) == (
        "What?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."
    )


TIMESCOPE = ["The best answer is", "The correct answer is", "The answer is", "The answer"]
TIMESCOPE += ["The best option is", "The correct option is", "Best answer:", "Best option:"]
LONGTIMESCOPE = [*TIMESCOPE[:4], "The best option isThe correct option is", "Best answer:Best option:"]


@given(said=st.lists(replies, min_size=3, max_size=3))
def test_timescope_by_kind_and_length(said: list[str]) -> None:
    for bench, name, phrases in (
        (timescope, "timescope", TIMESCOPE),
        (longtimescope, "longtimescope", LONGTIMESCOPE),
    ):
        questions = bench.samples(FILES[name])
        pairs = list(zip(questions, said, strict=False))
        scored = bench.score([row_of(q, s) for q, s in pairs])["official"]["scores"]
        cells: dict[str, list[bool]] = defaultdict(list)
        for question, reply in pairs:
            right = first_of(reply, "ABCDEF", phrases).lower() == question.answer.lower()
            kind, length = question.groups["type"], question.groups["length"]
            for key in ("overall", kind, f"{length} s", f"{length} s, {kind}"):
                cells[key].append(right)
        assert {k: v["mean"] for k, v in scored.items()} == pytest.approx(
            {k: sum(v) / len(v) for k, v in cells.items()}
        )


def test_timescope_uses_the_rows_prompt_and_its_number_of_options() -> None:
    questions = timescope.samples(FILES["timescope"])
    assert [len(q.options) for q in questions] == [4, 4, 6]
    assert timescope.prompt(questions[0], "official", None) == questions[0].released["input"]
    said = row_of(longtimescope.samples(FILES["longtimescope"])[0], "Best answer: C")
    assert longtimescope.score([said])["official"]["scores"]["overall"]["mean"] == 0.0, "its B is the first letter"
    assert timescope.score([said])["official"]["scores"]["overall"]["mean"] == 1.0


TASKS = [f"{kind}_{how}" for kind in ("ret", "ord", "cnt") for how in ("edit1", "insert1", "insert2")]


@settings(max_examples=30)
@given(st.lists(st.lists(st.sampled_from(["A", "B.", "", "C"]), min_size=4, max_size=4), min_size=18, max_size=18))
def test_vnbench_is_right_only_if_all_orders_are(said: list[list[str]]) -> None:
    rows, acc = [], defaultdict(list)
    for number, tries in enumerate(said):
        task = TASKS[number % 9]
        for i, reply in enumerate(tries):
            question = Question(
                id=f"{number}-{i}",
                video=f"{number}.mp4",
                question="?",
                options=tuple("ABCD"),
                answer="A" if i < 3 else "B",
                groups={"type": task, "try": str(i)},
            )
            rows.append(row_of(question, reply))
        acc[task].append([reply[:1] for reply in tries] == ["A", "A", "A", "B"])
    mean = {task: sum(values) / len(values) for task, values in acc.items()}
    mean["ret_insert1"], mean["ret_insert2"] = mean["ret_insert2"], mean["ret_insert1"]
    kinds = {
        name: sum(mean[f"{kind}_{how}"] for how in ("edit1", "insert1", "insert2")) / 3
        for kind, name in (("ret", "retrieval"), ("ord", "ordering"), ("cnt", "counting"))
    }
    scored = vnbench.score(rows)["official"]["scores"]
    expected = {**mean, **kinds, "overall": sum(kinds.values()) / 3}
    assert {name: value["mean"] for name, value in scored.items()} == pytest.approx(expected)


def test_vnbench_keys_are_texts_and_chance_is_of_four_tries() -> None:
    questions = vnbench.samples(FILES["vnbench"])
    assert [q.answer for q in questions[:4]] == ["B", "B", "D", "A"]
    assert {q.options[ord(q.answer) - 65][3:] for q in questions[:4]} == {"plum"}
    scored = vnbench.score([row_of(q, q.answer) for q in questions[1:]])
    assert scored["official"]["chance"] == pytest.approx(0.25**4)
    assert scored["official"]["scores"]["ret_insert1"]["mean"] == 1.0, "the data's label is ret_insert2"
    assert "1 of 4 questions" in scored["warnings"][-1]


def test_egoschema_writes_indices_for_its_server(tmp_path: Path) -> None:
    questions = egoschema.samples(FILES["egoschema"])
    assert [q.answer for q in questions] == ["A", "D", ""]
    said = ["B. C cooks.", "The answer is D", "i do not know"]
    egoschema.export(tmp_path, list(zip(questions, said, strict=True)))
    written = json.loads((tmp_path / "submission.json").read_text())
    assert list(written.values())[:2] == [1, 3]
    assert set(written) == {q.video for q in questions}
    assert 0 <= written[questions[2].video] < 5
    scored = egoschema.score([row_of(q, s) for q, s in zip(questions[:2], said, strict=False)])
    assert (scored["guessing"]["mean"], scored["guessing"]["guessed"]) == (0.5, 0)


LMMS_PIECES = [
    *("A", "B", "(C)", "(D)", "E.", "a", " ", " ", ".", ",", "'", "the man ", "a. c draws.", "B. C cooks."),
    *("c. C reads", "I think so. ", "First, ", "<think>A</think>", "</think>"),
]


@given(said=st.lists(st.sampled_from(LMMS_PIECES), max_size=7).map("".join))
def test_egoschema_reads_replies_as_lmms_eval_does(said: str) -> None:
    """Its parse_multi_choice_response: where nothing is found it draws a letter."""
    question = egoschema.samples(FILES["egoschema"])[0]
    text = said
    while "<think>" in text and "</think>" in text.partition("<think>")[2]:
        before, _, rest = text.partition("<think>")
        text = before + rest.partition("</think>")[2]
    text = text.rpartition("</think>")[2] if "<think>" not in text else text
    text = text.strip()
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        text = text.strip(mark)
    text = f" {text} "
    last = {form: text.rfind(form) for x in "ABCDE" for form in (f"({x})", f"{x} ", f"{x}.")}
    places = sorted((place, form) for form, place in last.items() if place >= 0)
    if not places and len(text.split()) > 5:
        options = {x: option.lower() for x, option in zip("ABCDE", question.options, strict=True)}
        places = sorted((text.lower().rfind(option), x) for x, option in options.items() if option in text.lower())
    letter = next((character for character in places[0][1] if character.isalpha()), "") if places else ""
    rows = [{**row_of(question, said), "options": list(question.options)}]
    found = egoschema.score(rows)["guessing"]
    assert found["guessed"] == int(not letter)
    if letter:
        assert found["mean"] == float(letter == "A")


@given(said=st.lists(replies, min_size=4, max_size=4))
def test_longvideobench_reads_the_first_letter(said: list[str]) -> None:
    questions = longvideobench.samples(FILES["longvideobench"]) * 4
    pairs = list(zip(questions, said, strict=False))
    found = longvideobench.score([row_of(q, s) | {"id": str(i)} for i, (q, s) in enumerate(pairs)])["guessing"]
    letters = [first_of(s, "ABCDE", TIMESCOPE) for _, s in pairs]
    assert found["guessed"] == letters.count("")
    if "" not in letters:
        right = [letter == q.answer for letter, (q, _) in zip(letters, pairs, strict=True)]
        assert found["mean"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        *(("Yes.", "yes"), ("**Yes**", "yes"), ("'No'", "no"), ('"yes"', "yes"), ("(no)", "no"), ("No's", "no")),
        *(("Yes, no", "yes no"), ("yes\nno", "yes no"), ("no,it", "no"), ("answer:yes", "yes"), ("no--one", "no")),
        *(("yes\u2014there", "yes"), ("`no`", "no"), ("no..", "no"), ("no.)", "no"), ("\u2018no\u2019", "no")),
        *(("yes/no", ""), ("no-one", ""), ("yes_", ""), ("yes.no", ""), ("no:1", ""), ("no5", ""), ("a.yes", "")),
    ],
)
def test_visual_haystacks_reads_the_words_of_nltk(reply: str, words: str) -> None:
    """Recorded from word_tokenize of nltk 3.10.4, whose words the authors' script compares."""
    for key in ("yes", "no"):
        row = {"id": "1", "answer": key, "response": reply, "groups": {"images": "1"}}
        assert vhs.score([row])["rules"]["words"]["mean"] == float(key in words.split())
        assert vhs.score([row])["rules"]["words"]["parsed"] == float(bool(words))


def judged(key: str, reply: str) -> bool:
    """VideoEval-Pro's judge of options."""
    reply = reply.lower()
    for mark in ("the answer is", "answer:", "the option is"):
        if mark in reply:
            reply = reply.rsplit(mark, 1)[1]
            break
    return re.sub(r"[\W\d_]", "", reply)[:1] == key.lower()


@given(said=st.lists(replies, min_size=6, max_size=6))
def test_videoeval_pro_scores_replies_with_options(said: list[str]) -> None:
    questions = videoeval_pro.samples(FILES["videoeval-pro"])
    scored = videoeval_pro.score([row_of(q, s) for q, s in zip(questions, said, strict=True)])
    right = [judged(q.answer, s) for q, s in zip(questions, said, strict=True) if q.options]
    assert scored["generated"] == 3
    assert scored["official"]["scores"]["overall"]["mean"] == pytest.approx(sum(right) / 3)


def test_videoeval_pro_exports_both_replies_to_its_judge(tmp_path: Path) -> None:
    questions = videoeval_pro.samples(FILES["videoeval-pro"])
    assert videoeval_pro.prompt(questions[0], "official", None) == (
        "Which color is the square? Keep the answer short and concise."
    )
    assert videoeval_pro.prompt(questions[1], "official", None).endswith(
        "with no text around it.\nWhich color is the square?\nA. red B. green C. blue D. black"
    )
    videoeval_pro.export(tmp_path, [(q, "red" if not q.options else "A") for q in questions[:5]])
    rows = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert len(rows) == 2, "the third has one reply only"
    released = json.loads(FILES["videoeval-pro"].read_text().splitlines()[0])
    assert rows[0] == {**released, "textqa_answer": "red", "mcq_answer": "A"}


@given(said=st.lists(replies, min_size=2, max_size=2))
def test_longvideo_reason_compares_what_is_between_the_tags(said: list[str]) -> None:
    questions = longvideo_reason.samples(FILES["longvideo-reason"])
    assert [q.answer for q in questions] == ["A", "C", ""], "a malformed key cannot be scored"
    scored = longvideo_reason.score([row_of(q, s) for q, s in zip(questions[:2], said, strict=True)])
    right = []
    for question, reply in zip(questions, said, strict=False):
        stock = "Therefore the final answer is: " if "Therefore the final answer is:" in reply else ""
        start = reply.find(f"<answer>{stock}")
        end = reply.find("</answer>", start)
        inside = reply[start + len("<answer>" + stock) : end]
        found = inside if start >= 0 and end >= 0 and "\n" not in inside else None
        if found is None and start >= 0 and end >= 0:
            continue  # a line break between the tags: the script looks for a later pair
        right.append((found if found is not None else reply).strip() == question.answer)
    if len(right) == 2:
        assert scored["official"]["scores"]["overall"]["mean"] == pytest.approx(sum(right) / 2)


@given(said=st.lists(replies, min_size=2, max_size=2))
def test_mlvu_reads_the_character_before_the_bracket(said: list[str]) -> None:
    questions = mlvu.samples(FILES["mlvu"])[:2]
    scored = mlvu.score([row_of(q, s) for q, s in zip(questions, said, strict=True)])["official"]["scores"]
    right = []
    for question, reply in zip(questions, said, strict=True):
        place = reply.find(")")
        right.append((reply if place < 0 else reply[max(place - 1, 0) : place]) == question.answer)
    assert scored["M-Avg"]["mean"] == pytest.approx(sum(right) / 2)
    assert scored["count"]["mean"] == right[0]
