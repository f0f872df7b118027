"""Kinds of needles: RULER's tasks, distractors, times, insertion points that lengths share, repeated haystacks."""

import copy
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from support.frames import even_tokens
from support.refusals import refused

from lvctx.errors import InputError, UsageError
from lvctx.eval.niah.frame_needles import beside
from lvctx.eval.niah.image_needles import NeedleSet, chance_of, drawn_groups, drawn_needles
from lvctx.eval.niah.needle_folder import read_needles
from lvctx.eval.niah.needle_sets import find_needles
from lvctx.eval.niah.needle_task import Cell, first_number, share_listed
from lvctx.eval.niah.niah_config import Depths, VideoNiahConfig
from lvctx.eval.niah.run import partition_cells
from lvctx.eval.niah.text_needles import LISTS, draw_text_needle
from lvctx.eval.niah.text_task import TextNeedleTask
from lvctx.eval.niah.video_task import VideoNeedleTask
from lvctx.inference.prefix_scorer import PrefixScorer, common_prefix, walk_order
from lvctx.models.loading import load_model, load_tokenizer
from lvctx.models.vlm_assembly import IMAGE_TOKEN, VIDEO_TOKEN
from lvctx.video.drawn_images import COLORS
from lvctx.vlm.llava_onevision import joined_times

STORY = "The old tree stood by a river. People came from far. They sat in its shade, and told what they had seen. " * 60


@pytest.fixture(scope="module")
def tokenizer(tiny_lm: Path) -> Any:
    return load_tokenizer(tiny_lm)


@pytest.fixture(scope="module")
def seeing(tiny_lm: Path) -> Any:
    """A tokenizer with a VLM's tokens."""
    tokenizer = load_tokenizer(tiny_lm)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]})
    return tokenizer


@pytest.mark.parametrize("task", ["multi-key", *LISTS])
@pytest.mark.parametrize("nested", [False, True])
def test_a_riddle_is_hidden_whole(task: Any, nested: bool, tokenizer: Any) -> None:
    test = TextNeedleTask(tokenizer, STORY, distractors=2, seed=1, task=task, count=4, nested=nested)
    cells = test.cells([420, 600], [0, 0.3, 1], 2)
    assert len(cells) == 12
    for cell in cells:
        ids, answer = test.sequence(cell)
        assert len(ids) == cell.length
        text = tokenizer.decode(ids)
        needle = draw_text_needle(task, 1, cell.trial, distractors=2, count=4)
        assert len(needle.sentences) == 4
        assert all(text.count(sentence) == 1 for sentence in needle.sentences)
        assert tokenizer.decode(ids[-answer:]).strip() == cell.answer == ", ".join(needle.answers)
        assert cell.question in text
        places = [text.index(sentence) for sentence in needle.sentences]
        assert max(places) - min(places) > len(text) / 4  # they do not stand together
        if needle.chain:
            assert places == sorted(places)
            assert [h.strip() for h in needle.sentences][1] == f"VAR {needle.answers[1]} = VAR {needle.answers[0]}."
    assert len({answer for cell in cells for answer in cell.answer.split(", ")}) == len(cells[0].answer.split(", ")) * 2


def test_lists_are_scored_in_any_order(tokenizer: Any) -> None:
    test = TextNeedleTask(tokenizer, STORY, distractors=0, seed=1, task="multi-value", count=4)
    cell = test.cells([500], [0.5], 1)[0]
    a, b, c, d = cell.answer.split(", ")
    assert not test.can_force
    assert test.score_text(cell, f"{d} and {c}; {b}, {a}.") == 1
    assert test.score_text(cell, f"{a}, {b}") == 0.5
    assert test.score_text(cell, f"{a}{b}{c}{d}") == 0
    assert share_listed("var abcde", ["ABCDE", "XYZXY"]) == 0.5
    assert [first_number(t) for t in ("At second 1,012.5 or 7", "never")] == [1012.5, None]


