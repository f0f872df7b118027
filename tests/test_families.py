"""A family of VLMs is one file and one line: a made-up one works in niah, vqa and videomme."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_niah import run
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from lvctx.inference.sampling_params import SamplingParams
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.models.image_processing import Preprocess
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm import registry
from lvctx.vlm.registry import open_vlm

PACKAGE = Path(__file__).resolve().parents[1] / "lvctx"


@pytest.fixture
def llava(tiny_lm: Path, tiny_tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stock LLaVA with random weights, and its family in the registry."""
    monkeypatch.setitem(registry.FAMILIES, "llava", "support.llava_family:StockLlava")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    lm, tower = LlamaForCausalLM.from_pretrained(tiny_lm), CLIPVisionModel.from_pretrained(tiny_tower)
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=lm.config,
            vision_config=tower.config,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    model.model.language_model.load_state_dict(lm.model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)  # a model whose answers differ
    path = tmp_path / "llava"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "preprocessor_config.json").write_text((tiny_tower / "preprocessor_config.json").read_text())
    return path


@pytest.mark.nano
def test_replies_equal_stock_generation(llava: Path, nano: Any) -> None:
    engine = TransformersEngine(open_vlm(llava), device="cpu")
    clip = nano.clips / "bikes.mp4"
    engine.show([clip], VideoSampling(frames=3))
    reply = engine.reply(["What is it?"], SamplingParams(max_new_tokens=5))
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    preprocess = Preprocess.from_directory(llava)
    frames = [Image.fromarray(f.image) for f in read_video(clip, VideoSampling(frames=3))]
    pixels = preprocess([preprocess.square(frame, "squash") for frame in frames])
    text = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": "<image>" * 16 * 3 + "What is it?"}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([engine.tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            do_sample=False,
            max_new_tokens=5,
        )
    assert reply.prompt_tokens == ids.shape[1]
    assert reply.text == engine.decode(out[0, ids.shape[1] :].tolist())


@pytest.mark.nano
def test_commands_take_it(llava: Path, nano: Any, tmp_path: Path) -> None:
    clip = nano.clips / "bikes.mp4"
    done = run("vqa", clip, "--model", llava, "--frames", 2, "--ask", "What?", "--max-new-tokens", 3)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 2
    grid = ("--lengths", "2,4", "--depths", "0,1", "--trials", 2)
    done = run("niah", "video", "--model", llava, "--haystack", clip, *grid, "-o", tmp_path / "niah")
    assert done.exit_code == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "bikes.mp4").symlink_to(clip)
    questions = json.loads((Path(__file__).parent / "data" / "questions.json").read_text())
    (tmp_path / "questions.json").write_text(json.dumps([q for q in questions if "bikes" in json.dumps(q)]))
    asked = ("--videos", videos, "--questions", tmp_path / "questions.json", "--frames", 2)
    done = run("videomme", "run", "--model", llava, *asked, "-o", tmp_path / "mme")
    assert done.exit_code == 0, done.stderr
    assert all("response" in json.loads(line) for line in done.stdout.splitlines())


def test_only_the_registry_looks_at_the_type_of_a_vlm() -> None:
    """Elsewhere `model_type` is read of language models and towers, and where M-RoPE is extended."""
    names = re.compile(r"""["'](llava_onevision|qwen2_vl|qwen2_5_vl|qwen3_vl)["']""")
    allowed = {"vlm/registry.py"}
    found = {
        str(path.relative_to(PACKAGE))
        for folder in ("vlm", "inference", "eval", "cli", "data", "video")
        for path in (PACKAGE / folder).rglob("*.py")
        if names.search(path.read_text(encoding="utf-8"))
    }
    assert found <= allowed


def test_equal_frames_have_equal_ids(tmp_path: Path, llava: Path) -> None:
    from support.llava_family import LlavaTokens, StockLlava

    tokens = LlavaTokens(StockLlava(llava), [Image.new("RGB", (8, 8))] * 3)
    ids = tokens.ids(np.array([2, 0, 2]))
    assert (ids[:16] == ids[32:]).all()
    assert (ids[:16] != ids[16:32]).all()
