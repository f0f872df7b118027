"""Mutated question files, responses, results and subtitles: exit codes 0, 2, 3, 4 and 5 only, never a traceback."""

import copy
import csv
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tables import LVB, MLVU, NEXTQA, VHS, VIDEOMME
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.data.records import read_records
from lvctx.errors import LvctxError
from lvctx.eval.benchmarks import longvideobench, mlvu, nextqa, vhs, videomme
from lvctx.eval.benchmarks.benchmark_list import load_benchmark
from lvctx.eval.benchmarks.responses import write_responses
from lvctx.eval.benchmarks.subtitles import NONE, read_subtitles

SETS = Path(__file__).parent / "data" / "benchmarks"
ROWS = {videomme: VIDEOMME, nextqa: NEXTQA, longvideobench: LVB, mlvu: MLVU, vhs: VHS} | {
    load_benchmark(file.name.partition(".")[0]): next(read_records(file)).value
    for file in sorted(SETS.glob("*.json*"))
    if file.name not in ("mlvu.json", "longvideobench.json")
}
ODD = [
    *(
        None,
        "",
        " ",
        "3.0",
        "B",
        "(B)",
        "b. x",
        "E",
        "nan",
        "['a' 'b']",
        "[",
        "{",
        "A. x\nB. y",
        "x" * 3000,
        "\u2028",
        "\ud800",
    ),
    *(
        float("nan"),
        float("inf"),
        3.0,
        -1,
        7,
        10**30,
        1e300,
        True,
        [],
        {},
        ["a"],
        ["a", None],
        [[]],
        {"value": 1},
        [{}],
        "\0",
        "[/b]",
    ),
]
few = settings(max_examples=30, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**32 - 1)


def mutate(rows: list[Any], dice: random.Random) -> list[Any]:
    """Some cells, at any depth, replaced or removed."""
    rows = copy.deepcopy(rows)
    for _ in range(dice.randint(0, 3)):
        at: Any = rows
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = dice.choice(keys)
            if isinstance(at[key], list | dict) and at[key] and dice.random() < 0.7:
                at = at[key]
                continue
            if dice.random() < 0.2:
                del at[key]
            else:
                at[key] = copy.deepcopy(dice.choice(ODD))  # which the next mutation may change
            break
    return rows


def damage(file: Path, dice: random.Random) -> Path:
    """Sometimes another encoding, or bytes changed, cut out or repeated."""
    data = bytearray(file.read_bytes())
    if dice.random() < 0.2 and file.suffix not in (".parquet", ".arrow"):
        data = bytearray(
            data.decode("utf-8", "replace").encode(dice.choice(["utf-16", "utf-8-sig", "utf-16-le", "utf-7"]))
        )
    for _ in range(dice.choice([0, 0, 0, 1, 3])):
        at = dice.randrange(len(data) + 1)
        data[at : at + dice.choice([0, 1, 1, 40])] = dice.choice(
            [b"", b"\xff", b"\0", b'"', b"\n", b"[" * 3000, b"\\ud800", b","]
        )
    file.write_bytes(data)
    return file


def flat(rows: list[Any]) -> list[dict[str, Any]]:
    return [row for row in rows if isinstance(row, dict)]


def write(folder: Path, rows: list[Any], dice: random.Random) -> Path:
    suffix = dice.choice([".json", ".jsonl", ".csv", ".parquet", ".JSON"])
    file = folder / f"q{suffix}"
    if suffix == ".parquet":
        try:
            pq.write_table(pa.Table.from_pylist(flat(rows)), file)
        except (pa.ArrowException, OverflowError, UnicodeError, ValueError):  # no such column can be
            file.write_bytes(b"PAR1")
    elif suffix == ".csv":
        names = list(dict.fromkeys(key for row in flat(rows) for key in row))
        with open(file, "w", newline="", encoding="utf-8", errors="replace") as f:
            writer = csv.DictWriter(f, names, delimiter=dice.choice(",;\t"))
            writer.writeheader()
            writer.writerows(flat(rows))
    else:
        separator = "\n" if suffix == ".jsonl" else None
        escape = dice.random() < 0.5
        text = (
            separator.join(json.dumps(row, ensure_ascii=escape) for row in rows)
            if separator
            else json.dumps(rows, ensure_ascii=escape)
        )
        file.write_text(text, encoding="utf-8", errors="replace")
    return damage(file, dice)