def video(tokenizer: Any, **options: Any) -> VideoNeedleTask:
    needles = drawn_needles(3, size=48, seed=2, distractors=options.pop("distractors", 0))
    tokens = even_tokens(vocabulary=50_000, per_frame=4, frames=40, inserted=3 + len(needles.distractors))
    return VideoNeedleTask(tokenizer, needles, tokens, **{"seconds": np.arange(40.0), **options})


def rows_of(test: VideoNeedleTask, cell: Cell) -> list[int]:
    """Frames of a cell's sequence in order: haystack 0..39, needles 40..42, distractors from 43 on."""
    ids, _ = test.sequence(cell)
    visual = ids[ids >= 50_000] - 50_000
    assert len(visual) % 4 == 1  # the newline
    frames = visual[:-1].reshape(-1, 4)
    assert (frames % 4 == np.arange(4)).all()
    return [int(f) for f in frames[:, 0] // 4]


def test_distractors_share_neither_shape_nor_color(seeing: Any) -> None:
    drawn = drawn_needles(30, size=48, seed=5, distractors=9)
    needles, distractors = drawn.needles, drawn.distractors
    assert not {n.answer for n in needles} & {n.answer for n in distractors}
    assert not {n.subject for n in needles} & {n.subject for n in distractors}
    assert len({n.digest for n in distractors}) == 9
    assert len({n.answer for n in needles}) == 7
    assert chance_of(9) == 1 / 7
    assert chance_of(0) == 1 / 10
    test = video(seeing, distractors=3)
    for cell in test.cells([10, 40], [0, 0.5, 1], 2):
        rows = rows_of(test, cell)
        assert sorted(rows) == [*range(cell.length), 40 + cell.trial, 43, 44, 45]
        assert [r for r in rows if r < 40] == list(range(cell.length))
        assert sum(r < 40 for r in rows[: rows.index(40 + cell.trial)]) == cell.position
    assert test.prompt() != video(seeing, distractors=2).prompt()


def test_distractors_of_a_folder(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": "What?", "answer": "A"}, {"image": "a.png", "distractor": True}]
    (tmp_path / "n.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    read = read_needles(tmp_path)
    assert [n.answer for n in read.needles] == ["A"]
    assert len(read.distractors) == 1


def test_published_lists_of_needles(tmp_path: Path) -> None:
    """LongVA's JSON and Parquet, VideoRoPE's two lists and V-RULER's one, VideoChat-Flash's paths."""
    colors = {"a.png": (255, 0, 0), "b.png": (0, 255, 0), "a_interrupt.png": (0, 0, 255), "b_interrupt.png": (9, 9, 9)}
    for name, color in colors.items():
        for folder in ("longva", "rope/images", "ruler", "flash/single", "parquet"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), color).save(tmp_path / folder / name)
    rows = [{"path": f"{n}.png", "prompt": f"\nFind the frame of {n}.\nA. x\nB. y", "answer": n.upper()} for n in "ab"]
    interrupts = [{**row, "path": row["path"].replace(".", "_interrupt.")} for row in rows]
    single = [{"question": r["prompt"], "answer": r["answer"], "image": f"single/{r['path']}", "id": 0} for r in rows]
    (tmp_path / "longva" / "dataset.json").write_text(json.dumps(rows))
    (tmp_path / "rope" / "dataset.json").write_text(json.dumps(rows))
    (tmp_path / "rope" / "dataset_interrupt.json").write_text(json.dumps(interrupts))
    ruler = [{**row, "interrupt_path": other["path"]} for row, other in zip(rows, interrupts, strict=True)]
    (tmp_path / "ruler" / "v_niah_d.json").write_text(json.dumps(ruler))
    (tmp_path / "flash" / "niah-coco-singlehop_20.json").write_text(json.dumps(single))
    data = [{"bytes": (tmp_path / "parquet" / row["path"]).read_bytes(), "path": row["path"]} for row in rows]
    hub = [{"image": d, "question": r["prompt"], "answer": r["answer"]} for d, r in zip(data, rows, strict=True)]
    pq.write_table(pa.Table.from_pylist(hub), tmp_path / "parquet" / "test.parquet")
    for folder, distractors in (("longva", 0), ("rope", 2), ("ruler", 2), ("flash", 0), ("parquet", 0)):
        read = read_needles(tmp_path / folder)
        assert [(n.question, n.answer) for n in read.needles] == [(r["prompt"].strip(), r["answer"]) for r in rows]
        assert [n.image.getpixel((0, 0)) for n in read.needles] == [(255, 0, 0), (0, 255, 0)]
        assert (len(read.distractors), read.paired) == (distractors, distractors > 0)
        assert [n.image.getpixel((0, 0)) for n in read.distractors] == [(0, 0, 255), (9, 9, 9)][:distractors]
    (tmp_path / "rope" / "dataset_interrupt.json").write_text(json.dumps(interrupts[:1]))
    with pytest.raises(InputError):
        read_needles(tmp_path / "rope")


@pytest.mark.parametrize("frames", [1, 2])
def test_published_lists_of_needles_that_are_spread_over_the_video(frames: int, seeing: Any, tmp_path: Path) -> None:
    """Frames in the order in which VideoChat-Flash's and V-RULER's scripts put them together."""
    names = [f"{i}.png" for i in range(4)]
    (tmp_path / "multi").mkdir()
    for i, name in enumerate(names):
        for path in (tmp_path / name, tmp_path / "multi" / name):
            Image.new("RGB", (9, 9), (60 * i, 0, 0)).save(path)
    hops = [
        {"images": [f"multi/{name}" for name in names[:3]], "question1": "A?", "answer1": "A"},
        {"images": [f"multi/{name}" for name in names], "question1": "C?", "answer1": "C"},
    ]
    for row in hops:
        row |= {"question2": "\nB?", "answer2": "B"}
    counting = [
        {"path": paths, "prompt": f"{len(paths)}?", "answer": "D"} for paths in ([], names[:1], [names[1]] * 2, names)
    ]
    (tmp_path / "niah-coco-multihop-100.json").write_text(json.dumps(hops))
    (tmp_path / "counting.json").write_text(json.dumps(counting))
    for file, rows in (("niah-coco-multihop-100.json", hops), ("counting.json", counting)):
        read = read_needles(tmp_path / file)
        total = len(read.needles)
        repeated = [needle for needle in read.needles for _ in range(frames)]
        needles = replace(read, needles=repeated, frames=frames)
        tokens = even_tokens(vocabulary=50_000, per_frame=4, frames=40, inserted=len(repeated))
        test = VideoNeedleTask(seeing, needles, tokens, seconds=np.arange(40.0))
        per_row = 2 if rows is hops else 1
        cells = test.cells([10, 40], [0, 0.5, 1], per_row * len(rows))
        assert len(cells) == 2 * per_row * len(rows)
        first = np.cumsum([0, *(len(row.get("images", row.get("path"))) for row in rows)])
        assert first[-1] == total
        for cell in cells:
            row, n = cell.trial // per_row, cell.length
            images = list(range(first[row], first[row + 1]))
            expected: list[int] = []
            if rows is hops:
                interval = n / (len(images) - 1)
                for j, image in enumerate(images):
                    before = range(int((j - 1) * interval), int(j * interval)) if j else ()
                    expected += [*before, *(40 + image * frames + i for i in range(frames))]
                assert (cell.question, cell.answer) == (("B?", "B") if cell.trial % 2 else (f"{'AC'[row]}?", "AC"[row]))
            else:
                chosen, left = np.linspace(0, n - 1, len(images), dtype=int), list(images)
                for frame in range(n):
                    expected.append(frame)
                    if frame in chosen:
                        expected += [40 + left[0] * frames + i for i in range(frames)]
                        left = left[1:]
                assert (cell.question, cell.answer) == (f"{len(images)}?", "D")
            assert cell.depth is None
            assert rows_of(test, cell) == expected
    mixed = [{"path": "0.png", "prompt": "?", "answer": "A"}, *counting]
    for broken in (mixed, [{"path": names, "prompt": "?"}], [{"images": names, "question1": "?", "answer1": "A"}]):
        (tmp_path / "counting.json").write_text(json.dumps(broken))
        with pytest.raises(InputError):
            read_needles(tmp_path / "counting.json")
    given = VideoNiahConfig(
        model="m", haystack=(Path("h"),), lengths=(8,), needles=str(tmp_path / "niah-coco-multihop-100.json")
    )
    assert len(find_needles(given, 48).spread) == 4
    for wrong in ({"question": "when"}, {"depths": Depths(values=(0.5,))}, {"distractors": 1}):
        with pytest.raises(UsageError):
            find_needles(replace(given, **wrong), 48)


def test_a_distractor_of_v_niah_d_is_200_frames_from_its_needle(seeing: Any) -> None:
    for position, length, places in (
        *((0, 150, {None}), (100, 300, {None}), (100, 301, {300}), (199, 3000, {399}), (200, 3000, {0, 400})),
        *((2799, 3000, {2999, 2599}), (2800, 3000, {2600}), (3000, 3000, {2800})),
    ):
        assert {beside(position, length, [seed]) for seed in range(30)} == places, position
    drawn = drawn_needles(6, size=48, seed=2).needles
    needles = NeedleSet(needles=drawn[:3], distractors=drawn[3:], paired=True)
    tokens = even_tokens(vocabulary=50_000, per_frame=4, frames=40, inserted=6)
    test = VideoNeedleTask(seeing, needles, tokens, seconds=np.arange(40.0), loop=True)
    for cell in test.cells([40, 300], [0, 1], 3):
        inserted = [row - 40 for row in rows_of(test, cell) if row >= 40]
        at = [i for i, row in enumerate(rows_of(test, cell)) if row >= 40]
        assert sorted(inserted) == ([cell.trial, cell.trial + 3] if cell.length == 300 else [cell.trial])
        assert cell.length == 40 or abs(at[0] - at[1]) in (200, 201)


def test_a_list_of_needles_is_read_by_line_feeds_alone(tmp_path: Path) -> None:
    """JSON strings may hold other line separators; a byte order mark and blank lines are no rows."""
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    row = json.dumps({"image": "a.png", "question": "What\u2028is\x85it?", "answer": "A"}, ensure_ascii=False)
    (tmp_path / "n.jsonl").write_text(f"\ufeff{row}\r\n\n{row}\n", encoding="utf-8")
    assert [needle.question for needle in read_needles(tmp_path).needles] == ["What\u2028is\x85it?"] * 2
    (tmp_path / "n.jsonl").write_bytes(b"\xff\xfe\x00")
    with refused(InputError, "n.jsonl"):
        read_needles(tmp_path)


RELEASED = (("a.png", "Find the frame of a hat.\nAnswer the question using a single word or phrase.", "Yellow"),)


@pytest.mark.parametrize("form", ["dataset.json", "folder", "parquet", "saved"])
def test_longvas_needles_are_read_as_they_are(tmp_path: Path, form: str) -> None:
    """Its dataset.json (path, prompt; images/ beside it) and the hub dataset (image, question; split test)."""
    import datasets

    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 7), "yellow").save(tmp_path / "images" / "a.png")
    rows = [{"path": name, "prompt": "\n" + question, "answer": answer} for name, question, answer in RELEASED]
    (tmp_path / "dataset.json").write_text(json.dumps(rows, indent=4))
    source = tmp_path if form == "folder" else tmp_path / form
    if form in ("parquet", "saved"):
        table = datasets.Dataset.from_list(
            [
                {"image": str(tmp_path / "images" / r["path"]), "question": r["prompt"], "answer": r["answer"]}
                for r in rows
            ]
        ).cast_column("image", datasets.Image())
        if form == "saved":
            datasets.DatasetDict({"test": table}).save_to_disk(str(source))
        else:
            source = tmp_path / "test-00000.parquet"
            table.to_parquet(str(source))
    read = read_needles(source)
    assert [(n.question, n.answer) for n in read.needles] == [row[1:] for row in RELEASED]
    assert read.needles[0].image.size == (9, 7)
    assert read.needles[0].image.getpixel((0, 0)) == (255, 255, 0)


