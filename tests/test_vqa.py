"""`lvctx vqa`: sources of questions, streamed answers, models on several devices."""

import importlib.util
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import mrope_models, warm_server
from support.costs import without_cost
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.cli.vqa import StreamPrinter
from lvctx.inference.sampling_params import SamplingParams
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.inference.video_questions import VideoQuestions
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.feature_cache import read_feature_cache
from lvctx.vlm.registry import open_vlm

QUESTIONS = ["What is it?", "And where?", "Why do they ride?"]


def vqa(*arguments: object, given: str = "", code: int = 0) -> tuple[list[dict[str, Any]], str]:
    flags = ["vqa", *map(str, arguments), "--max-new-tokens", "5"]
    done = CliRunner().invoke(app, flags, input=given, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def frames(loud_vlm: Path, nano: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lvctx.vlm.video_encoder import VideoEncoder

    encoder = VideoEncoder.open(str(loud_vlm), VideoSampling(frames=6), device="cpu")
    return Path(encoder.encode(nano.clips / "bikes.mp4", tmp_path_factory.mktemp("frames"))["path"])


@pytest.fixture(scope="module")
def asked(loud_vlm: Path, frames: Path) -> list[dict[str, Any]]:
    return without_cost(vqa(frames, "--model", loud_vlm, *(part for q in QUESTIONS for part in ("--ask", q)))[0])


@pytest.mark.nano
def test_every_question_is_answered_with_the_times_of_all_frames(asked: list[dict[str, Any]], frames: Path) -> None:
    assert [row["question"] for row in asked] == QUESTIONS
    assert len({row["answer"] for row in asked}) > 1
    pts = read_feature_cache(frames).pts.tolist()
    for row in asked:
        assert (row["pts"], row["seconds"], row["frames"]) == (pts, [pts[0], pts[-1]], 6)


@pytest.mark.nano
def test_questions_on_lines(asked: list[dict[str, Any]], loud_vlm: Path, frames: Path) -> None:
    """Text or JSON, of which the other keys pass; each on its own, as if given by --ask, unless it is a chat."""
    lines = [json.dumps({"id": 7, "question": QUESTIONS[1], "schema": "mine"}), "", QUESTIONS[2]]
    given = "\n".join(lines) + "\n"
    rows, _ = vqa(frames, "--model", loud_vlm, "--ask", QUESTIONS[0], "--ask", "-", given=given)
    assert [row.pop("id", None) for row in rows] == [None, 7, None]
    assert without_cost(rows) == asked
    chat, _ = vqa(frames, "--model", loud_vlm, "--chat", "--ask", QUESTIONS[0], given=given)
    assert [row.get("id") for row in chat] == [None, 7, None]
    assert chat[0]["answer"] == asked[0]["answer"]
    assert chat[1]["tokens"] > asked[1]["tokens"]
    for bad in ("{", '{"text": 1}'):
        assert "stdin:2" in vqa(frames, "--model", loud_vlm, "--ask", "-", given=f"Hm?\n{bad}\n", code=3)[1]
    assert "exactly one" in vqa(frames, frames, "--model", loud_vlm, "--ask", "-", code=2)[1]


@pytest.mark.nano
def test_a_line_names_its_video_and_its_question(asked: list[dict[str, Any]], loud_vlm: Path, frames: Path) -> None:
    lines = [{"path": str(frames), "question": q, "id": i} for i, q in enumerate(QUESTIONS)]
    given = "".join(json.dumps(line) + "\n" for line in [*lines, {"path": str(frames)}])
    rows, said = vqa("-", "--model", loud_vlm, given=given, code=4)
    assert [(row["id"], row["answer"]) for row in rows[:3]] == [(i, row["answer"]) for i, row in enumerate(asked)]
    assert "no question" in rows[3]["error"]
    assert said.count("no question") == 1
    over = [json.dumps(row) for row in rows[:1]]
    again, _ = vqa("-", "--model", loud_vlm, "--ask", QUESTIONS[1], given="\n".join(over))
    assert again[0]["answer"] == asked[1]["answer"], "--ask wins over what an earlier answer brings along"


@pytest.mark.nano
def test_lines_about_one_video_share_its_frames(loud_vlm: Path, frames: Path, tmp_path: Path) -> None:
    engine = TransformersEngine(open_vlm(loud_vlm), device="cpu")
    asking = VideoQuestions(engine, VideoSampling(), params=SamplingParams(max_new_tokens=1))
    copy = tmp_path / frames.name
    shutil.copy(frames, copy)
    run = []
    for path in (copy, copy, frames, copy):
        before = engine.scorer.tokens_run
        list(asking.ask(path, QUESTIONS[:1]))
        run.append(engine.scorer.tokens_run - before)
    assert run[1] == 1
    assert run[0] == run[2] == run[3] > 6 * 4
    os.utime(copy, ns=(1, 1))
    list(asking.ask(copy, QUESTIONS[:1]))
    assert engine.scorer.tokens_run == sum(run) + run[0], "a file that was written again is read again"


@pytest.mark.nano
def test_a_terminal_sees_the_answer_grow(asked: list[dict[str, Any]], loud_vlm: Path, frames: Path) -> None:
    ours, theirs = pty.openpty()
    command = [warm_server.start(), "vqa", frames, "--model", loud_vlm, "--max-new-tokens", "5"]
    for question in QUESTIONS[:2]:
        command += ["--ask", question]
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=120)
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 4096):
            seen += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert [json.loads(line)["answer"] for line in done.stdout.splitlines()] == [row["answer"] for row in asked[:2]]
    shown = seen.decode().replace("\r\n", "\n")
    assert shown.endswith("".join(row["answer"] + "\n" for row in asked[:2]))


