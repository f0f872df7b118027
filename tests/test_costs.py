"""What samples cost: the field of rows against counts and clocks of this file, and the totals of reports."""

import json
import statistics
import time
from collections.abc import Iterable
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import av
import pytest
from support import generic_models, mrope_models
from support.fault_server import MODEL, faults
from test_niah import results, text_arguments
from test_questions import DATA, PlainModel, rows_of, run

from lvctx.cost import CostMeter
from lvctx.errors import InputError
from lvctx.eval.benchmarks import videomme
from lvctx.eval.benchmarks.videomme import prompt
from lvctx.eval.cost_summary import summarize_costs
from lvctx.inference.engine_config import EngineConfig
from lvctx.inference.open_engine import open_engine
from lvctx.inference.sampling_params import SamplingParams
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.registry import open_vlm

LOCAL = {"decode_seconds", "encode_seconds", "prefill_seconds", "generate_seconds"}
SIZES = {"frames_decoded", "frames_shown", "visual_tokens", "tokens_in", "tokens_out"}


Ran = tuple[Path, list[dict[str, Any]], float]
"""Results directory of a run, its printed rows, and the seconds that the command took."""


def seconds(cost: dict[str, float]) -> float:
    return sum(value for key, value in cost.items() if key.endswith("_seconds"))