def test_longvas_text_needles(tiny_lm: Path) -> None:
    """The prompt of its script by hand: the haystack alone has the requested tokens, and the key is Singapore."""
    tokenizer = load_tokenizer(tiny_lm)

    def ids(text: str) -> list[int]:
        return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    test = TextNeedleTask(tokenizer, STORY, distractors=0, seed=1, city="Singapore", haystack_only=True)
    answers = set()
    for cell in test.cells([100, 200], [0, 1], 3):
        found, length = test.sequence(cell)
        needle = ids(f"\nThe special magic Singapore number is: {cell.answer}.\n")
        book = ids(STORY)[: cell.length]
        question = (
            "</book>.\n Based on the content of the book, Question: What is the special magic Singapore number? "
            f"Answer: The special magic Singapore number is: {cell.answer}"
        )
        placed = book + needle if cell.depth == 1 else needle + book
        assert found.tolist() == ids("This is a very long story book: <book>") + placed + ids(question)
        assert tokenizer.decode(found[-length:]).strip() == cell.answer
        answers.add(cell.answer)
    assert len(answers) == 3
    with_others = TextNeedleTask(tokenizer, STORY, distractors=3, seed=1, city="Singapore", haystack_only=True)
    text = tokenizer.decode(with_others.sequence(with_others.cells([200], [0.5], 1)[0])[0])
    assert [text.count(f"magic {city} number") for city in ("New York", "London", "Paris", "Singapore")] == [1, 1, 1, 3]
    plain = TextNeedleTask(tokenizer, STORY, distractors=0, seed=1)
    plain.cells([100], [0], 1)
    assert test.prompt() != plain.prompt()
    assert set(plain.prompt()) == {"text", "distractors", "task"}, "the keys of earlier results"


