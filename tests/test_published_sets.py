"""Needle sets in their published form, from the command line to the verdicts: our own images and words."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_niah import encode, results, run

from lvctx.errors import InputError
from lvctx.eval.niah.frame_needles import FrameNeedles
from lvctx.eval.niah.image_needles import chance_of_options
from lvctx.eval.niah.needle_folder import read_needles
from lvctx.eval.niah.needle_task import is_same_text
from lvctx.eval.niah.results import read_needle_results
from lvctx.eval.report.collect import collect_report
from lvctx.inference.prefix_scorer import PrefixScorer, Score
from lvctx.models.loading import load_tokenizer

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
OPTIONS = "\nA. a door\nB. a lamp\nC. a shelf\nD. a rug\n"
BEST = "\nOptions: (A) a door\n(B) a lamp\n(C) a shelf\n(D) a rug\nOnly give the best option. Best option: ("
V_NIAH = [
    {"path": "jar.png", "prompt": f"\nFind the frame of a jar. What is written on it?{WORD}", "answer": "Salt"},
    {"path": "boat.jpg", "prompt": f"\nFind the frame with a boat. What is in it?{OPTIONS}{LETTER}", "answer": "B"},
]
RULER_D = [
    {"path": "jar.png", "interrupt_path": "jar_interrupt.png", "prompt": f"\nFind the jar.{WORD}", "answer": "40"},
    {
        "path": "boat.png",
        "interrupt_path": "boat_interrupt.png",
        "prompt": f"Find the boat. What is in it?\n{LETTER}{OPTIONS}{LETTER}",
        "answer": "C",
    },
]
SINGLE = [
    {
        "question": f"Find the frame of a {name}. what is in it{BEST}",
        "answer": a,
        "image": f"single/{name}.jpg",
        "id": i,
    }
    for i, (name, a) in enumerate((("jar", "A"), ("boat", "D")))
]
START = "Find the frame of a jar. Locate the final frame based on the instructions in the image, and"
MULTI = [
    {
        "images": [f"multi/{i}.jpg" for i in range(hops)],
        "question1": f"{START} choose the captions that best describe the frame: {BEST}",
        "answer1": "B",
        "question2": f"{START} answer the following question based on the final frame: what is in it{BEST}",
        "answer2": "D",
    }
    for hops in (5, 6)
]
COUNTING = [
    {"path": path, "prompt": f"Find frames with jars. How many are there?\n{LETTER}{OPTIONS}{LETTER}", "answer": "A"}
    for path in ([], ["jar.png"], ["jar.png", "jars.png"])
]
ORDERING = [
    {"path": path, "prompt": f"\nFind the frames about jar, boat. What is their order?{OPTIONS}{LETTER}", "answer": "A"}
    for path in (["jar.png", "boat.png"], ["jar.png", "boat.png", "hat.png"])
]
KEYS = [
    {
        "path": "['jar_red.png', 'jar_blue.png', 'jar_old.png']",
        "prompt": f"Find the frames with a jar. What is in it?{OPTIONS}{LETTER}\nA. a rug\nB. a lamp\n{LETTER}",
        "answer": "C",
    },
    {
        "path": "['jar_red.png', 'boat.png', 'jar_old.png', 'hat.png']",
        "prompt": f"Find the frames with a jar. What is in it?\n{LETTER}{OPTIONS}{LETTER}",
        "answer": "B",
    },
]
"""The first row's options are repeated, as in the first published one."""
LISTS: dict[str, tuple[str, list[Any], float | None]] = {
    "V-NIAH": ("dataset.json", V_NIAH, None),
    "LongVILA": ("dataset.json", V_NIAH, None),
    "V-NIAH-D": ("dataset.json", V_NIAH, None),
    "V-RULER, distractors": ("v_niah_d.json", RULER_D, None),
    "VideoChat-Flash, single hop": ("niah-coco-singlehop_20.json", SINGLE, 0.25),
    "VideoChat-Flash, multi-hop": ("niah-coco-multihop-100.json", MULTI, 0.25),
    "V-RULER, counting": ("counting.json", COUNTING, 0.25),
    "V-RULER, ordering": ("ordering.json", ORDERING, 0.25),
    "V-RULER, multi-key": ("multi_key_multi_value.json", KEYS, 0.25),
}
"""File, rows, and the accuracy of guessing, where all rows have four options."""
FLAGS: dict[str, Sequence[object]] = {
    "LongVILA": ("--scoring", "longvila"),
    "V-NIAH-D": ("--distractors", 1),
    "V-RULER, distractors": ("--distractors", 1),
    "VideoChat-Flash, single hop": ("--needle-frames", 4, "--scoring", "videochat-flash"),
    "VideoChat-Flash, multi-hop": ("--needle-frames", 4, "--scoring", "videochat-flash"),
}
"""The options that the documentation gives for a list."""


