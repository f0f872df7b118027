"""`--endpoint` against real servers: the log-probabilities and answers of the same model in this process.

Frames reach a server as JPEG or H.264, which lose something: the model in this process is shown the decoded JPEG
images, or the very clip that is sent.
"""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.real_servers import llama_server, tiny_model, transformers_server, vllm_server
from test_endpoint import engine_of, sent_images
from test_questions import DATA, rows_of, run

from lvctx.inference.engine import Engine
from lvctx.inference.sampling_params import SamplingParams
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.registry import open_vlm

pytestmark = [pytest.mark.servers, pytest.mark.nano, pytest.mark.timeout(1800)]
TURNS = (["What is it?"], ["Why?"], ["Why?", "No.", "And then?"])
SENT = {"frame_times": False, "frame_pixels": 12_000}
SENT_FLAGS = ("--no-frame-times", "--frame-pixels", 12_000, "--frames", 4, "--max-new-tokens", 8)
MEDIA = ("--limit-mm-per-prompt", '{"image": 8, "video": 1}', "--media-io-kwargs", '{"video": {"num_frames": -1}}')


def whole(text: str) -> str:
    """Without what depends on how incomplete characters are decoded: random models generate any bytes."""
    return re.sub("\ufffd+", "\ufffd", text).rstrip("\ufffd")


# --- text


@pytest.fixture(scope="module")
def grid(nano: Any) -> tuple[object, ...]:
    """Four cells of text needles."""
    cells = ("--lengths", "400,700", "--depths", "0,1", "--trials", 1)
    return ("niah", "text", "--haystack", nano.essays / "love.txt", *cells)