def test_when_is_between_the_neighbours(seeing: Any) -> None:
    """Two artifacts after each other: 4 frames half a second apart from 10 s on, then 36 a second apart."""
    pts = [10 + np.arange(4) / 2, 100 + np.arange(36.0)]
    seconds = joined_times(pts)
    assert seconds[:6].tolist() == [10, 10.5, 11, 11.5, 12.5, 13.5]
    test = video(seeing, seconds=seconds, question="when", tolerance=1.5, loop=True)
    cells = {(c.length, c.depth): c for c in test.cells([4, 80], [0, 0.5, 1], 1)}
    assert [cells[4, d].answer for d in (0, 0.5, 1)] == ["10", "10.75", "11.5"]
    # 40 frames last until 47.5; repeated, the video goes on one mean step (37.5 / 39) later.
    assert float(cells[80, 0.5].answer) == pytest.approx((47.5 + 47.5 + 37.5 / 39) / 2, abs=0.01)
    assert "from second 10 to second 11.5" in cells[4, 0].question
    assert "color" not in cells[4, 0].question
    cell = cells[4, 0.5]
    for written, right in (("12", True), ("Second 9.5.", True), ("13", False), ("soon", False)):
        assert test.score_text(cell, written) == right, written
    assert not test.can_force


def grouped(tokenizer: Any, question: Any, *, frames: int = 1, distractors: int = 0, **options: Any) -> VideoNeedleTask:
    """Three needles a trial."""
    needles = drawn_groups(4, per_trial=3, frames=frames, question=question, size=48, seed=2, distractors=distractors)
    tokens = even_tokens(vocabulary=50_000, per_frame=4, frames=40, inserted=len(needles.needles) + distractors)
    return VideoNeedleTask(tokenizer, needles, tokens, **{"seconds": np.arange(40.0), "question": question, **options})