def publish(folder: Path, name: str) -> Path:
    """A list as its authors' repository has it, beside its images."""
    file, rows, _ = LISTS[name]
    names = []
    for row in rows:
        given = row.get("images", row.get("image", row.get("path")))
        quoted = isinstance(given, str) and given.startswith("[")
        given = json.loads(given.replace("'", '"')) if quoted else given
        names += given if isinstance(given, list) else [given]
        names += [row["interrupt_path"]] if "interrupt_path" in row else []
    if name == "V-NIAH-D":
        others = [{**row, "path": row["path"].replace(".", "_interrupt.")} for row in rows]
        (folder / "dataset_interrupt.json").write_text(json.dumps(others))
        names += [row["path"] for row in others]
    images = folder if "/" in "".join(names) else folder / "images"
    for i, image in enumerate(sorted(set(names))):
        (images / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (20 * i, 255 - 20 * i, 90)).save(images / image)
    (folder / file).write_text(json.dumps(rows, indent=4))
    return folder


@pytest.fixture(scope="module")
def haystack(loud_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lvctx.models.vision_encoder import load_tower

    return encode(load_tower(loud_vlm, dtype=None), tmp_path_factory.mktemp("haystack") / "a.frames.safetensors")


def run_list(name: str, model: Path, haystack: Path, folder: Path, *more: object) -> list[dict[str, Any]]:
    """Rows of a run with all questions of a list."""
    rows = LISTS[name][1]
    flags = ["--haystack", haystack, "--lengths", 10, "--needles", publish(folder, name), *FLAGS.get(name, ())]
    trials = len(rows) * (2 if rows is MULTI else 1)
    done = run("niah", "video", "--model", model, *flags, "--trials", trials, *more, "-o", folder / "run")
    assert done.exit_code == 0, done.stderr
    return results(folder / "run")


@pytest.mark.parametrize("name", LISTS)
def test_every_published_list_runs_in_its_own_form(name: str, loud_vlm: Path, haystack: Path, tmp_path: Path) -> None:
    found = run_list(name, loud_vlm, haystack, tmp_path)
    _, rows, chance = LISTS[name]
    asked = [(row.get("question", row.get("prompt")), row.get("answer")) for row in rows]
    if rows is MULTI:
        asked = [(row[f"question{i}"], row[f"answer{i}"]) for row in rows for i in (1, 2)]
    spread = rows in (MULTI, COUNTING, ORDERING)
    depths = {None} if spread else {0, 0.2, 0.4, 0.6, 0.8} | (set() if rows is KEYS else {1})
    assert {row["depth"] for row in found} == depths
    assert len(found) == len(depths) * len(asked)
    for row in found:
        question, answer = asked[row["trial"]]
        assert (row["question"], row["answer"], row["chance"]) == (question.removeprefix("\n"), answer, chance)
        # A distractor 200 frames away is outside of this haystack.
        assert row["cost"]["frames_shown"] - row["length"] == inserted(name, row["trial"])
        assert ("predicted" in row) == ("--scoring" in FLAGS.get(name, ()))


def inserted(name: str, trial: int) -> int:
    """Frames of a trial's needles."""
    rows = LISTS[name][1]
    if rows in (SINGLE, MULTI):
        return 4 if rows is SINGLE else 4 * len(MULTI[trial // 2]["images"])
    return len(rows[trial]["path"]) if rows in (COUNTING, ORDERING) else (3, 4)[trial] if rows is KEYS else 1


def test_images_of_several_keys_are_within_a_fifth_of_the_video(tmp_path: Path) -> None:
    """V-RULER draws places from int(depth n) to int((depth + 0.2) n) - 1, sorts them, and inserts before each."""
    read = read_needles(publish(tmp_path, "V-RULER, multi-key"))
    seen: dict[tuple[int, float], set[int]] = {}
    for seed in range(150):
        needles = FrameNeedles(read, seconds=np.arange(50.0), seed=seed)
        for cell in needles.cells([5, 50], [0, 0.5, 0.8, 1], 2):
            order = needles.order(cell).tolist()
            assert [n for n in order if n < 50] == list(range(cell.length))
            assert [n - 50 for n in order if n >= 50] == ([0, 1, 2], [3, 4, 5, 6])[cell.trial]
            before = [sum(n < 50 for n in order[:i]) for i, n in enumerate(order) if n >= 50]
            assert cell.depth is not None
            seen.setdefault((cell.length, cell.depth), set()).update(before)
    # None begins at the end, as in the script.
    assert seen == {
        **{(50, 0): set(range(10)), (50, 0.5): set(range(25, 35)), (50, 0.8): set(range(40, 50))},
        **{(5, 0): {0}, (5, 0.5): {2}, (5, 0.8): {4}},
    }


@pytest.mark.parametrize("path", ["['a.png', 3]", "['a.png'", "{'a.png'}", "[]"])
def test_a_path_that_is_no_list_of_images_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "multi_key_multi_value.json").write_text(json.dumps([{**KEYS[0], "path": path}]))
    with pytest.raises(InputError):
        read_needles(tmp_path)


def test_guessing_is_known_where_all_questions_have_options() -> None:
    for rows, chance in ((KEYS, 1 / 4), (SINGLE, 1 / 4), (V_NIAH[1:], 1 / 4), (RULER_D[1:], 1 / 4), (V_NIAH, None)):
        asked = [(row.get("question", row.get("prompt")), row["answer"]) for row in rows]
        assert chance_of_options(asked) == chance
    two, three = ("Is it?\nA. yes\nB. no", "B"), ("Which?\n(A) x\n(B) y\n(C) z", "(C) z")
    assert chance_of_options([two, three]) == pytest.approx((1 / 2 + 1 / 3) / 2)
    for asked in ((two[0], "no"), (two[0], "C"), ("Who is A. Smith?", "A"), ("Which?", "B")):
        assert chance_of_options([asked, three]) is None
    assert chance_of_options([]) is None


def script_of_longvila(predicted: list[int], answer: list[int], tokenizer: Any) -> bool:
    """What its script compares, by letters: those that are no space, in one case."""
    said, right = ([letter for letter in tokenizer.decode(ids).lower() if letter != " "] for ids in (predicted, answer))
    return said == right


def script_of_videochat_flash(predicted: list[int], answer: list[int], tokenizer: Any) -> bool:
    """Brackets are dropped from what is predicted only."""
    said = [letter for letter in tokenizer.decode(predicted).lower() if letter not in "()"]
    return said == list(tokenizer.decode(answer).lower())


@pytest.mark.parametrize(
    ("scoring", "script"), [("longvila", script_of_longvila), ("videochat-flash", script_of_videochat_flash)]
)
def test_the_text_of_the_likeliest_tokens_is_compared_as_in_the_scripts(
    scoring: Any, script: Callable[[list[int], list[int], Any], bool], tiny_lm: Path
) -> None:
    tokenizer, rng = load_tokenizer(tiny_lm), random.Random(3)
    pieces = ["A", "a", " A", "(A", "(A)", ") ", " ", "\n", "yel", "Yel", "low", " low", "200", "(", "2 00"]
    verdicts = []
    for _ in range(2000):
        texts = ["".join(rng.choices(pieces, k=rng.randint(1, 2))) for _ in range(2)]
        predicted, answer = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
        verdicts.append(script(predicted, answer, tokenizer))
        assert is_same_text(scoring, tokenizer.decode(predicted), tokenizer.decode(answer)) == verdicts[-1], texts
    assert 40 < sum(verdicts) < 1000


def test_two_questions_about_a_chain_are_counted_together(
    loud_vlm: Path, haystack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VideoChat-Flash: caption and question alone, and chains with both right. A model that says `(b` to all."""
    tokenizer, score = load_tokenizer(loud_vlm), PrefixScorer.score

    def says_b(*given: Any, **options: Any) -> Score:
        return replace(score(*given, **options), predicted=tokenizer.encode("(b", add_special_tokens=False))

    monkeypatch.setattr(PrefixScorer, "score", says_b)
    monkeypatch.setitem(MULTI[1], "answer2", "B")
    rows = run_list("VideoChat-Flash, multi-hop", loud_vlm, haystack, tmp_path)
    assert [(row["trial"] % 2, row["predicted"]) for row in rows if row["correct"] != (row["answer"] == "B")] == []
    assert {(row["trial"] % 2, row["part"]) for row in rows} == {(0, "caption"), (1, "qa")}
    shares = {"chains": 2, "caption": 1.0, "qa": 0.5, "both": 0.5}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["pairs"] == [shares]
    reported = json.loads(run("niah", "report", tmp_path / "run", "-o", tmp_path / "heatmap.png", "--json").stdout)
    assert reported["pairs"] == [shares]
    (section,) = collect_report([tmp_path / "run"], thumbnails=0, threshold=0.9, on_progress=lambda *_: None).runs
    assert section["grid"]["pairs"] == [shares]
    assert {(t["trial"] % 2, t["part"], t["predicted"]) for t in section["trials"]} == {
        (0, "caption", "(b"),
        (1, "qa", "(b"),
    }
    assert [read_needle_results(tmp_path / "run").pair_mean(part) for part in ("caption", "qa", "both")] == [
        1,
        0.5,
        0.5,
    ]


def test_a_server_gives_no_likeliest_tokens(tmp_path: Path) -> None:
    flags = ("--haystack", publish(tmp_path, "LongVILA") / "images", "--lengths", 1, "--scoring", "longvila")
    done = run("niah", "video", "--endpoint", "http://127.0.0.1:9/v1", "--model", "m", *flags, "-o", tmp_path / "run")
    assert done.exit_code == 2
    assert "--scoring generate" in done.stderr
