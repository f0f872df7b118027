"""Models on OpenAI-compatible servers: a real one answers as we do in process, and a faulty one loses us no row."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import mrope_models
from support.fault_server import MODEL, faults, letter, text_of
from support.refusals import refused
from test_questions import DATA, rows_of, run

from lvctx.errors import InputError
from lvctx.eval.niah.endpoint_job import text_prompt
from lvctx.eval.niah.text_needles import read_haystack
from lvctx.eval.niah.text_task import TextNeedleTask
from lvctx.inference import chat_client
from lvctx.inference.chat_client import ChatClient
from lvctx.inference.endpoint_config import VideoEndpointConfig, parse_endpoint
from lvctx.inference.endpoint_engine import EndpointEngine, parse_reply
from lvctx.inference.sampling_params import SamplingParams
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.registry import open_vlm

ROOT = Path(__file__).resolve().parent.parent
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}"
    "<|vision_start|><|{{ p['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short delays between attempts, and no key but the test's."""
    monkeypatch.setattr(chat_client, "FIRST_DELAY", 0.02)
    for name in ("LVCTX_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def engine_of(url: str, model: str = MODEL, **options: Any) -> EndpointEngine:
    config = VideoEndpointConfig(endpoint=url, **options)
    return EndpointEngine(ChatClient(config, model, api_key=None), config)


# --- transformers serve


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-VL with random weights whose words depend on what it is shown, with all that stock transformers needs."""
    out = tmp_path_factory.mktemp("served")
    mrope_models.opinionated("qwen2_vl").save_pretrained(out)
    mrope_models.save_processors("qwen2_vl", out)
    tokenizer = mrope_models.tokenizer()
    tokenizer.chat_template = PARTS
    tokenizer.save_pretrained(out)
    # Pillow's resizing and not torchvision's, which differs in the last bits.
    types = {"image_processor": "Qwen2VLImageProcessorPil", "video_processor": "Qwen2VLVideoProcessor"}
    processors = {name: {f"{name}_type": kind, "patch_size": 14} for name, kind in types.items()}
    (out / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor", **processors}))
    return out


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `transformers serve`, which loads the model that a request names."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    flags = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-m", "support.serve_transformers", *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=env) as process:
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", port)):
                        break
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def sent_images(engine: EndpointEngine) -> list[Image.Image]:
    assert engine._parts is not None
    urls = [part["image_url"]["url"] for part in engine._parts if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


@pytest.mark.nano
def test_a_server_replies_as_the_model_does_in_process(vlm: Path, served: str, nano: Any) -> None:
    """Greedy, about the very JPEG images that were sent; one question after another, and a conversation."""
    remote = engine_of(served, str(vlm), frame_times=False, frame_pixels=12_000)
    shown = remote.show([nano.clips / "bikes.mp4"], VideoSampling(frames=3))
    assert (shown.facts["frames"], shown.facts["send"], shown.facts["times"]) == (3, "images", "none")
    local = TransformersEngine(open_vlm(vlm), device="cpu")
    local.show(sent_images(remote), VideoSampling())
    params, replies = SamplingParams(max_new_tokens=8), []
    for turns in (["What is it?"], ["Why?"], ["Why?", "No.", "And then?"]):
        expected, reply = local.reply(turns, params), remote.reply(turns, params)
        assert (reply.text, reply.prompt_tokens) == (expected.text, expected.prompt_tokens)
        assert (reply.tokens, reply.cut) == (8, True)
        replies.append(reply.text)
    assert len(set(replies)) == 3


@pytest.mark.nano
def test_vqa_and_a_benchmark_on_a_server(vlm: Path, served: str, nano: Any, tmp_path: Path) -> None:
    """Each frame after its time; rows have what was sent and how."""
    flags = ("--model", vlm, "--endpoint", served, "--frames", 3, "--frame-pixels", 12_000, "--max-new-tokens", 6)
    clip = nano.clips / "bikes.mp4"
    done = run("vqa", clip, *flags, "--ask", "What is it?")
    assert done.exit_code == 0, done.output
    (row,) = rows_of(done)
    assert row["pts"] == [frame.pts for frame in read_video(clip, VideoSampling(frames=3))]
    assert (row["send"], row["times"], row["sampling_params"]) == (
        "images",
        "text",
        {"temperature": 0.0, "max_new_tokens": 6},
    )
    assert row["reply_tokens"] == 6
    out = tmp_path / "out"
    asked = ("--videos", nano.clips, "--questions", DATA / "questions.json", "-o", out)
    done = run("videomme", "run", *asked, *flags, "--jobs", 2)
    assert done.exit_code == 0, done.output
    assert "6 replies were cut at --max-new-tokens 6" in done.stderr
    rows = rows_of(done)
    assert len(rows) == len({row["id"] for row in rows}) == 6
    for row in rows:
        assert row["made_of"]["endpoint"] == {
            "send": "images",
            "frame_pixels": 12_000,
            "jpeg_quality": 90,
            "frame_times": True,
        }
        assert row["made_of"]["model"] == str(vlm)
    assert rows_of(run("videomme", "run", *asked, *flags)) == []
    (score,) = rows_of(run("videomme", "score", out, "--json"))
    assert score["questions"] == 6
    assert score["warnings"][0] == "6 replies were cut at their largest number of tokens"


# --- a server that misbehaves


@pytest.fixture(scope="module")
def clips(nano: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight short videos."""
    out = tmp_path_factory.mktemp("clips")
    for i in range(8):
        shutil.copy(nano.clips / "bikes.mp4", out / f"v{i}.mp4")
    return out


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two about each of them."""
    first = json.loads((DATA / "questions.json").read_text())[0]
    rows = [
        {**first, "video_id": f"{v}", "videoID": f"v{v}", "question_id": f"{v}-{q}", "question": f"{q} of {v}?"}
        for v in range(8)
        for q in range(2)
    ]
    path = tmp_path_factory.mktemp("questions") / "questions.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def asked(clips: Path, questions: Path, tmp_path: Path) -> tuple[object, ...]:
    """The command, but for --endpoint."""
    inputs = ("--videos", clips, "--questions", questions, "--frames", 2, "--frame-pixels", 2000)
    return ("videomme", "run", "--model", MODEL, *inputs, "-o", tmp_path / "out")


def check_complete(out: Path) -> None:
    """Every question has one result, and it is the answer to that question."""
    stored = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    results = [row for row in stored if "error" not in row]
    assert Counter(row["id"] for row in results) == Counter(f"{v}-{q}" for v in range(8) for q in range(2))
    exported = json.loads((out / "responses.json").read_text())
    for video in exported:
        for question in video["questions"]:
            prompt = f"{question['question']}\n" + "\n".join(question["options"])
            asking = "Select the best answer to the following multiple-choice question based on the video. "
            asking += "Respond with only the letter (A, B, C, or D) of the correct option."
            assert question["response"] == letter(f"{asking}\n{prompt}\nThe best answer is:")


@pytest.mark.nano
def test_four_at_once_through_every_fault(asked: tuple[object, ...], tmp_path: Path) -> None:
    """Every second request fails, each time in another way: all is asked again, and no row is lost or written twice."""
    kinds = ("busy:0.05", "500", "half", "malformed", "reset", "slow:0.05", "503:overloaded", "drip:0.2", "slow:3")
    with faults(lambda number, body: kinds[number // 2 % len(kinds)] if number % 2 else None) as server:
        done = run(*asked, "--endpoint", server.url, "--jobs", 4, "--timeout", 0.6)
        assert done.exit_code == 0, done.output
        assert 1 < server.most_at_once <= 4
        assert len(server.requests) > 16
        check_complete(tmp_path / "out")
        # The questions about a video follow each other, as a server's prefix cache likes it.
        before = len(server.requests)
        assert rows_of(run(*asked, "--endpoint", server.url)) == []
        assert len(server.requests) == before


@pytest.mark.nano
def test_what_fails_in_the_end_is_an_error_row_and_is_asked_again(asked: tuple[object, ...], tmp_path: Path) -> None:
    context = "400:This model's maximum context length is 4096 tokens. However, you requested 9000 tokens."
    failing = {"1 of 2?": context, "0 of 3?": "500", "1 of 3?": "empty", "0 of 4?": "malformed", "1 of 5?": "reset"}

    def fault(number: int, body: dict[str, Any]) -> str | None:
        return next((what for question, what in failing.items() if body and question in text_of(body)), None)

    with faults(fault) as server:
        done = run(*asked, "--endpoint", server.url, "--retries", 1)
        assert done.exit_code == 4, done.output
        errors = {row["id"]: row["error"] for row in rows_of(done) if "error" in row}
        assert sorted(errors) == ["2-1", "3-0", "3-1", "4-0", "5-1"]
        assert "maximum context length is 4096 tokens" in errors["2-1"]
        assert "HTTP 500: it went wrong (2 attempts)" in errors["3-0"]
        assert "has no reply" in errors["3-1"]
        assert "malformed JSON (2 attempts)" in errors["4-0"]
        assert "(2 attempts)" in errors["5-1"]
        assert "11 of 16 questions answered" in done.stderr
        failing.clear()
        before = len(server.requests)
        assert run(*asked, "--endpoint", server.url).exit_code == 0
        assert len(server.requests) == before + 5
    check_complete(tmp_path / "out")


@pytest.mark.nano
def test_a_run_that_is_killed_goes_on(asked: tuple[object, ...], tmp_path: Path) -> None:
    """kill -9 with requests under way; what was answered is not asked again."""
    log = tmp_path / "out" / "results.jsonl"
    with faults(lambda number, body: "slow:0.1") as server:
        command = [sys.executable, "-m", "lvctx", *map(str, asked), "--endpoint", server.url, "--jobs", "4"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
            while not log.is_file() or log.read_bytes().count(b"\n") < 5:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        kept = log.read_bytes().count(b"\n")
        assert 5 <= kept < 16
        before = len(server.requests)
        assert run(*asked, "--endpoint", server.url).exit_code == 0
        assert len(server.requests) == before + 16 - kept
    check_complete(tmp_path / "out")


@pytest.mark.nano
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("401", "refuses the key (HTTP 401); set LVCTX_API_KEY or OPENAI_API_KEY"),
        (
            "404:The model `x` does not exist.",
            "no model served (HTTP 404): The model `x` does not exist.; it has served",
        ),
        (None, "does not answer: no connection"),
    ],
)
def test_where_every_request_must_fail_the_run_ends(
    fault: str | None, line: str, asked: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One line, exit code 3; the key is nowhere, even where the server repeats it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with faults(lambda number, body: fault) as server:
        url = server.url
        if fault is not None:
            done = run(*asked, "--endpoint", url, "-v")
    if fault is None:
        done = run(*asked, "--endpoint", url)
    assert done.exit_code == 3, done.output
    assert line in done.stderr
    assert len([said for said in done.stderr.splitlines() if "HTTP Request" not in said]) == 1
    assert KEY not in done.output + (tmp_path / "out" / "results.jsonl").read_text()


@pytest.mark.nano
def test_what_was_sent_is_reported_once_the_server_answers(nano: Any) -> None:
    ask = ("vqa", nano.clips / "bikes.mp4", "--model", "other", "--frames", 2, "--ask", "What?", "--ask", "Why?")
    with faults(lambda number, body: "404:The model `other` does not exist." if body else None) as server:
        refused = run(*ask, "--endpoint", server.url)
    with faults() as server:
        answered = run(*ask, "--endpoint", server.url)
    assert (refused.exit_code, refused.stdout) == (3, "")
    (line,) = refused.stderr.splitlines()
    assert "no model other" in line
    (line,) = answered.stderr.splitlines()
    assert "2 frames" in line


@pytest.mark.nano
def test_a_server_that_never_answers_is_given_up(asked: tuple[object, ...], tmp_path: Path) -> None:
    """`transformers serve` says 500 of a model that it does not have: eight such requests are enough."""
    with faults(lambda number, body: "500" if body else None) as server:
        done = run(*asked, "--endpoint", server.url, "--retries", 0, "--jobs", 1)
        assert (done.exit_code, len(server.requests)) == (3, 8)
        assert "none of 8 requests was answered: HTTP 500: it went wrong (1 attempts)" in done.stderr
        server.fault = lambda number, body: None
        assert run(*asked, "--endpoint", server.url).exit_code == 0
    check_complete(tmp_path / "out")


@pytest.mark.nano
def test_a_server_without_a_list_of_models(nano: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked all the same, and what it does not have is still one line. A key with a line's end is a key."""
    flags = ("vqa", nano.clips / "bikes.mp4", "--model", MODEL, "--frames", 1, "--ask", "?", "--endpoint")
    monkeypatch.setenv("LVCTX_API_KEY", f"{KEY}\n")
    with faults(lambda number, body: "no list" if not body else None) as server:
        assert run(*flags, server.url).exit_code == 0
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
        for status, words in (("404", "check --endpoint and --model"), ("413", "fewer --frames")):
            server.fault = lambda number, body, status=status: status if body else "no list"
            done = run(*flags, server.url)
            assert (done.exit_code, f"HTTP {status}" in done.stderr, words in done.stderr) == (3, True, True)
        monkeypatch.setenv("LVCTX_API_KEY", f"{KEY}\x07x")
        done = run(*flags, server.url)
        assert (done.exit_code, "LVCTX_API_KEY is not a key" in done.stderr, KEY in done.output) == (2, True, False)


@pytest.mark.nano
def test_vqa_about_several_videos_ends_with_the_server(clips: Path) -> None:
    with faults(lambda number, body: "404" if number == 2 else None) as server:
        videos = [clips / f"v{i}.mp4" for i in range(3)]
        done = run("vqa", *videos, "--model", MODEL, "--endpoint", server.url, "--frames", 1, "--ask", "?")
    assert (done.exit_code, len(rows_of(done)), len(server.requests)) == (3, 1, 2)
    assert "no model served (HTTP 404)" in done.stderr


@pytest.mark.nano
def test_the_key_is_sent_and_the_projects_own_variable_comes_first(nano: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    monkeypatch.setenv("LVCTX_API_KEY", KEY)
    with faults(lambda number, body: f"400:key {KEY} is fine" if "No?" in str(body) else None) as server:
        flags = ("--model", MODEL, "--endpoint", server.url, "--frames", 1)
        done = run("vqa", nano.clips / "bikes.mp4", *flags, "--ask", "Yes?")
        assert done.exit_code == 0, done.output
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
        assert KEY not in done.output
        bad = run("vqa", nano.clips / "bikes.mp4", *flags, "--ask", "No?")
        assert bad.exit_code == 3
        assert "key *** is fine" in bad.stderr
        assert KEY not in bad.output


def test_a_server_that_finds_no_token_in_a_prompt_gives_no_reply() -> None:
    """llama.cpp answers so, with status 200, where a model's file has no usable vocabulary."""
    none = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    empty = {"choices": [{"text": "", "index": 0, "finish_reason": "length"}], "usage": none}
    with refused(InputError, "here"):
        parse_reply(empty, "here")
    # Some report no usage, but do answer.
    assert parse_reply({"choices": [{"text": "B"}], "usage": none}, "here").text == "B"


# --- what is sent


def luma_error(sent: Image.Image, original: Image.Image) -> float:
    """Mean absolute difference in brightness, 0 to 255, at the size that was sent."""
    gray = [image.resize(sent.size, Image.Resampling.BICUBIC).convert("L") for image in (sent, original)]
    return float(np.abs(np.subtract(*(np.asarray(image, dtype=float) for image in gray))).mean())


@pytest.mark.nano
def test_frames_are_sent_with_their_times_and_within_their_pixels(nano: Any) -> None:
    clip = nano.clips / "bikes.mp4"
    with faults() as server:
        engine = engine_of(server.url, frame_pixels=5000, jpeg_quality=95)
        shown = engine.show([clip], VideoSampling(fps=1.0))
        engine.reply(["What?"], SamplingParams(temperature=0.5, top_p=0.9, seed=7, max_new_tokens=9))
        body = server.requests[0]
    frames = list(read_video(clip, VideoSampling(fps=1.0)))
    assert shown.pts == tuple(frame.pts for frame in frames)
    (message,) = body["messages"]
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    assert texts == [*(f"<{frame.pts:.1f} seconds>" for frame in frames), "What?"]
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "image_url"] * len(frames) + ["text"]
    height, width = frames[0].image.shape[:2]
    for frame, image in zip(frames, sent_images(engine), strict=True):
        assert image.width * image.height <= 5000
        assert image.width / image.height == pytest.approx(width / height, rel=0.03)
        assert luma_error(image, Image.fromarray(frame.image)) < 2
    chosen = {key: body[key] for key in ("temperature", "top_p", "seed", "max_tokens")}
    assert chosen == {"temperature": 0.5, "top_p": 0.9, "seed": 7, "max_tokens": 9}
    assert "top_k" not in body


@pytest.mark.nano
def test_a_video_is_sent_as_a_clip_or_as_the_files_url(nano: Any, tmp_path: Path) -> None:
    clip = nano.clips / "bikes.mp4"
    with faults() as server:
        more = {"mm_processor_kwargs": {"fps": 1}}
        engine = engine_of(server.url, send="video", frame_pixels=20_000, extra_body=more)
        shown = engine.show([clip], VideoSampling(fps=2.0))
        engine.reply(["What?"], SamplingParams())
        flags = ("--model", MODEL, "--endpoint", server.url, "--send", "file-url", "--ask", "What?")
        done = run("vqa", clip, *flags)
        refused = run("vqa", clip, *flags, "--fps", 1)
        sent = [request["messages"][0]["content"][0] for request in server.requests]
    assert server.requests[0].items() >= more.items()
    url = sent[0]["video_url"]["url"]
    (tmp_path / "sent.mp4").write_bytes(base64.b64decode(url.removeprefix("data:video/mp4;base64,")))
    received = list(read_video(tmp_path / "sent.mp4", VideoSampling(fps="native")))
    # A rate is constant, the times of a video's frames are not quite.
    assert [frame.pts for frame in received] == pytest.approx([pts - shown.pts[0] for pts in shown.pts], abs=0.03)
    originals = read_video(clip, VideoSampling(fps=2.0))
    for frame, original in zip(received, originals, strict=True):
        assert luma_error(Image.fromarray(frame.image), Image.fromarray(original.image)) < 6
    assert sent[1]["video_url"]["url"] == clip.resolve().as_uri()
    assert (rows_of(done)[0]["frames"], rows_of(done)[0]["times"]) == (0, "server")
    assert (refused.exit_code, "the server samples the video" in refused.stderr) == (2, True)


def test_what_has_no_meaning_is_refused(tmp_path: Path) -> None:
    url = ("--endpoint", "http://127.0.0.1:9")
    vqa = ("vqa", tmp_path / "x.mp4", "--model", MODEL, "--ask", "?")
    bench = ("videomme", "run", "--model", MODEL, "--videos", tmp_path, "--questions", "q", "-o", tmp_path / "out")
    for flags, words in (
        ((*vqa, *url, "--device", "cpu"), "--device has no meaning with --endpoint"),
        ((*bench, *url, "--cp", 2, "--dtype", "float32"), "--dtype, --cp have no meaning with --endpoint"),
        ((*vqa, *url, "--hybrid", "1,8,1"), "a server decides the resolution"),
        ((*vqa, "--send", "images"), "--send needs --endpoint"),
        ((*vqa, *url, "--top-p", 0.5), "--top-p needs --temperature"),
        ((*vqa, "--endpoint", "localhost:8000"), "is not a URL"),
        ((*vqa, "--endpoint", f"http://me:{KEY}@host/v1"), "holds a key"),
        ((*vqa, *url, "--extra-body", "[1]"), "a JSON object is wanted"),
        ((*bench, *url, "--send", "file-url", "--subtitles", tmp_path), "need the times of frames"),
    ):
        done = run(*flags)
        assert (done.exit_code, words in done.stderr) == (2, True), done.output
        assert KEY not in done.output
    assert parse_endpoint("http://h:1") == parse_endpoint("http://h:1/") == "http://h:1/v1"
    assert parse_endpoint("https://h/openai/v2/") == "https://h/openai/v2"


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    done = run("vqa", tmp_path / "x.mp4", "--model", MODEL, "--ask", "?", "--endpoint", "http://127.0.0.1:9")
    assert (done.exit_code, "pip install 'lvctx[endpoint]'" in done.stderr) == (5, True)


# --- reasoning and sampling


def test_reasoning_is_apart_from_the_reply_and_does_not_count() -> None:
    """A model cut at 16 tokens in mid-thought is asked again with room for it, and from then on at once."""
    thoughts = "one two three four"

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        if body["max_tokens"] < 100:
            return {"content": f"<think>{thoughts[:7]}", "finish_reason": "length"}
        return {"content": f"<think>\n{thoughts}\n</think>\n\nB"}

    params = SamplingParams(max_new_tokens=16)
    with faults() as server:
        server.reply = reply
        engine = engine_of(server.url)
        other = engine.fork()
        for one in (engine, other):
            one.show([], VideoSampling())
        replies = [engine.reply(["Why?"], params), other.reply(["And?"], params)]
        assert [(r.text, r.reasoning, r.cut) for r in replies] == [("B", thoughts, False)] * 2
        assert [request["max_tokens"] for request in server.requests] == [16, 16 + 4096, 16 + 4096]
        for field in ("reasoning_content", "reasoning"):
            server.reply = lambda body, field=field: {"content": "C", field: thoughts}  # type: ignore[misc]
            got = engine.reply(["Why?"], params)
            assert (got.text, got.reasoning) == ("C", thoughts)
        server.reply = lambda body: {"content": None, "reasoning": "I never", "finish_reason": "length"}
        got = engine.reply(["Why?"], SamplingParams(max_new_tokens=16, max_reasoning_tokens=20))
        assert (got.text, got.reasoning, got.cut, server.requests[-1]["max_tokens"]) == ("", "I never", True, 36)


# --- needles


@pytest.fixture
def text_grid(nano: Any, tiny_lm: Path) -> tuple[object, ...]:
    """Four cells of text needles."""
    grid = ("--lengths", "200,300", "--depths", "0,0.5", "--trials", 1)
    return ("niah", "text", "--haystack", nano.essays / "love.txt", *grid, "--tokenizer", tiny_lm)


@pytest.mark.nano
def test_text_needles_on_a_server_are_continued_as_stock_transformers_does(
    tiny_lm: Path, served: str, text_grid: tuple[object, ...], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = run(*text_grid, "--model", tiny_lm, "--endpoint", served, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    rows = rows_of(done)
    assert [(row["length"], row["depth"]) for row in sorted(rows, key=lambda r: (r["length"], r["depth"]))] == [
        (200, 0),
        (200, 0.5),
        (300, 0),
        (300, 0.5),
    ]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_lm).eval(), AutoTokenizer.from_pretrained(tiny_lm)
    task = TextNeedleTask(tokenizer, read_haystack([Path(str(text_grid[3]))]), distractors=0, seed=0)
    cells = {(cell.length, cell.depth): cell for cell in task.cells([200, 300], [0, 0.5], 1)}
    for row in rows:
        prompt, answer = text_prompt(task, cells[row["length"], row["depth"]])
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=answer + 2, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert row["generated"] == tokenizer.decode(out, skip_special_tokens=True).strip()
        # The server tokenizes the text again: where sentences meet, tokens may differ from those that were counted.
        assert row["tokens"] == pytest.approx(row["length"] - answer, abs=4)
    assert (tmp_path / "out" / "heatmap.png").is_file()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["lengths"] == [200, 300]


@pytest.mark.nano
def test_text_needles_are_found_by_a_server_that_reads(text_grid: tuple[object, ...], tmp_path: Path) -> None:
    """It looks the number up; one cell fails at first. In a chat the answer may stand in a sentence."""

    def look_up(body: dict[str, Any]) -> dict[str, Any]:
        text = text_of(body)
        city = re.search(r"special magic (\w+) number is:\s*$", text)
        assert city is not None
        number = re.search(rf"special magic {city[1]} number is: (\d+)\.", text)
        assert number is not None
        found = number[1]
        return {"content": found if "prompt" in body else f"The number is {found}, I think."}

    for flags in ((), ("--prompt-as", "chat")):
        out = tmp_path / f"out{len(flags)}"
        with faults(lambda number, body: "400:too long" if number == 2 else None) as server:
            server.reply = look_up
            asked = (*text_grid, *flags, "--model", MODEL, "--endpoint", server.url, "-o", out)
            done = run(*asked, "--jobs", 1)
            assert done.exit_code == 4, done.output
            assert "too long" in done.stderr
            assert [row.get("correct") for row in rows_of(done)] == [True, None, True, True]
            done = run(*asked)
            assert (done.exit_code, len(rows_of(done)), len(server.requests)) == (0, 1, 5)
        assert json.loads((out / "summary.json").read_text())["accuracy"] == 1.0


@pytest.mark.nano
def test_teacher_forcing_by_the_log_probabilities_of_a_prompt(
    tiny_lm: Path, text_grid: tuple[object, ...], tmp_path: Path
) -> None:
    """In the form of vLLM's `prompt_logprobs`, computed by stock transformers; other servers have none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_lm).eval(), AutoTokenizer.from_pretrained(tiny_lm)
    expected: dict[str, tuple[float, bool]] = {}

    def prompt_logprobs(body: dict[str, Any]) -> dict[str, Any]:
        assert (body["prompt_logprobs"], body["max_tokens"]) == (0, 1)
        encoded = tokenizer(body["prompt"], return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"])
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0].log_softmax(-1)
        entries: list[Any] = [None]
        for row, token in zip(log_probs[:-1], ids[1:].tolist(), strict=True):
            rank = int((row > row[token]).sum()) + 1
            values = {"logprob": float(row[token]), "rank": rank, "decoded_token": tokenizer.decode([token])}
            entries.append({str(token): values})
        number = body["prompt"].split()[-1]
        first = len(body["prompt"]) - len(number)
        ends = [end for _, end in encoded["offset_mapping"]]
        chosen = [next(iter(e.values())) for e, end in zip(entries, ends, strict=True) if end > first]
        expected[number] = (sum(e["logprob"] for e in chosen), all(e["rank"] == 1 for e in chosen))
        return {"content": "x", "choice": {"prompt_logprobs": entries}}

    with faults() as server:
        flags = ("--model", MODEL, "--endpoint", server.url, "--scoring", "forced")
        none = run(*text_grid, *flags, "-o", tmp_path / "none")
        assert none.exit_code == 4
        assert "gives no log-probabilities of the prompt; --scoring generate" in none.stderr
        server.reply = prompt_logprobs
        done = run(*text_grid, *flags, "-o", tmp_path / "out", "--jobs", 1)
        assert done.exit_code == 0, done.output
    rows = rows_of(done)
    assert len(rows) == 4
    last = rows[-1]
    log_prob, is_greedy = expected[last["answer"]]
    assert (last["log_prob"], last["correct"]) == (pytest.approx(log_prob, abs=1e-3), is_greedy)


@pytest.mark.nano
def test_video_needles_on_a_server(nano: Any, tmp_path: Path) -> None:
    """The needle is at its place among the frames, at a time between its neighbours'; prefixes follow each other."""
    grid = ("--lengths", "2,4", "--depths", "0,0.5,1", "--trials", 1, "--fps", 1)
    clip = nano.clips / "bikes.mp4"
    with faults() as server:
        server.reply = lambda body: {"content": "Red"}
        flags = ("--model", MODEL, "--endpoint", server.url, "--frame-pixels", 3000, "-o", tmp_path / "out")
        done = run("niah", "video", "--haystack", clip, *grid, *flags, "--jobs", 1)
        assert done.exit_code == 0, done.output
        again = run("niah", "video", "--haystack", clip, *grid, *flags)
        assert rows_of(again) == []
        requests = [request["messages"][0]["content"] for request in server.requests]
    rows = rows_of(done)
    assert len(rows) == len(requests) == 6
    frames = {}
    for row, content in zip(rows, requests, strict=True):
        images = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        texts = [part["text"] for part in content[:-1] if part["type"] == "text"]
        times = [float(text.removeprefix("<").removesuffix(" seconds>")) for text in texts]
        assert len(images) == len(times) == row["length"] + 1
        needle, position = images.pop(row["position"]), row["position"]
        before = times.pop(position)
        frames.setdefault("needle", needle)
        assert needle == frames["needle"]
        assert times == [float(i) for i in range(row["length"])]
        neighbours = [times[max(position - 1, 0)], times[min(position, row["length"] - 1)]]
        assert before == sum(neighbours) / 2
        for i, image in enumerate(images):
            assert frames.setdefault(str(i), image) == image
        assert content[-1]["text"] == row["question"]
        assert row["correct"] == (row["answer"] == "red")
    made_of = rows[0]["made_of"]
    assert made_of["endpoint"] == {"send": "images", "frame_pixels": 3000, "jpeg_quality": 90, "frame_times": True}


def test_needles_that_a_server_cannot_have(text_grid: tuple[object, ...], nano: Any, tmp_path: Path) -> None:
    server = ("--model", MODEL, "--endpoint", "http://127.0.0.1:9", "-o", tmp_path / "out")
    video = ("niah", "video", "--haystack", nano.clips / "bikes.mp4", "--lengths", 2)
    for flags, words in (
        ((*text_grid, *server, "--kv-cache", "host"), "--kv-cache has no meaning"),
        ((*text_grid, *server, "--rope", "yarn:2"), "--rope has no meaning"),
        ((*text_grid, *server, "--scoring", "forced", "--prompt-as", "chat"), "--scoring generate"),
        ((*video, *server, "--send", "video"), "--send images"),
        ((*video, *server, "--as-images"), "--as-images has no meaning"),
        ((*video, *server, "--frames", 8), "sampled at a rate"),
    ):
        done = run(*flags)
        assert (done.exit_code, words in done.stderr) == (2, True), done.output