@pytest.mark.parametrize("question", ["what", "count", "order", "values"])
@pytest.mark.parametrize("nested", [False, True])
def test_several_needles_are_inserted_whole_and_asked_about(question: Any, nested: bool, seeing: Any) -> None:
    """Clips of two frames; the first needle is at the cell's depth, and the answer is what the frames show."""
    test = grouped(seeing, question, frames=2, distractors=2, nested=nested)
    cells = test.cells([12, 40], [0, 0.3, 1], 4)
    assert len(cells) >= 20
    for cell in cells:
        rows = rows_of(test, cell)
        assert [r for r in rows if r < 40] == list(range(cell.length))
        inserted = [r - 40 for r in rows if 40 <= r < 40 + len(test.needles)]
        used = cell.trial % 3 + 1 if question == "count" else 3
        clips = list(zip(inserted[::2], inserted[1::2], strict=True))
        assert sorted(inserted) == list(range(6 * cell.trial, 6 * cell.trial + 2 * used))
        assert all(second == first + 1 and first % 2 == 0 for first, second in clips)
        asked = test.needles[6 * cell.trial]
        assert sum(r < 40 for r in rows[: rows.index(40 + 6 * cell.trial)]) == cell.position
        shapes = [test.needles[first].shape for first, _ in clips]
        colors = ", ".join(test.needles[6 * cell.trial + 2 * i].answer for i in range(3))
        expected = {"what": asked.answer, "count": str(used), "order": ", ".join(shapes), "values": colors}
        assert cell.answer == expected[question]
        assert len(set(shapes)) == (1 if question in ("count", "values") else 3)
        assert all(shape in cell.question for shape in shapes) or question == "what"
        assert not any(color in cell.question for color in colors.split(", "))
        assert test.can_force == (question != "values")
        assert test.score_text(cell, f"{cell.answer}.") == 1
    assert len({(cell.needle, cell.length, cell.depth) for cell in cells}) == len(cells)
    # Three of the seven colors that distractors leave can be chosen in 7 * 6 * 5 / 3! ways.
    assert test.chance == {"what": 1 / 7, "count": 1 / 3, "order": 1 / 6, "values": 1 / 35}[question]


