"""Packaged protocols: values of published evaluations, their precedence, rows that say so, warnings of score."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import mrope_models
from test_questions import DATA, rows_of, run
from test_videomme import finish_run, videos

from lvctx.cli import options
from lvctx.cli.benchmarks import BENCHMARKS, load_benchmark
from lvctx.cli.options import config_classes, config_fields
from lvctx.errors import InputError, UsageError
from lvctx.eval.benchmarks.answers import RULES
from lvctx.eval.benchmarks.protocol import (
    REQUIREMENTS,
    EvalProtocol,
    load_protocol,
    protocol_difference,
    protocol_names,
    protocol_of_rows,
    read_protocol,
)

NAMES = ["internvl3", "llava-video", "lmms-eval", "longva", "official", "qwen2.5-vl", "qwen3-vl", "videochat-flash"]
PAIRS = [(name, bench) for name in protocol_names() for bench in read_protocol(name)]
PUBLISHED = {
    # The table of each source, by hand: frames, or rate and largest number of frames.
    ("longva", "videomme"): {"frames": 128, "temperature": 0.0},
    ("longva", "mlvu"): {"frames": 256, "temperature": 0.0},
    ("qwen2.5-vl", "longvideobench"): {"fps": 2.0, "max_frames": 768, "frame_pixels": 768 * 28 * 28},
    ("qwen3-vl", "mlvu"): {"fps": 2.0, "max_frames": 2048},
    ("llava-video", "nextqa"): {"frames": 64, "temperature": 0.0},
    ("internvl3", "videomme"): {"frames": 64, "frame_pixels": 448 * 448},
    ("lmms-eval", "longvideobench"): {"frames": 32, "prompt": "official", "max_new_tokens": 32},
    ("official", "mlvu"): {"prompt": "official"},
    ("official", "videomme-v2"): {"prompt": "official", "frames": 64, "temperature": 0.0, "max_new_tokens": 4096},
    ("official", "videoeval-pro"): {"prompt": "official", "frames": 32, "max_new_tokens": 512},
    ("official", "longvideo-reason"): {"prompt": "official", "frames": 512},
    ("official", "vnbench"): {"prompt": "official"},
    ("qwen2.5-vl", "lvbench"): {"fps": 2.0, "max_frames": 768, "frame_pixels": 128 * 28 * 28},
    ("qwen2.5-vl", "egoschema"): {"fps": 2.0, "max_frames": 768, "frame_pixels": 768 * 28 * 28},
    ("videochat-flash", "lvbench"): {"fps": 1.0, "max_frames": 640, "prompt": "videochat-flash"},
    ("lmms-eval", "longtimescope"): {"frames": 32, "prompt": "official", "temperature": 0.0, "max_new_tokens": 16},
}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mrope_models.save("qwen2_5_vl", tmp_path_factory.mktemp("model") / "vlm")


@pytest.fixture(scope="module")
def asked(vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """`videomme run` on questions whose videos are missing or empty: all that a run plans, and no frame is computed."""
    empty = tmp_path_factory.mktemp("videos")
    (empty / "bikes.mp4").touch()
    return ["videomme", "run", "--model", vlm, "--videos", empty, "--questions", DATA / "questions.json"]


def planned(*arguments: object) -> dict[str, Any]:
    """What identifies the run of a command."""
    done = run(*arguments, "-o", "unused", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    (row,) = rows_of(done)
    return row["made_of"]


# --- values


def test_the_packaged_names_and_published_values() -> None:
    assert protocol_names() == NAMES
    for (name, bench), values in PUBLISHED.items():
        assert load_protocol(name, bench).values == values
    script = load_protocol("qwen3-vl", "videomme").values
    sampled = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 3407, "max_new_tokens": 32_768}
    assert script == {"fps": 2.0, "max_frames": 512, "frame_pixels": 401_408, "subtitles": "none", **sampled}


@pytest.mark.parametrize(("name", "bench"), PAIRS)
def test_every_protocol_sets_options_that_its_benchmark_has(name: str, bench: str) -> None:
    protocol = load_protocol(name, bench)
    assert bench in BENCHMARKS
    assert protocol.sources
    function = options._declared["videomme run" if bench == "videomme" else f"bench {bench} run"].function
    assert function is not None
    flags = {f.name: flag for c in config_classes(function).values() for f, _, flag in config_fields(c)}
    for key, value in protocol.values.items():
        if key not in REQUIREMENTS:
            assert flags[key].parse is None or flags[key].parse(str(value)) == value
            assert flags[key].min is None or value >= flags[key].min
            assert flags[key].max is None or value <= flags[key].max
    assert protocol.values.get("prompt", "official") in load_benchmark(bench).STYLES
    assert protocol.values.get("rule", "official") in RULES
    assert protocol.values.get("subtitles", "none") in ("none", "required")
    assert not set(protocol.values) & set(protocol.not_stated)


OF_VIDEO_MME = [name for name in NAMES if name != "videochat-flash"]


def test_protocols_of_video_mme_and_of_images() -> None:
    assert [name for name, bench in PAIRS if bench == "videomme"] == OF_VIDEO_MME
    assert [name for name, bench in PAIRS if bench == "vhs"] == ["official"]


@pytest.mark.parametrize("name", OF_VIDEO_MME)
def test_a_run_has_the_values_of_its_protocol(name: str, asked: list[object]) -> None:
    made_of = planned(*asked, "--protocol", name)
    stated = load_protocol(name, "videomme").values
    facts = made_of["protocol"]
    assert (facts["name"], facts["values"]) == (name, stated)
    assert re.fullmatch("[0-9a-f]{16}", facts["hash"])
    assert "departs" not in facts
    for key in ("fps", "frames", "max_frames"):
        assert made_of["sampling"].get(key) == stated.get(key, 128 if key == "frames" and "fps" not in stated else None)
    assert made_of["style"] == stated.get("prompt", "official")
    for key, value in made_of["sampling_params"].items():
        assert value == stated.get(key, {"temperature": 0.0, "max_new_tokens": 16}.get(key))
    assert facts.get("not_applied", []) == [key for key in stated if key == "frame_pixels"]


# --- precedence


def test_flag_then_environment_then_recipe_then_protocol(
    asked: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[videomme-run]\nprotocol = "longva"\ntop-k = 7\ntemperature = 0.5\nprompt = "lmms-eval"\n')
    by_recipe = planned(*asked, "--recipe", recipe)
    assert (by_recipe["sampling"]["frames"], by_recipe["style"]) == (128, "lmms-eval")
    assert by_recipe["protocol"]["departs"] == {"temperature": 0.5}
    other = planned(*asked, "--recipe", recipe, "--protocol", "qwen3-vl")
    assert other["sampling_params"] == {
        **{"temperature": 0.5, "top_p": 0.8, "top_k": 7, "seed": 3407, "max_new_tokens": 32_768},
    }
    assert other["protocol"]["departs"] == {"temperature": 0.5, "top_k": 7}
    assert other == planned(*asked, "--protocol", "qwen3-vl", "--recipe", recipe)
    monkeypatch.setenv("LVCTX_VIDEOMME_RUN_TEMPERATURE", "0.25")
    monkeypatch.setenv("LVCTX_VIDEOMME_RUN_RECIPE", str(recipe))
    assert planned(*asked)["sampling_params"]["temperature"] == 0.25
    assert planned(*asked, "--temperature", 0.75)["sampling_params"]["temperature"] == 0.75
    monkeypatch.undo()
    assert "departs" not in planned(*asked, "--protocol", "longva", "--temperature", 0)["protocol"]
    assert planned(*asked, "--protocol", "qwen3-vl", "--top-k", 7)["protocol"]["departs"] == {"top_k": 7}


def test_a_number_of_frames_replaces_a_rate_and_a_rate_a_number(asked: list[object]) -> None:
    few = planned(*asked, "--protocol", "qwen2.5-vl", "--frames", 16)
    assert few["protocol"]["departs"] == {"fps": None, "frames": 16, "max_frames": None}
    assert few["sampling"]["frames"] == 16
    rate = planned(*asked, "--protocol", "longva", "--fps", 1)
    assert rate["protocol"]["departs"] == {"fps": 1.0, "frames": None}
    every = planned(*asked, "--protocol", "qwen2.5-vl", "--fps", "native", "--endpoint", "http://127.0.0.1:9/v1")
    assert every["protocol"]["departs"] == {"fps": "native", "max_frames": None}


def test_parameters_of_sampling_have_no_place_in_greedy_decoding(asked: list[object]) -> None:
    facts = planned(*asked, "--protocol", "qwen3-vl", "--temperature", 0)
    assert facts["sampling_params"] == {"temperature": 0.0, "max_new_tokens": 32_768}
    assert facts["protocol"]["departs"] == {"temperature": 0.0}
    assert set(facts["protocol"]["not_applied"]) == {"frame_pixels", "top_p", "top_k", "seed"}


def test_pixels_are_for_a_server(asked: list[object]) -> None:
    made_of = planned(*asked, "--protocol", "qwen3-vl", "--endpoint", "http://127.0.0.1:9/v1")
    assert made_of["endpoint"]["frame_pixels"] == 401_408
    assert "not_applied" not in made_of["protocol"]
    more = planned(*asked, "--protocol", "qwen3-vl", "--endpoint", "http://127.0.0.1:9/v1", "--frame-pixels", 784)
    assert more["protocol"]["departs"] == {"frame_pixels": 784}


# --- rows


def test_rows_have_the_protocol_and_other_protocols_are_refused(asked: list[object], tmp_path: Path) -> None:
    """All videos are missing or empty: exit code 4, and rows with errors, which have the protocol too."""
    out = tmp_path / "out"
    done = run(*asked, "-o", out, "--protocol", "internvl3", "--frames", 16, "--json")
    assert done.exit_code == 4
    assert "lvctx: protocol internvl3 (frames 64, frame_pixels 200704), departs: frames 16, not applied" in done.stderr
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["made_of"]["protocol"]["departs"] == {"frames": 16}
    other = run(*asked, "-o", out, "--protocol", "llava-video", "--frames", 16)
    assert other.exit_code == 3
    assert "another run (other protocol)" in other.stderr
    assert run(*asked, "-o", out, "--frames", 16).exit_code == 3
    assert protocol_of_rows(rows) == rows[0]["made_of"]["protocol"]
    with pytest.raises(InputError, match=r"rows of several protocols: internvl3 .* and none"):
        protocol_of_rows([*rows, {"made_of": {}}])


def test_subtitles_are_a_requirement(asked: list[object], tmp_path: Path) -> None:
    assert planned(*asked, "--protocol", "qwen3-vl", "--subtitles", tmp_path)["protocol"]["departs"] == {
        "subtitles": "given"
    }
    common = {"name": "x", "bench": "videomme", "title": "", "sources": (), "notes": ()}
    protocol = EvalProtocol(**common, values={"subtitles": "required"})
    with pytest.raises(UsageError, match="protocol x has subtitles; give --subtitles DIR"):
        protocol.facts({"subtitles": None}, [])
    assert "departs" not in protocol.facts({"subtitles": tmp_path}, [])


def test_what_cannot_be_is_one_line_and_2(asked: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = ["bench", "nextqa", *asked[1:]]
    served = ["--endpoint", "http://127.0.0.1:9/v1", "--send", "file-url"]
    for arguments, message in (
        ([*asked, "--protocol", "nope"], "--protocol: no protocol 'nope'; give one of internvl3, llava-video,"),
        ([*elsewhere, "--protocol", "longva"], "--protocol: protocol longva states nothing for nextqa; give one of"),
        ([*asked, "--protocol", "longva", *served], "--protocol longva sets --frames; drop --send file-url"),
        (["bench", "protocols", "nope"], "--protocol: no protocol 'nope'"),
    ):
        out = [] if arguments[1] == "protocols" else ["-o", "x"]
        done = run(*arguments, *out)
        assert done.exit_code == 2, done.output
        assert done.stderr.startswith(f"lvctx: {message}")
        assert done.stderr.count("\n") == 1


# --- listing and score


def test_the_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(run("bench", "protocols"))
    assert [(row["protocol"], row["bench"]) for row in rows] == PAIRS
    by_pair = {(row["protocol"], row["bench"]): row for row in rows}
    longva = by_pair["longva", "mlvu"]
    assert longva["values"] == PUBLISHED["longva", "mlvu"]
    assert longva["not_stated"] == ["prompt", "max_new_tokens", "frame_pixels", "rule"]
    assert "JUNJIE99/MLVU README" in longva["sources"]
    assert "fps or frames" in by_pair["official", "videomme"]["not_stated"]
    assert by_pair["official", "vhs"]["not_stated"] == ["temperature", "max_new_tokens"]
    monkeypatch.setattr("lvctx.cli.output.stdout_is_terminal", lambda: True)
    text = run("bench", "protocols", "longva").stdout
    assert re.search(r"^frames +128 +256", text, re.M)
    assert re.search(r"^prompt +not stated +not stated", text, re.M)
    assert "source: mlvu: JUNJIE99/MLVU README" in text
    assert "qwen" not in text


def follow(folder: Path, facts: dict[str, Any] | None) -> Path:
    """A finished run whose rows have a protocol."""
    finish_run(folder, 8, videos(6, 0))
    file = folder / "results.jsonl"
    rows = [json.loads(line) | {"made_of": {"protocol": facts} if facts else {}} for line in file.open()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def facts_of(name: str, **departs: Any) -> dict[str, Any]:
    protocol = load_protocol(name, "videomme")
    return protocol.facts({"fps": None, "frames": None, "subtitles": None, **protocol.values, **departs}, [])


def test_score_prints_the_protocol_and_warns_where_two_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = follow(tmp_path / "a", facts_of("longva"))
    b = follow(tmp_path / "b", facts_of("longva", frames=32))
    c = follow(tmp_path / "c", facts_of("lmms-eval"))
    none = follow(tmp_path / "none", None)
    first, second, versus = rows_of(run("videomme", "score", a, b))
    assert first["protocol"] == facts_of("longva")
    assert second["protocol"]["departs"] == {"frames": 32}
    assert versus["warnings"] == ["the protocols differ: frames 128 and 32"]
    assert rows_of(run("videomme", "score", a, a / "responses.json"))[2]["warnings"] == []
    (one,) = rows_of(run("videomme", "score", none))
    assert "protocol" not in one
    monkeypatch.setattr("lvctx.cli.output.stdout_is_terminal", lambda: True)
    text = run("videomme", "score", b, c).stdout
    assert "b: 18 questions about 6 videos\nprotocol longva (temperature 0.0, frames 128), departs: frames 32\n" in text
    assert "WARNING b, c: the protocols differ: name longva and lmms-eval" in " ".join(text.split())
    assert "official rule, %" in text
    text = " ".join(run("videomme", "score", a, none).stdout.split())
    assert "differ: longva (temperature 0.0, frames 128), and no protocol" in text
    assert "lmms-eval rule, %" in run("videomme", "score", c).stdout, "the rule of the run's protocol"
    assert "strict rule, %" in run("videomme", "score", c, "--rule", "strict").stdout


def test_the_difference_of_protocols() -> None:
    qwen, longva = facts_of("qwen2.5-vl"), facts_of("longva")
    found = protocol_difference(qwen, longva)
    assert "fps 2.0 and not set" in found
    assert "frames not set and 128" in found
    assert protocol_difference(qwen, facts_of("qwen2.5-vl")) == ""
    assert protocol_difference(None, None) == ""


def test_malformed_protocols_in_rows_are_none() -> None:
    for made_of in (None, [], {"protocol": 3}, {}):
        assert protocol_of_rows([{"made_of": made_of}]) is None