@pytest.fixture(scope="module")
def in_process(grid: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    """Their rows in this process, by cell."""
    flags = ("--scoring", "both", "--dtype", "float32", "-o", tmp_path_factory.mktemp("here"))
    done = run(*grid, "--model", tiny_model("lm-yarn"), *flags)
    assert done.exit_code == 0, done.output
    return {(row["length"], row["depth"]): row for row in rows_of(done)}


def check_generated(rows: Sequence[dict[str, Any]], expected: dict[Any, dict[str, Any]]) -> None:
    """The same cells with the same greedy tokens after a prompt of as many tokens."""
    assert {(row["length"], row["depth"]) for row in rows} == set(expected)
    for row in rows:
        here = expected[row["length"], row["depth"]]
        assert whole(row["generated"]) == whole(here["generated"]) != ""
        assert row["tokens"] == here["tokens"] - len(row["answer"])  # the prompt's: a token is a byte


def test_text_needles_on_vllm(grid: tuple[object, ...], in_process: dict[Any, dict[str, Any]], tmp_path: Path) -> None:
    """Generated, and forced by `prompt_logprobs`; then what it refuses: too long a prompt, and another model."""
    model = tiny_model("lm-yarn")
    with vllm_server(model, tmp_path / "log") as url:
        flags = ("--model", model, "--endpoint", url)
        done = run(*grid, *flags, "--scoring", "both", "-o", tmp_path / "out")
        assert done.exit_code == 0, done.output
        rows = rows_of(done)
        check_generated(rows, in_process)
        for row in rows:
            here = in_process[row["length"], row["depth"]]
            assert row["log_prob"] == pytest.approx(here["log_prob"], abs=1e-3)
            assert row["teacher_forced"] == here["teacher_forced"]
        chat = run(*grid, *flags, "--prompt-as", "chat", "-o", tmp_path / "chat")
        assert chat.exit_code == 0, chat.output
        assert {row["reply_tokens"] for row in rows_of(chat)} <= set(range(1, 65))
        long = ["1500" if word == "400,700" else word for word in grid]
        done = run(*long, *flags, "--tokenizer", model, "-o", tmp_path / "long")
        assert (done.exit_code, "maximum context length is 1024" in done.stderr) == (4, True), done.output
        done = run(*grid, "--model", "nosuch", "--tokenizer", model, "--endpoint", url, "-o", tmp_path / "other")
        assert done.exit_code == 3
        assert "the server has no model nosuch (HTTP 404)" in done.stderr
        assert f"it has {model}" in done.stderr


def test_text_needles_on_llama_cpp(
    grid: tuple[object, ...], in_process: dict[Any, dict[str, Any]], tmp_path: Path
) -> None:
    """Generated; it gives no log-probabilities of prompts, and says when a prompt is too long."""
    model = tiny_model("lm-yarn")
    with llama_server(model, tmp_path) as url:
        flags = ("--model", "any", "--tokenizer", model, "--endpoint", url)
        done = run(*grid, *flags, "-o", tmp_path / "out")
        assert done.exit_code == 0, done.output
        check_generated(rows_of(done), in_process)
        chat = run(*grid, *flags, "--prompt-as", "chat", "-o", tmp_path / "chat")
        assert chat.exit_code == 0, chat.output
        done = run(*grid, *flags, "--scoring", "forced", "-o", tmp_path / "forced")
        assert (done.exit_code, "gives no log-probabilities of the prompt" in done.stderr) == (4, True)
        long = ["1500" if word == "400,700" else word for word in grid]
        done = run(*long, *flags, "-o", tmp_path / "long")
        assert (done.exit_code, "HTTP 400" in done.stderr, "context size" in done.stderr) == (4, True, True)


# --- images and video


def compare(remote: Engine, local: Engine) -> None:
    """The same answers after prompts of as many tokens, and no two alike."""
    replies, params = [], SamplingParams(max_new_tokens=8)
    for turns in TURNS:
        expected, reply = local.reply(turns, params), remote.reply(turns, params)
        assert (whole(reply.text), reply.prompt_tokens) == (whole(expected.text), expected.prompt_tokens)
        replies.append(whole(reply.text))
    assert len(set(replies)) == len(TURNS)


def check_vqa(clip: Path, model: Path, url: str, send: str, local: Engine) -> None:
    """The command's answer is the one in this process."""
    done = run("vqa", clip, "--model", model, "--endpoint", url, "--send", send, *SENT_FLAGS, "--ask", TURNS[0][0])
    assert done.exit_code == 0, done.output
    (row,) = rows_of(done)
    assert whole(row["answer"]) == whole(local.reply(TURNS[0], SamplingParams(max_new_tokens=8)).text)
    assert (row["send"], row["frames"]) == (send, 4)


def check_images(clip: Path, model: Path, url: str) -> None:
    """Four frames as JPEG images, against the model in this process that is shown these images."""
    remote = engine_of(url, str(model), **SENT)
    remote.show([clip], VideoSampling(frames=4))
    local = TransformersEngine(open_vlm(model), device="cpu")
    local.show(sent_images(remote), VideoSampling())
    compare(remote, local)
    check_vqa(clip, model, url, "images", local)


def check_clip(clip: Path, model: Path, url: str, folder: Path, sampling: VideoSampling) -> None:
    """Four frames as a clip, against the model in this process that is shown that clip; `sampling` takes all four."""
    remote = engine_of(url, str(model), send="video", **SENT)
    remote.show([clip], VideoSampling(frames=4))
    assert remote._parts is not None
    sent = folder / "sent.mp4"
    sent.write_bytes(base64.b64decode(remote._parts[0]["video_url"]["url"].partition(",")[2]))
    local = TransformersEngine(open_vlm(model, feature_cache=folder / "features"), device="cpu")
    assert local.show([sent], sampling).facts["frames"] == 4
    compare(remote, local)
    check_vqa(clip, model, url, "video", local)


def test_a_qwen2_vl_on_vllm(nano: Any, tmp_path: Path) -> None:
    """Images, a clip, and needles among images; the server has to let a request choose how a clip is sampled."""
    model, clip = tiny_model("qwen2_vl-none"), nano.clips / "bikes.mp4"
    with vllm_server(model, tmp_path / "log", *MEDIA) as url:
        check_images(clip, model, url)
        check_clip(clip, model, url, tmp_path, VideoSampling(fps=0.3))
        flags = ("--model", model, "--endpoint", url, "--frame-pixels", 6000)
        grid = ("--lengths", "2,4", "--depths", "0,1", "--trials", 1, "--fps", 1)
        done = run("niah", "video", "--haystack", clip, *grid, *flags, "-o", tmp_path / "needles")
        assert (done.exit_code, len(rows_of(done))) == (0, 4), done.output
        asked = ("--extra-body", '{"media_io_kwargs": {"video": {"num_frames": -1}}}', *SENT_FLAGS, "--ask", "?")
        done = run("vqa", clip, "--model", model, "--endpoint", url, "--send", "video", *asked)
        assert (done.exit_code, "--trust-request-mm-kwargs" in done.stderr) == (3, True), done.output


def test_a_llava_onevision_on_vllm(nano: Any, tmp_path: Path) -> None:
    """A clip. vLLM cuts each of several images into tiles, this process does not: their tokens are not equal."""
    model = tiny_model("vlm-clip")
    with vllm_server(model, tmp_path / "log", *MEDIA) as url:
        check_clip(nano.clips / "bikes.mp4", model, url, tmp_path, VideoSampling(fps="native"))


def test_a_qwen2_vl_on_transformers_serve(nano: Any, tmp_path: Path) -> None:
    """Images, and a benchmark whose rows are complete."""
    model = tiny_model("qwen2_vl-none")
    with transformers_server(tmp_path / "log") as url:
        check_images(nano.clips / "bikes.mp4", model, url)
        asked = ("--videos", nano.clips, "--questions", DATA / "questions.json", "-o", tmp_path / "out")
        done = run("videomme", "run", "--model", model, "--endpoint", url, *asked, *SENT_FLAGS, "--jobs", 2)
        assert done.exit_code == 0, done.output
        stored = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
        assert len({row["id"] for row in stored}) == len(stored) == 6