def test_replies_about_several_needles(seeing: Any) -> None:
    order = grouped(seeing, "order")
    cell = order.cells([10], [0.5], 1)[0]
    first, second, third = cell.answer.split(", ")
    for reply, right in (
        (f"First the {first}, then the {second}s, then the {third}; the {first} again", True),
        (f"{second}, {first}, {third}", False),
        (f"{first}, {second}", False),
        ("none", False),
    ):
        assert order.score_text(cell, reply) == right, reply
    values = grouped(seeing, "values")
    cell = values.cells([10], [0.5], 1)[0]
    first, second, third = cell.answer.split(", ")
    others = [color for color in COLORS if color not in cell.answer]
    for reply, share in (
        (f"{third}, {first.upper()} and {second}.", 1),
        (f"{first}, {second}", 2 / 3),
        (f"{cell.answer}, {others[0]}", 3 / 4),
        (", ".join(COLORS), 3 / 10),
        ("none", 0),
    ):
        assert values.score_text(cell, reply) == pytest.approx(share), reply
    count = grouped(seeing, "count")
    cell = count.cells([10], [0.5], 2)[1]
    assert [count.score_text(cell, reply) for reply in ("2", "There are 2.", "3", "two", "")] == [1, 1, 0, 0, 0]


def looks(text: np.ndarray) -> np.ndarray:
    """Grey levels of a text (H, W) as dark ink on light, cut to the ink and 120 x 40."""
    text = text if text.mean() > 127 else 255 - text
    rows, columns = np.nonzero(text < 100)
    inked = Image.fromarray(text[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(np.uint8))
    return np.asarray(inked.resize((120, 40), Image.Resampling.BOX)).astype(float).ravel()


def most_alike(image: np.ndarray, plate: np.ndarray, texts: set[str]) -> str:
    """Which of the texts looks most like what an image (H, W, 3) has where `plate` (H, W) is true."""
    rows, columns = (np.nonzero(plate.mean(axis=axis) > 0.04)[0] for axis in (1, 0))
    shown = looks(image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].mean(axis=2))

    def drawn(text: str) -> np.ndarray:
        page = Image.new("L", (900, 200), 255)
        ImageDraw.Draw(page).multiline_text((9, 9), text, font=ImageFont.load_default(60), align="center")
        return looks(np.asarray(page))

    return max(texts, key=lambda text: np.corrcoef(shown, drawn(text))[0, 1])