def check_totals(summary: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """A report's costs are those of the rows."""
    costs = [row["cost"] for row in rows]
    assert summary["samples"] == len(costs)
    for key in costs[0]:
        column = [cost[key] for cost in costs]
        assert summary["total"][key] == pytest.approx(sum(column), abs=1e-5), key
        assert summary["median"][key] == pytest.approx(statistics.median(column), abs=1e-5), key
    assert summary["samples_per_second"] == pytest.approx(len(costs) / sum(map(seconds, costs)), rel=1e-3)


# --- the meter


def test_no_second_is_counted_twice() -> None:
    meter = CostMeter()
    began = time.perf_counter()
    with meter.phase("encode"):
        time.sleep(0.02)
        with meter.phase("decode"):
            time.sleep(0.03)
        with suppress(InputError), meter.phase(None):
            time.sleep(0.04)
            raise InputError("a phase also ends by an error")
    wall = time.perf_counter() - began
    cost = meter.take()["cost"]
    assert cost["encode_seconds"] >= 0.02
    assert cost["decode_seconds"] >= 0.03
    assert seconds(cost) <= wall - 0.04 + 1e-5
    time.sleep(0.01)
    assert set(meter.take()["cost"].values()) == {0}


@pytest.mark.nano
def test_frames_that_the_decoder_returned(nano: Any) -> None:
    """All of a video's; of few sampled ones, those and what they need."""
    clip = nano.clips / "bikes.mp4"
    with av.open(str(clip)) as container:
        total = sum(1 for _ in container.decode(video=0))
    for sampling, least in ((VideoSampling(fps="native"), total), (VideoSampling(frames=3), 3)):
        meter = CostMeter()
        taken = list(meter.decoding(read_video(clip, sampling)))
        assert len(taken) == least
        assert least <= meter.take()["cost"]["frames_decoded"] <= total


# --- rows


FRAMES = 5
"""With this number the tiny model ends none of its replies by itself."""


@pytest.fixture(scope="module")
def ran(loud_vlm: Path, nano: Any, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Three questions about each of two videos."""
    out = tmp_path_factory.mktemp("ran") / "out"
    began = time.perf_counter()
    done = run(*asked(loud_vlm, nano, out))
    wall = time.perf_counter() - began
    assert done.exit_code == 0, done.output
    return out, rows_of(done), wall


def asked(vlm: Path, nano: Any, out: Path) -> list[object]:
    inputs = ["--videos", nano.clips, "--questions", DATA / "questions.json", "--frames", FRAMES]
    return ["videomme", "run", "--model", vlm, *inputs, "--max-new-tokens", 6, "-o", out]


@pytest.mark.nano
def test_a_row_states_what_its_sample_cost(ran: Ran, loud_vlm: Path, nano: Any) -> None:
    """The first question about a video pays for reading it; prompts are counted by stock transformers."""
    out, rows, wall = ran
    plain = PlainModel(loud_vlm)
    samples = {s.id: s for s in videomme.samples(DATA / "questions.json")}
    for _, group in groupby(rows, key=lambda row: row["video"]):
        first, *later = group
        assert first["cost"]["frames_decoded"] >= first["frames"] == FRAMES
        assert min(first["cost"]["decode_seconds"], first["cost"]["encode_seconds"]) > 0
        for row in later:
            assert [row["cost"][key] for key in ("decode_seconds", "encode_seconds", "frames_decoded")] == [0, 0, 0]
    for row in rows:
        cost = row["cost"]
        assert cost.keys() == LOCAL | SIZES
        assert min(cost.values()) >= 0
        assert min(cost["prefill_seconds"], cost["generate_seconds"]) > 0
        frames = out / "frames" / f"{row['video']}.frames.safetensors"
        _, tokens = plain.answer(frames, [prompt(samples[row["id"]], "official", None)], 1)
        assert (cost["frames_shown"], cost["visual_tokens"], cost["tokens_in"]) == (FRAMES, FRAMES * 4, tokens)
        assert row["cut"]
        assert cost["tokens_out"] == 6
    assert sum(seconds(row["cost"]) for row in rows) <= wall
    assert rows == results(out)


@pytest.mark.nano
def test_costs_do_not_make_another_run(ran: Ran, loud_vlm: Path, nano: Any) -> None:
    out, rows, _ = ran
    assert all("cost" not in row["made_of"] for row in rows)
    assert rows_of(run(*asked(loud_vlm, nano, out))) == []
    assert results(out) == rows


@pytest.mark.nano
def test_a_video_that_cannot_be_read_costs_the_others_nothing(loud_vlm: Path, nano: Any, tmp_path: Path) -> None:
    """It has a cost of its own. Of lines from a pipe the answer after it pays for its own video alone."""
    (tmp_path / "broken.mp4").write_bytes((nano.clips / "bikes.mp4").read_bytes()[:60_000])
    videos = (tmp_path / "broken.mp4", nano.clips / "bikes.mp4")
    ask = ("--ask", "What?", "--frames", 2, "--max-new-tokens", 2, "--feature-cache", tmp_path / "cache")
    done = run("vqa", *videos, "--model", loud_vlm, *ask)
    reader = read_video(videos[1], VideoSampling(frames=2))
    assert len(list(reader)) == 2
    assert done.exit_code == 4, done.output
    failed, row = rows_of(done)
    assert failed["cost"]["decode_seconds"] > 0
    assert "tokens_in" not in failed["cost"]
    assert row["cost"]["frames_decoded"] == reader.decoded


@pytest.mark.nano
@pytest.mark.parametrize("kind", ["llava", "paligemma"])
def test_any_class_of_models(kind: str, nano: Any, tmp_path: Path) -> None:
    """Prompts have the tokens that the stock processor writes. A class by its own forward encodes in every prefill."""
    from transformers import AutoProcessor

    path = generic_models.save(kind, tmp_path / kind)
    engine = open_engine(open_vlm(path), EngineConfig(device="cpu"))
    clip, costs = nano.clips / "bikes.mp4", []
    began = time.perf_counter()
    engine.show([clip], VideoSampling(frames=3))
    for _ in range(2):
        reply = engine.reply(["What is it?"], SamplingParams(max_new_tokens=4))
        costs.append(engine.meter.take()["cost"])
        assert costs[-1]["tokens_out"] == reply.tokens
    assert sum(map(seconds, costs)) <= time.perf_counter() - began
    processor = AutoProcessor.from_pretrained(path)
    images = [frame.image for frame in read_video(clip, VideoSampling(frames=3))]
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = processor(text=[text], images=[images], return_tensors="pt").input_ids[0]
    visual = int((ids == engine.vlm.processor.processor.image_token_id).sum())  # type: ignore[attr-defined]
    for cost in costs:
        assert cost.keys() == (LOCAL if kind == "llava" else LOCAL - {"encode_seconds"}) | SIZES
        assert (cost["frames_shown"], cost["visual_tokens"]) == (3, visual)
        assert cost["tokens_in"] == pytest.approx(len(ids), abs=1)  # of a start that the template and tokenizer add
    assert costs[0]["frames_decoded"] >= 3
    assert costs[1]["frames_decoded"] == costs[1]["decode_seconds"] == 0


@pytest.mark.nano
def test_needles_in_text_and_video(tiny_lm: Path, nano: Any, tmp_path: Path) -> None:
    """The first cell pays for the haystack; `report` has the totals, and no file of the run."""
    essays = tmp_path / "essays"
    essays.mkdir()
    (essays / "love.txt").write_text((nano.essays / "love.txt").read_text(encoding="utf-8"), encoding="utf-8")
    assert run(*text_arguments(tiny_lm, essays, tmp_path / "text")).exit_code == 0
    rows = results(tmp_path / "text")
    for row in rows:
        assert row["cost"].keys() == {"prefill_seconds", "generate_seconds", "tokens_in", "tokens_out"}
        assert (row["cost"]["tokens_in"], row["cost"]["tokens_out"] > 0) == (row["length"], True)
    vlm = mrope_models.save("qwen2_vl", tmp_path / "vlm")
    grid = ("--lengths", "2,4", "--depths", "0,1", "--trials", 1, "--as-images")
    done = run("niah", "video", "--model", vlm, "--haystack", nano.clips / "bikes.mp4", *grid, "-o", tmp_path / "video")
    assert done.exit_code == 0, done.output
    first, *later = results(tmp_path / "video")
    assert first["cost"]["frames_decoded"] >= 4
    assert min(first["cost"]["decode_seconds"], first["cost"]["encode_seconds"]) > 0
    for row in (first, *later):
        assert row["cost"].keys() == LOCAL | SIZES
        assert row["cost"]["frames_shown"] == row["length"] + 1
    assert {row["cost"][key] for row in later for key in ("decode_seconds", "encode_seconds", "frames_decoded")} == {0}
    reported = rows_of(
        run("niah", "report", tmp_path / "text", tmp_path / "video", "--json", "-o", tmp_path / "r.json")
    )
    check_totals(reported[0]["cost"], rows)
    check_totals(reported[1]["cost"], [first, *later])
    for file in (tmp_path / "r.json", tmp_path / "text" / "summary.json", tmp_path / "text" / "heatmap.json"):
        assert "seconds" not in file.read_text()


@pytest.mark.nano
def test_questions_to_a_server(nano: Any, tmp_path: Path) -> None:
    """Every conversation has a meter of its own; the server says how many tokens there were."""
    with faults(lambda number, body: "slow:0.05") as server:
        inputs = ("--videos", nano.clips, "--questions", DATA / "questions.json", "--frames", 2, "--frame-pixels", 2000)
        done = run("videomme", "run", "--model", MODEL, "--endpoint", server.url, *inputs, "--jobs", 2, "-o", tmp_path)
    assert done.exit_code == 0, done.output
    rows = sorted(rows_of(done), key=lambda row: str(row["video"]))
    for _, group in groupby(rows, key=lambda row: row["video"]):
        first, *later = group
        assert first["cost"]["frames_decoded"] >= 2
        assert min(first["cost"]["decode_seconds"], first["cost"]["encode_seconds"]) > 0
        for row in later:
            assert row["cost"]["decode_seconds"] == row["cost"]["encode_seconds"] == row["cost"]["frames_decoded"] == 0
    for row in rows:
        keys = {"decode_seconds", "encode_seconds", "request_seconds", *(SIZES - {"visual_tokens"})}
        assert row["cost"].keys() == keys
        assert row["cost"]["request_seconds"] >= 0.05
        assert (row["cost"]["frames_shown"], row["cost"]["tokens_in"], row["cost"]["tokens_out"]) == (2, 10, 1)


# --- reports


@pytest.mark.nano
def test_scores_have_the_totals_of_the_rows(ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rows, _ = ran
    (scored,) = rows_of(run("videomme", "score", out, "--json"))
    check_totals(scored["cost"], rows)
    (tmp_path / "responses.json").write_bytes((out / "responses.json").read_bytes())
    (scored,) = rows_of(run("videomme", "score", tmp_path / "responses.json", "--json"))
    assert "cost" not in scored
    monkeypatch.setattr("lvctx.cli.output.stdout_is_terminal", lambda: True)
    table = run("videomme", "score", out).stdout
    assert f"cost of {len(rows)} samples" in table
    assert f"{sum(row['cost']['tokens_in'] for row in rows):,}" in table


def test_costs_that_are_none() -> None:
    """Rows of an older version, of a failure, and values that are no numbers."""
    assert summarize_costs([{}, {"cost": 3}, {"cost": {}}, {"error": "no", "cost": {"tokens_in": 1}}]) == {}
    rows = [{"cost": {"tokens_in": 4, "prefill_seconds": "long", "peak_memory_bytes": n}} for n in (5, 7, True)]
    summary = summarize_costs(json.loads(json.dumps(rows)))["cost"]
    assert summary["total"] == {"tokens_in": 12, "peak_memory_bytes": 7}
    assert summary["samples_per_second"] is None