@pytest.mark.parametrize("bench", ROWS, ids=lambda bench: bench.NAME)
@given(seed=seeds)
@settings(few, max_examples=80)
def test_question_files(bench: ModuleType, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What can be read makes prompts, results and an official file; what cannot is one line that names the file."""
    dice = random.Random(seed)
    folder = tmp_path_factory.mktemp("q")
    rows = [ROWS[bench], {**ROWS[bench], "question_id": "2", "id": "2", "qid": 2}]
    file = write(folder, mutate(rows, dice), dice)
    try:
        samples = bench.samples(file)
    except LvctxError as e:
        refused = str(e)
    else:
        refused = ""
    if refused:
        assert (file.name in refused, "\n" in refused) == (True, False)
        return
    for sample in samples:
        assert not (sample.options and sample.answer) or 65 <= ord(sample.answer) < 65 + len(sample.options)
        texts = (sample.id, sample.video, sample.question, sample.answer, *sample.groups.values())
        assert all(isinstance(text, str) for text in texts)
        assert all(isinstance(bench.prompt(sample, style, None), str) for style in bench.STYLES)
        json.dumps([*texts, *sample.options, *sample.images], ensure_ascii=False).encode()
    if bench is videomme:
        write_responses(folder / "responses.json", [(sample, "B") for sample in samples])
        assert CliRunner().invoke(app, ["videomme", "score", str(folder / "responses.json")]).exit_code == 0


def run(*arguments: object) -> None:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code in (0, 2, 3, 4, 5), done.output
    if done.exit_code:
        assert done.stderr.count("\n") == 1


@given(seed=seeds)
@few
def test_responses(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    dice = random.Random(seed)
    folder = tmp_path_factory.mktemp("r")
    asked = {key: VIDEOMME[key] for key in ("question_id", "task_type", "question", "options", "answer")}
    video = {key: VIDEOMME[key] for key in ("video_id", "duration", "domain", "sub_category")}
    video["questions"] = [{**asked, "response": text} for text in ("B", "<think>A</think>B", "Answer: C")]
    for name in ("a.json", "b.json"):
        (folder / name).write_text(json.dumps(mutate([video, {**video, "video_id": "2"}], dice)))
    damage(folder / "a.json", dice)
    run("videomme", "score", folder / "a.json")
    run("videomme", "score", folder / "a.json", folder / "b.json", "--json", "--csv", folder / "c.csv")


@pytest.mark.parametrize("bench", [bench for bench in ROWS if bench is not videomme], ids=lambda bench: bench.NAME)
@given(seed=seeds)
@settings(few, max_examples=6)
def test_results_of_runs(bench: ModuleType, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    dice = random.Random(seed)
    folder = tmp_path_factory.mktemp("run")
    made = []
    for number in range(4):
        sample = bench.samples(ask(folder, ROWS[bench]))[0]
        letters = "".join(chr(65 + i) for i in range(len(sample.options)))
        shared = {
            "key": str(number),
            "bench": bench.NAME,
            "id": str(number),
            "video": sample.video,
            "answer": sample.answer,
        }
        made.append(
            {**shared, "letters": letters, "groups": dict(sample.groups), "response": dice.choice(["B", "Yes", ""])}
        )
    made.append({"key": "x", "error": "no video"})
    rows = mutate(made, dice)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    damage(folder / "results.jsonl", dice)
    run("bench", bench.NAME, "score", folder)
    run("bench", bench.NAME, "score", folder, "--json")


def ask(folder: Path, row: dict[str, Any]) -> Path:
    (folder / "one.json").write_text(json.dumps([row]))
    return folder / "one.json"


@given(seed=seeds)
@settings(few, max_examples=200)
def test_subtitle_files(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    dice = random.Random(seed)
    pieces = [
        "1",
        "2",
        "\n",
        "\r",
        "\n\n",
        "00:00:01,000 --> 00:00:02,000",
        "-->",
        "00:",
        "99999999999",
        "text",
        "<i>",
        "WEBVTT",
        "\x85",
        "&#x;",
        "{\\a}",
        "٣",
    ]
    file = tmp_path_factory.mktemp("s") / "v.srt"
    file.write_text(
        "".join(dice.choice(pieces) + dice.choice(["\n", ""]) for _ in range(dice.randint(0, 30))), newline=""
    )
    try:
        found = read_subtitles(damage(file, dice))
    except LvctxError as e:
        refused, found = str(e), NONE
    else:
        refused = "v.srt"
    assert "v.srt" in refused
    assert all(start < end and text for start, end, text in found.lines)
    found.at([0.0, 1.0, 1e9]).encode()