def test_a_code_is_what_the_image_shows() -> None:
    drawn = drawn_groups(2, per_trial=3, frames=1, question="code", size=336, seed=2, distractors=2)
    needles = [*drawn.needles, *drawn.distractors]
    texts = [f"{needle.subject.split()[-1]}\n{needle.answer}" for needle in needles]
    assert len(set(texts)) == 8
    assert len({text.split("\n")[0] for text in texts[:3] + texts[6:]}) == 5, "a word is on one image"
    assert all(needle.subject.split()[-1] in needle.question for needle in needles)
    for needle, text in zip(needles, texts, strict=True):
        image = np.asarray(needle.image)
        pure = np.isin(image.sum(axis=2), (0, 765))
        pure[pure.mean(axis=1) < 0.4] = False
        assert most_alike(image, pure, set(texts)) == text
    assert drawn.chance == pytest.approx(1 / 23**5)
    assert all(re.fullmatch("[A-Z0-9]{5}", needle.answer) for needle in needles)


def test_needles_name_each_other_in_a_cycle(seeing: Any) -> None:
    """The answer is found by reading the images' plates; the others are the parts of an image without one."""
    trials, count = 4, 5
    drawn, plain = (
        drawn_groups(trials, per_trial=count, frames=1, question=question, size=224, seed=2, distractors=2)
        for question in ("hops", "what")
    )
    tokens = even_tokens(vocabulary=50_000, per_frame=4, frames=40, inserted=len(drawn.needles) + 2)
    test = VideoNeedleTask(seeing, drawn, tokens, seconds=np.arange(40.0), question="hops")
    shapes = {needle.shape for needle in drawn.needles}
    inorder = 0
    for cell in test.cells([20], [0.5], trials):
        needles = drawn.needles[count * cell.trial : count * (cell.trial + 1)]
        following = {needle.shape: needle.next_shape for needle in needles}
        assert sorted(following) == sorted(following.values())
        visited = [needles[0].shape]
        while following[visited[-1]] != visited[0]:
            visited.append(following[visited[-1]])
        assert len(visited) == count, "one cycle"
        inorder += visited == [needle.shape for needle in needles]
        assert f"the {visited[0]}." in cell.question
        assert "for 2 steps" in cell.question
        assert cell.answer == next(needle.answer for needle in needles if needle.shape == visited[2])
        assert test.score_text(cell, f"{cell.answer.upper()}.") == 1
        assert test.can_force
        image, before = (np.asarray(one.needles[count * cell.trial].image) for one in (drawn, plain))
        named = most_alike(image, (image != before).any(axis=2), {f"next: {shape}" for shape in shapes})
        assert named == f"next: {needles[0].next_shape}"
    assert inorder < trials, "the order of the names is not that of the video"
    assert not {n.shape for n in drawn.distractors} & shapes
    assert not {n.next_shape for n in drawn.distractors} & shapes
    assert all(n.next_shape not in ("", n.shape) for n in drawn.distractors)
    assert drawn.chance == 1 / 7


def test_replies_about_a_code(seeing: Any) -> None:
    test = grouped(seeing, "code")
    cell = test.cells([10], [0.5], 1)[0]
    assert cell.answer == test.needles[0].answer
    for reply, right in (
        (f"The code is {cell.answer.lower()}.", 1),
        (f"{cell.answer}X", 0),
        (test.needles[1].answer, 0),
    ):
        assert test.score_text(cell, reply) == right


def test_a_needle_of_several_frames_moves_before_one_background() -> None:
    images = [
        np.asarray(n.image).astype(int)
        for n in drawn_groups(1, per_trial=1, frames=3, question="what", size=48, seed=0).needles
    ]
    changed = [np.abs(a - b).max(axis=2) > 0 for a, b in ((images[0], images[1]), (images[1], images[2]))]
    assert all(0 < part.mean() < 1 for part in changed), "the shape moves, and not all of the background is covered"


