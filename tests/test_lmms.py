"""The plug-in under the real lmms-eval: found by its entry point, run by its evaluator on a task of its kind."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.lmms, pytest.mark.nano]

TASK = """\
task: tiny_video
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function look.visual
doc_to_text: !function look.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false}}
process_results: !function look.results
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
"""
LOOK = """\
def visual(doc):
    return [{clips!r} + "/" + doc["videoID"] + ".mp4"]
def text(doc, kwargs=None):
    return doc["question"]
def results(doc, said):
    return {{"right": float(said[0].strip()[:1] == doc["answer"])}}
"""


@pytest.fixture(scope="module")
def vlm_dir(tiny_lm: Path, tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lmms_eval")
    from transformers import CLIPVisionModel

    from lvctx.model.load import load_model, load_tokenizer
    from lvctx.model.vlm import assemble, save_vlm

    out = tmp_path_factory.mktemp("vlm")
    tokenizer = load_tokenizer(tiny_lm)
    tower = CLIPVisionModel.from_pretrained(tiny_tower).eval()
    save_vlm(assemble(load_model(tiny_lm), tower, tokenizer, where=tiny_lm, seed=0), tokenizer, tiny_tower, out)
    return out


def test_lmms_eval_runs_our_model_on_a_task_of_its_own(vlm_dir: Path, nano: Any, tmp_path: Path) -> None:
    from lvctx.stages.vqa import Watcher

    questions = Path(__file__).parent / "data" / "questions.json"
    (tmp_path / "tiny_video.yaml").write_text(TASK.format(questions=questions))
    (tmp_path / "look.py").write_text(LOOK.format(clips=str(nano.clips)))
    out = tmp_path / "out"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lmms_eval", "--model", "lvctx", "--device", "cpu", "--batch_size", "1"),
            *("--model_args", f"pretrained={vlm_dir},frames=4", "--tasks", "tiny_video"),
            *("--include_path", str(tmp_path), "--output_path", str(out), "--log_samples"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = out.rglob("*samples_tiny_video.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(samples) == 6
    from lvctx.stages.encode import Encoder

    watcher = Watcher(str(vlm_dir), device="cpu")
    for video in ("bikes", "bigbuckbunny"):
        encoder = Encoder.plan(str(vlm_dir), frames=4, device="cpu", dtype="float32")
        made = encoder.encode(nano.clips / f"{video}.mp4", tmp_path)
        docs = [s for s in json.loads(questions.read_text()) if s["videoID"] == video]
        for doc, answer in zip(
            docs, watcher.ask(Path(made["path"]), [d["question"] for d in docs], max_new_tokens=6), strict=True
        ):
            (said,) = [s for s in samples if s["input"] == doc["question"]]
            reply = said["filtered_resps"]
            assert (reply[0] if isinstance(reply, list) else reply) == answer.text
