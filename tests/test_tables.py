"""Question files: options, keys, encodings and dialects in use; unreadable values are named."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import ipc
from support.refusals import refused

from lvctx.errors import InputError
from lvctx.eval.benchmarks import longvideobench, mlvu, nextqa, vhs, videomme

OPTIONS = ["A. it's 1", 'B. "two", or 2', "C. [3] é", "D. 4"]
VIDEOMME = {
    **{"video_id": "001", "videoID": "abc", "question_id": "001-1", "duration": "short", "domain": "Knowledge"},
    **{"sub_category": "Law", "task_type": "OCR Problems", "question": "What?", "options": OPTIONS, "answer": "B"},
}
NEXTQA = {
    **{"video": 4010069381, "question": "why did he run", "answer": 3, "qid": 6, "type": "CW"},
    **{"a0": "hot", "a1": "cold", "a2": "fun", "a3": "late", "a4": "lost"},
}
LVB = {
    **{"id": "v_0", "video_path": "v.mp4", "question": "What?", "candidates": ["a", "b", "c"], "correct_choice": 1},
    **{"duration_group": 60, "question_category": "T2E", "topic_category": "x"},
}
MLVU = {
    "video": "v.mp4",
    "question": "What?",
    "candidates": ["red", "blue"],
    "answer": "blue",
    "question_type": "plotQA",
}
VHS = {
    "conversations": [{"from": "human", "value": "Is there a dog?"}, {"from": "gpt", "value": "yes"}],
    **{"pos_image": ["0.png"], "neg_image": ["1.png", "2.png"]},
}


def write(folder: Path, *rows: dict[str, Any], name: str = "q.json") -> Path:
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def table(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8", **dialect: Any) -> Path:
    with open(path, "w", newline="", encoding=encoding) as f:
        writer = csv.DictWriter(f, list(rows[0]), **dialect)
        writer.writeheader()
        writer.writerows(rows)
    return path


# --- options


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(OPTIONS),
        json.dumps(OPTIONS, ensure_ascii=False, indent=1),
        str(OPTIONS),
        str(tuple(OPTIONS)),
        str(np.array(OPTIONS, dtype=object)),
        repr(np.array(OPTIONS, dtype=object)),
        repr(np.array(OPTIONS)),
        "\n".join(OPTIONS),
        "\r\n".join(OPTIONS) + "\r\n",
        "; ".join(OPTIONS),
        " ".join(OPTIONS),
        str({one[0]: one[3:] for one in OPTIONS}),
        json.dumps({one[0]: one[3:] for one in OPTIONS}),
    ],
)
def test_options_as_text_are_the_list_that_they_were(text: str, tmp_path: Path) -> None:
    expected = tuple(OPTIONS)
    (one,) = videomme.samples(write(tmp_path, VIDEOMME | {"options": text}))
    assert one.options == expected
    (one,) = videomme.samples(table(tmp_path / "q.csv", [VIDEOMME | {"options": text}]))
    assert one.options == expected
    pq.write_table(pa.Table.from_pylist([VIDEOMME | {"options": text}]), tmp_path / "q.parquet")
    (one,) = videomme.samples(tmp_path / "q.parquet")
    assert one.options == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["1", "2"], ("A. 1", "B. 2")),
        ([1, 2.0, 2.5], ("A. 1", "B. 2", "C. 2.5")),
        ("[1 2 3]", ("A. 1", "B. 2", "C. 3")),
        ("['x' 'y']", ("A. x", "B. y")),
        ("[u'x', u'y']", ("A. x", "B. y")),
        ("x\ny\n\nz", ("A. x", "B. y", "C. z")),
        ("A. one\nand more\nB. two", ("A. one\nand more", "B. two")),
        ("(A) x (B) y", ("(A) x", "(B) y")),
        ("[A. x, B. y]", ("A. x", "B. y")),
        (["(A) x", "(B) y"], ("(A) x", "(B) y")),
        (["A. x", "y"], ("A. A. x", "B. y")),
        ({"A": "x", "B": "y", "C": None}, ("A. x", "B. y")),
        (r"['a\'b\n', '\d']", ("A. a'b\n", "B. \\d")),
    ],
)
def test_options_without_letters_get_them(value: Any, expected: tuple[str, ...], tmp_path: Path) -> None:
    (one,) = videomme.samples(write(tmp_path, VIDEOMME | {"options": value}))
    assert one.options == expected


@pytest.mark.parametrize(
    "value",
    [
        *(
            "",
            "yes",
            "[",
            "[]",
            "['a' b]",
            "['a', 'b'",
            "{'x': 1, 'y': 2}",
            "{1}",
            "A. x; C. y",
            "['a', ['b']]",
            "nan",
            r"['\ud800' 'b']",
            r'["\ud800", "b"]',
        ),
        *([], ["a"], ["a", ""], ["a", None], ["a", ["b"]], [str(i) for i in range(27)], 3, None, {"x": "a", "y": "b"}),
    ],
)
def test_options_that_are_no_list_are_refused_by_row(value: Any, tmp_path: Path) -> None:
    with refused(InputError, "q.json, row 2"):
        videomme.samples(write(tmp_path, VIDEOMME, VIDEOMME | {"options": value}))


def test_candidates_of_the_others_may_be_text_too(tmp_path: Path) -> None:
    (one,) = mlvu.samples(write(tmp_path, MLVU | {"candidates": "['red' 'blue']"}))
    assert (one.options, one.answer) == (("(A) red", "(B) blue"), "B")
    (one,) = longvideobench.samples(write(tmp_path, LVB | {"candidates": '["a", "b"]'}))
    assert one.options == ("A. a", "B. b")
    columns = {"candidates": None, **{f"option{i}": text for i, text in enumerate(["a", "b", "N/A", None, ""])}}
    (one,) = longvideobench.samples(write(tmp_path, LVB | columns))
    assert one.options == ("A. a", "B. b")
    with pytest.raises(InputError, match="row 1: option2 is missing"):
        longvideobench.samples(write(tmp_path, LVB | columns | {"option4": "e"}))
    (one,) = vhs.samples(write(tmp_path, VHS | {"pos_image": "0.png", "neg_image": "['1.png' '2.png']"}))
    assert sorted(one.images) == ["0.png", "1.png", "2.png"]


# --- keys


@pytest.mark.parametrize("key", [3, "3", 3.0, "3.0", " 3 ", "D", "d", "(D)", "D.", "D. late"])
def test_a_key_that_counts_from_0_or_is_a_letter(key: Any, tmp_path: Path) -> None:
    (one,) = nextqa.samples(write(tmp_path, NEXTQA | {"answer": key}))
    assert one.answer == "D"
    (one,) = longvideobench.samples(write(tmp_path, LVB | {"correct_choice": key, "candidates": list("wxyz")}))
    assert one.answer == "D"


@pytest.mark.parametrize(
    "key", [7, -1, "-1", "7", 1.5, "1.5", None, "", float("nan"), float("inf"), True, [3], {}, "F", "x y"]
)
def test_other_keys_are_refused_by_row(key: Any, tmp_path: Path) -> None:
    for bench, row, name in (
        (nextqa, NEXTQA, "answer"),
        (longvideobench, LVB, "correct_choice"),
        (videomme, VIDEOMME, "answer"),
    ):
        with pytest.raises(InputError, match=rf"q\.json, row 1: .*{name}"):
            bench.samples(write(tmp_path, row | {name: key}))
    with refused(InputError, "q.json, row 1"):
        videomme.samples(write(tmp_path, VIDEOMME | {"answer": 1}))  # Video-MME has letters


@pytest.mark.parametrize(
    ("candidates", "answer", "letter"),
    [
        (["red", "blue", "red "], "red", "A"),
        (["red", "blue", "red "], "red ", "C"),
        (["red", "blue"], " Blue", "B"),
        (["red", "blue"], "B", "B"),
        (["red", "blue"], "(B) blue", "B"),
        (["B", "A"], "A", "B"),  # the text before the letter
        ([1, 2, 3], 2, "B"),
        (["1.5", "2"], 2.0, "B"),
        (list("uvwxyz"), "z", "F"),
        (["Red", "red"], "RED", None),
        (["red", "blue"], "green", None),
        (["red", "blue"], "C", None),
        (["red", "blue"], None, None),
    ],
)
def test_mlvu_answers_are_the_text_of_an_option(
    candidates: Any, answer: Any, letter: str | None, tmp_path: Path
) -> None:
    file = write(tmp_path, MLVU | {"candidates": candidates, "answer": answer})
    if letter is None:
        with refused(InputError, "q.json, row 1"):
            mlvu.samples(file)
    else:
        assert mlvu.samples(file)[0].answer == letter


def test_mlvu_options_in_the_question(tmp_path: Path) -> None:
    six = "What?\n" + "\n".join(f"({one}) x" for one in "ABCDEF")
    row = {"video_name": "v.mp4", "question": six, "answer": "F", "task_type": "ego"}
    (one,) = mlvu.samples(write(tmp_path, row))
    assert (len(one.options), one.answer) == (6, "F")
    (one,) = mlvu.samples(write(tmp_path, row | {"question": "Which?", "answer": "D"}))
    assert len(one.options) == 4
    with refused(InputError, "q.json, row 1"):
        mlvu.samples(write(tmp_path, row | {"question": "Which?"}))


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"conversations": bad}
            for bad in (None, [], "ab", {}, [{"value": "x"}], ["a", "b"], [{"value": "x"}, {"value": None}])
        ),
        {"conversations": [{"value": "Is there?"}, {"value": "maybe"}]},
        *({"pos_image": bad} for bad in (None, [None], {"x": 1}, "[a]")),
    ],
)
def test_bad_rows_of_visual_haystacks_are_named(change: dict[str, Any], tmp_path: Path) -> None:
    with refused(InputError, "q.json, row 2"):
        vhs.samples(write(tmp_path, VHS, VHS | change))


@pytest.mark.parametrize(
    ("bench", "row", "names"),
    [
        (
            videomme,
            VIDEOMME,
            ["question_id", "question", "duration", "domain", "sub_category", "task_type", "video_id"],
        ),
        (nextqa, NEXTQA, ["video", "question", "qid", "type", "a0", "a4"]),
        (longvideobench, LVB, ["id", "question", "video_path", "duration_group", "question_category"]),
        (mlvu, MLVU, ["video", "question", "answer"]),
    ],
)
@pytest.mark.parametrize("value", [None, "", " ", float("nan"), ["x"], {"x": 1}])
def test_what_a_row_lacks_is_named(
    bench: Any, row: dict[str, Any], names: list[str], value: Any, tmp_path: Path
) -> None:
    for name in names:
        with refused(InputError, "q.json, row 2"):
            bench.samples(write(tmp_path, row, row | {name: value}))


# --- files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings_and_separators_inside_strings(encoding: str, tmp_path: Path) -> None:
    question = "What\u2028is\u2029it\x85, é\x0b?"
    rows = [VIDEOMME | {"question": question}, VIDEOMME | {"question_id": "001-2"}]
    for name, text in (
        ("a.json", json.dumps(rows, ensure_ascii=False)),
        ("b.jsonl", "\n \n" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"),
        ("c.JSONL", "\r".join(json.dumps(row, ensure_ascii=False) for row in rows)),
        ("d.json", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
    ):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert [s.question for s in videomme.samples(tmp_path / name)] == [question, "What?"]
    named = [NEXTQA | {"question": question}, NEXTQA | {"qid": 7, "question": 'why\r\nrun, then "stop"'}]
    for suffix in (".csv", ".CSV"):
        samples = nextqa.samples(table(tmp_path / f"q{suffix}", named, encoding))
        assert [s.question for s in samples] == [question, 'why\r\nrun, then "stop"']


@pytest.mark.parametrize(
    ("name", "before", "dialect"),
    [
        ("q.csv", "", {"delimiter": ";"}),
        ("q.csv", "", {"delimiter": "\t"}),
        ("q.csv", "", {"delimiter": "|"}),
        ("q.tsv", "", {"delimiter": "\t"}),
        ("q.csv", "sep=;\n", {"delimiter": ";"}),
        ("q.csv", "\n\n", {}),
        ("q.csv", "", {"lineterminator": "\r"}),
        ("q.csv", "", {"lineterminator": "\n\n"}),
        ("q.csv", "", {"quoting": csv.QUOTE_ALL}),
    ],
)
def test_dialects_of_csv(name: str, before: str, dialect: dict[str, Any], tmp_path: Path) -> None:
    file = table(tmp_path / name, [NEXTQA, NEXTQA | {"qid": 7, "question": "a; b, c | d"}], **dialect)
    file.write_bytes(before.encode() + file.read_bytes())
    assert [(s.id, s.question) for s in nextqa.samples(file)] == [
        ("4010069381-6", "why did he run"),
        ("4010069381-7", "a; b, c | d"),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [rows[0], rows[1], rows[2] + ",more"], "row 2: more fields"),
        (lambda rows: [rows[0], rows[1], rows[2].rpartition(",")[0]], "row 2: option E is blank"),
        (lambda rows: [rows[0], rows[1].replace("why", '"why'), rows[2]], "row 1: malformed CSV"),
        (lambda rows: [rows[0], rows[1], rows[2].replace("why", "y" * 200_000)], "row 2: malformed CSV"),
        (lambda rows: ["video,question", "1,2"], "row 1: "),
        (lambda rows: rows[:1], "no question"),
        (lambda rows: [], "no question"),
    ],
)
def test_broken_csv_names_the_row(change: Any, words: str, tmp_path: Path) -> None:
    file = table(tmp_path / "q.csv", [NEXTQA, NEXTQA | {"qid": 7}])
    file.write_text("\n".join(change(file.read_text().split("\n")[:3])))
    with pytest.raises(InputError, match=words):
        nextqa.samples(file)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("q.csv", "café".encode("latin-1")),
        ("q.json", b'[{"a": "caf\xe9"}]'),
        ("q.json", "[1]".encode("utf-16")[:-1]),
        ("q.json", b"[" * 100_000),
        ("q.json", b'["\\ud800"]'),
        ("q.json", b"[1, 2]"),
        ("q.jsonl", b'{"a": 1}\n{"a": '),
        ("q.jsonl", b"[" + b"9" * 5000 + b"]"),
        ("q.json", b"null"),
        ("q.json", b"[]"),
        ("q.parquet", b""),
        ("q.arrow", b"ARROW1\0\0"),
    ],
)
def test_files_that_are_no_questions_are_named(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        videomme.samples(tmp_path / name)


def test_columns_of_other_types(tmp_path: Path) -> None:
    """Arrow's own file format; text as bytes, whole numbers as floats (a column with a gap); text that is no UTF-8."""
    made = pa.Table.from_pylist([NEXTQA | {"video": 24.0, "question": b"why", "qid": 6.0, "answer": 3.0}])
    with ipc.new_file(tmp_path / "q.arrow", made.schema) as f:
        f.write_table(made)
    (one,) = nextqa.samples(tmp_path / "q.arrow")
    assert (one.id, one.video, one.question, one.answer) == ("24-6", "24", "why", "D")
    broken = pa.Table.from_pylist([NEXTQA | {"question": b"\xff"}])
    pq.write_table(broken, tmp_path / "q.parquet")
    with pytest.raises(InputError, match="row 1: question is not text"):
        nextqa.samples(tmp_path / "q.parquet")
    at = broken.schema.get_field_index("question")
    text = pa.Array.from_buffers(pa.string(), 1, broken["question"].chunk(0).buffers())
    pq.write_table(broken.set_column(at, "question", text), tmp_path / "q.parquet")
    with refused(InputError, "q.parquet"):
        nextqa.samples(tmp_path / "q.parquet")