@pytest.mark.parametrize(
    "options",
    [
        {"question": "count"},
        {"question": "order"},
        {"question": "hops"},
        {"question": "code", "needles": "folder"},
        {"question": "when", "count": 2},
        {"needles": "folder", "count": 2},
    ],
)
def test_questions_about_several_needles_need_them(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        VideoNiahConfig(model="m", haystack=(Path("h"),), lengths=(8,), **options)


def tree_size(sequences: list[np.ndarray]) -> int:
    whole = sorted(tuple(s[:-1].tolist()) for s in sequences)
    shared = [common_prefix(np.array(a), np.array(b)) for a, b in itertools.pairwise(whole)]
    return sum(map(len, whole)) - sum(shared)


@pytest.mark.parametrize("modality", ["text", "video"])
@pytest.mark.parametrize("distractors", [0, 2])
def test_nested_points_make_all_lengths_cost_what_the_longest_does(
    modality: str, distractors: int, tokenizer: Any, seeing: Any
) -> None:
    def test(nested: bool) -> Any:
        if modality == "video":
            return video(seeing, nested=nested, distractors=distractors)
        return TextNeedleTask(tokenizer, STORY, distractors=distractors, seed=0, nested=nested)

    lengths = list(range(10, 41, 5)) if modality == "video" else list(range(400, 1001, 100))
    depths = [0, 0.2, 0.4, 0.6, 0.8, 1]

    def cost(nested: bool, lengths: list[int]) -> tuple[int, int]:
        chosen = test(nested)
        cells = chosen.cells(lengths, depths, 2)
        return tree_size([chosen.sequence(c)[0] for c in cells]), len(cells)

    (whole, cells), (row, _), (usual, _) = cost(True, lengths), cost(True, lengths[-1:]), cost(False, lengths)
    # Per cell a question of its own and, at an end, a needle; the haystack behind a needle is read once.
    assert whole - row < 110 * cells
    if modality == "text":  # where questions are short beside the haystack
        assert whole < 0.75 * usual
    for cell in test(True).cells(lengths, depths, 1):
        assert cell.point is not None
        assert 0 <= cell.depth <= 1
        assert (cell.depth == 1) == (cell.point == 1)


def test_nested_and_looped_grids_score_like_plain_forwards(tiny_lm: Path, tokenizer: Any) -> None:
    model = load_model(tiny_lm)
    test = TextNeedleTask(
        tokenizer, STORY[:420], distractors=1, seed=0, task="multi-query", count=2, nested=True, loop=True
    )
    with pytest.raises(InputError, match="--loop"):
        TextNeedleTask(tokenizer, STORY[:420], distractors=1, seed=0).cells([400], [0], 1)
    cells = test.cells([200, 300, 400], [0, 0.5, 1], 1)
    sequences = [test.sequence(cell)[0] for cell in cells]
    walker = PrefixScorer(copy.deepcopy(model), chunk=64)
    for i in walk_order(sequences):
        ids, answer = test.sequence(cells[i])
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None]).logits[0, -answer - 1 : -1].double()
        stock = logits.log_softmax(-1)[torch.arange(answer), torch.from_numpy(ids[-answer:])].sum()
        assert walker.score(ids, answer).log_prob == pytest.approx(float(stock), abs=1e-3)
    text = tokenizer.decode(max(sequences, key=len))
    assert text.count("The old tree stood") >= 6  # the story has four of them


def test_a_looped_video_repeats(seeing: Any) -> None:
    test = video(seeing, loop=True)
    cell = test.cells([100], [1], 1)[0]
    assert rows_of(test, cell) == [*range(40), *range(40), *range(20), 40]
    with pytest.raises(InputError, match="--loop"):
        video(seeing).cells([41], [0], 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_all_cells_evenly(ranks: int) -> None:
    cells = [
        Cell(length=n, depth=d, trial=k, position=int(d * n), needle="", question="", answer="")
        for n in range(200, 3001, 200)
        for d in (0, 0.2, 0.4, 0.6, 0.8, 1)
        for k in range(5)
    ]
    shares = partition_cells(cells, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(cells)))
    assert shares == partition_cells(cells, ranks)
    home = {(cells[i].trial, cells[i].position): r for r, share in enumerate(shares) for i in share}
    assert all(home[cells[i].trial, cells[i].position] == r for r, share in enumerate(shares) for i in share)
    loads = [0] * ranks
    for (trial, position), r in home.items():
        loads[r] += max(c.length for c in cells if (c.trial, c.position) == (trial, position)) - position
    assert max(loads) - min(loads) <= 3000
    assert max(loads) < 1.05 * sum(loads) / ranks + 1