@pytest.mark.nano
def test_a_video_file_is_encoded_once_and_asked_about(
    asked: list[dict[str, Any]], loud_vlm: Path, nano: Any, tmp_path: Path
) -> None:
    ask = ("--model", loud_vlm, "--feature-cache", tmp_path, *(part for q in QUESTIONS for part in ("--ask", q)))
    clip, cached = nano.clips / "bikes.mp4", tmp_path / "bikes.frames.safetensors"
    rows, _ = vqa(clip, "--frames", 6, *ask)
    assert [row.pop("path") for row in rows] == [str(clip)] * 3
    assert without_cost(rows) == [{k: v for k, v in row.items() if k != "path"} for row in asked]
    before = cached.stat().st_mtime_ns
    assert [row["answer"] for row in vqa(clip, "--frames", 6, *ask)[0]] == [row["answer"] for row in asked]
    assert cached.stat().st_mtime_ns == before
    assert [row["answer"] for row in vqa(cached, *ask)[0]] == [row["answer"] for row in asked]
    assert "do not apply to encoded features" in vqa(cached, "--frames", 3, *ask, code=2)[1]


@pytest.mark.nano
def test_a_cache_keeps_a_video_in_every_way_it_was_encoded(loud_vlm: Path, nano: Any, tmp_path: Path) -> None:
    """Two samplings, and another video of the same name: each is encoded once."""
    ask = ("--model", loud_vlm, "--feature-cache", tmp_path / "cache", "--ask", QUESTIONS[0])
    clip, other = nano.clips / "bikes.mp4", tmp_path / "bikes.mp4"
    shutil.copy(nano.clips / "bigbuckbunny.mp4", other)
    asked = [(clip, 2), (clip, 3), (other, 2), (clip, 2), (clip, 3)]
    counts = [vqa(video, "--frames", frames, *ask)[0][0]["frames"] for video, frames in asked]
    assert counts == [2, 3, 2, 2, 3]
    assert len(list((tmp_path / "cache").rglob("*.frames.safetensors"))) == 3


def test_only_new_text_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    printer, parts = StreamPrinter(live=True), []
    for text in ("The", "The caf\ufffd", "The café", "The café is"):
        printer.show(text)
        parts.append(capsys.readouterr().err)
    printer.end()
    printer.end()
    assert [*parts, capsys.readouterr().err] == ["The", " caf", "é", " is", "\n"]
    StreamPrinter(live=False).show("The")
    assert capsys.readouterr().err == ""


# --- models spread over devices


@pytest.mark.nano
@pytest.mark.parametrize("spread", ["auto", "one", "disk"])
def test_a_model_spread_by_accelerate_answers_the_same(
    spread: str, asked: list[dict[str, Any]], loud_vlm: Path, frames: Path, tmp_path: Path
) -> None:
    """`disk`: of most modules the weights are brought from the file whenever they are called."""
    pytest.importorskip("accelerate")
    parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    maps = {"one": {"": "cpu"}, "disk": {"model.image_newline": "cpu"} | dict.fromkeys(parts, "disk")}
    if spread != "auto":
        (tmp_path / "map.json").write_text(json.dumps(maps[spread]))
    flags = [part for q in QUESTIONS for part in ("--ask", q)]
    given = spread if spread == "auto" else tmp_path / "map.json"
    assert without_cost(vqa(frames, "--model", loud_vlm, "--device-map", given, *flags)[0]) == asked


@pytest.mark.nano
def test_a_qwen_model_spread_by_accelerate_answers_the_same(nano: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    mrope_models.save("qwen2_vl", tmp_path / "vlm")
    spread = {"model.visual": "disk", "model.language_model": "disk", "lm_head": "cpu"}
    (tmp_path / "map.json").write_text(json.dumps(spread))
    ask = (nano.clips / "bikes.mp4", "--model", tmp_path / "vlm", "--ask", "What?", "--fps", 1, "--hybrid", "1,8,1")
    spread_rows = vqa(*ask, "--device-map", tmp_path / "map.json")[0]
    assert without_cost(spread_rows) == without_cost(vqa(*ask)[0])


@pytest.mark.nano
def test_a_rate_is_bounded(nano: Any, tmp_path: Path) -> None:
    """A clip of ten seconds at two frames per second: all 20, or as many as --max-frames, evenly spread."""
    mrope_models.save("qwen2_vl", tmp_path / "vlm")
    clip = nano.clips / "bikes.mp4"
    ask = (clip, "--model", tmp_path / "vlm", "--ask", "What?", "--fps", 2, "--hybrid", "1,8,1")
    (few,), _ = vqa(*ask, "--max-frames", 3)
    assert few["pts"] == [frame.pts for frame in read_video(clip, VideoSampling(frames=3))]
    assert without_cost(vqa(*ask, "--max-frames", 20)[0]) == without_cost(vqa(*ask)[0])


def test_device_maps_that_are_none(loud_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = ("x.frames.safetensors", "--model", loud_vlm, "--ask", "What?", "--device-map")
    assert "is not a file" in vqa(*ask, "everywhere", code=2)[1]
    assert "single process" in vqa(*ask, "auto", "--cp", 2, code=2)[1]
    (tmp_path / "list.json").write_text("[1]")
    assert "not an object" in vqa(*ask, tmp_path / "list.json", code=3)[1]
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert importlib.util.find_spec("accelerate") is None
    assert "pip install accelerate" in vqa(*ask, "auto", code=5)[1]
