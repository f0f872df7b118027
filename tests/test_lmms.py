"""The plug-in under the real lmms-eval: found by its entry point, run by its evaluator on a task of its kind."""

import json
import shutil
import subprocess
import sys
from ast import literal_eval
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import mrope_models

from lvctx.inference.sampling_params import SamplingParams
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.video.hybrid import Hybrid
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.registry import open_vlm

pytestmark = [pytest.mark.lmms, pytest.mark.nano]

TASK = """\
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
{kind}
doc_to_visual: !function look.visual
doc_to_text: !function look.text
doc_to_target: answer
process_results: !function look.results
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
"""
WRITES = "output_type: generate_until\ngeneration_kwargs: {max_new_tokens: 6, temperature: 0, do_sample: false}"
CHOOSES = "output_type: multiple_choice\ndoc_to_choice: options"
LOOK = """\
from PIL import Image
def visual(doc):
    return {visuals}
def text(doc, kwargs=None):
    return doc["question"]
def results(doc, said):
    return {{"right": float(str(said[0]).strip()[:1] == doc["answer"])}}
"""


def engine_of(model: Path) -> TransformersEngine:
    return TransformersEngine(open_vlm(model), device="cpu")


QUESTIONS = Path(__file__).parent / "data" / "questions.json"


def run_task(
    model: Path,
    tmp_path: Path,
    visuals: str,
    kind: str = WRITES,
    *,
    options: str = "frames=4",
    questions: Path = QUESTIONS,
    processes: int = 1,
) -> dict[str, Any]:
    """What our model says under lmms-eval to every question, shown what the expression `visuals` makes of `doc`."""
    (tmp_path / "tiny.yaml").write_text(TASK.format(questions=questions, kind=kind))
    (tmp_path / "look.py").write_text(LOOK.format(visuals=visuals))
    out = tmp_path / "out"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    done = subprocess.run(
        [
            *(sys.executable, *(torchrun if processes > 1 else ())),
            *("-m", "lmms_eval", "--model", "lvctx", "--device", "cpu", "--batch_size", "1"),
            *("--model_args", f"pretrained={model},{options}", "--tasks", "tiny"),
            *("--include_path", str(tmp_path), "--output_path", str(out), "--log_samples"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = out.rglob("*samples_tiny.jsonl")
    said = {}
    for line in log.read_text().splitlines():
        sample = json.loads(line)
        reply = sample["filtered_resps"]
        said[sample["input"]] = reply[0] if isinstance(reply, list) and kind != CHOOSES else reply
    assert len(said) == 6
    return said


def test_lmms_eval_shows_our_model_videos(tiny_vlm: Path, nano: Any, tmp_path: Path) -> None:
    from lvctx.inference.video_questions import VideoQuestions
    from lvctx.vlm.video_encoder import VideoEncoder

    said = run_task(tiny_vlm, tmp_path, f"[{str(nano.clips)!r} + '/' + doc['videoID'] + '.mp4']")
    questions = VideoQuestions(engine_of(tiny_vlm), VideoSampling(), params=SamplingParams(max_new_tokens=6))
    for video in ("bikes", "bigbuckbunny"):
        encoder = VideoEncoder.open(str(tiny_vlm), VideoSampling(frames=4), device="cpu", dtype="float32")
        made = encoder.encode(nano.clips / f"{video}.mp4", tmp_path)
        asked = [doc["question"] for doc in json.loads(QUESTIONS.read_text()) if doc["videoID"] == video]
        for answer in questions.ask(Path(made["path"]), asked):
            assert said[answer.question] == answer.text


def test_lmms_eval_encodes_images_as_in_training(tiny_vlm: Path, tmp_path: Path) -> None:
    """UniRes: a picture of 2 x 1 tiles, then one of 2 x 2."""
    rng = np.random.default_rng(0)
    for name, size in (("wide", (48, 96, 3)), ("square", (96, 96, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in ("wide", "square")]
    said = run_task(tiny_vlm, tmp_path, f"[Image.open(name) for name in {files}]")
    engine = engine_of(tiny_vlm)
    shown = engine.show([Image.open(file).convert("RGB") for file in files], VideoSampling())
    assert shown.facts["visual_tokens"] == 2 * 4 + 1 + 4 * 4 + 1
    for question, reply in said.items():
        assert reply == engine.reply([question], SamplingParams(max_new_tokens=6)).text


def test_lmms_eval_asks_how_likely_each_option_is(tiny_vlm: Path, tmp_path: Path) -> None:
    Image.new("RGB", (48, 48), "red").save(tmp_path / "red.png")
    said = run_task(tiny_vlm, tmp_path, f"[Image.open({str(tmp_path / 'red.png')!r})]", CHOOSES)
    engine = engine_of(tiny_vlm)
    engine.show([Image.open(tmp_path / "red.png").convert("RGB")], VideoSampling())
    for doc in json.loads(QUESTIONS.read_text()):
        for option, found in zip(doc["options"], said[doc["question"]], strict=True):
            answer = engine.tokenizer.encode(f" {option}", add_special_tokens=False)
            score = engine.scorer.score(np.array([*engine.prompt_ids([doc["question"]]), *answer]), len(answer))
            assert literal_eval(found) == (pytest.approx(score.log_prob, abs=1e-3), score.forced)


def test_lmms_eval_takes_hybrid_resolution_and_a_rate_for_qwen_vl(nano: Any, tmp_path: Path) -> None:
    """In the paper's mode; a placeholder in a question is text, beside videos and beside images."""
    model = mrope_models.save("qwen2_vl", tmp_path / "model")
    docs = json.loads(QUESTIONS.read_text())
    for doc in docs:
        doc["question"] += " Is <image> or <|video_pad|> a word?"
    (tmp_path / "questions.json").write_text(json.dumps(docs))
    Image.new("RGB", (60, 90), "red").save(tmp_path / "red.png")
    options = "fps=1,max_frames=6,hybrid=2:16:4,hybrid_mode=image"
    sampling = VideoSampling(fps=1, max_frames=6, hybrid=Hybrid(group=2, tokens=16, ratio=4), hybrid_mode="image")
    clip, picture = nano.clips / "bikes.mp4", tmp_path / "red.png"
    engine = engine_of(model)
    for visuals, shown in (
        (f"[{str(clip)!r}]", [clip]),
        (f"[Image.open({str(picture)!r})] * 2", [Image.open(picture)] * 2),
    ):
        said = run_task(model, tmp_path, visuals, options=options, questions=tmp_path / "questions.json")
        engine.show(shown, sampling if shown == [clip] else VideoSampling())
        for question, reply in said.items():
            assert reply == engine.reply([question], SamplingParams(max_new_tokens=6)).text
        shutil.rmtree(tmp_path / "out")


SAMPLES = "output_type: generate_until\ngeneration_kwargs: {max_new_tokens: 6, temperature: 0.7, do_sample: true}"


def test_processes_share_the_questions_about_images(nano: Any, tmp_path: Path) -> None:
    """Of a Qwen-VL, several images each (GIRAFFE's table 10), greedily and at a task's temperature (Mantis-Eval's)."""
    model = mrope_models.save("qwen2_vl", tmp_path / "model")
    rng = np.random.default_rng(0)
    files = [str(tmp_path / f"{name}.png") for name in "ab"]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(file)
    visuals = f"[Image.open(name) for name in {files}]"
    engine = engine_of(model)
    engine.show([Image.open(file).convert("RGB") for file in files], VideoSampling())
    for kind, params in (
        (WRITES, SamplingParams(max_new_tokens=6)),
        (SAMPLES, SamplingParams(max_new_tokens=6, temperature=0.7)),
    ):
        said = run_task(model, tmp_path, visuals, kind, processes=2)
        for question, reply in said.items():
            assert reply == engine.reply([question], params).text
        shutil.rmtree(tmp_path / "out")
