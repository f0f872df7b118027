"""Questions to Qwen-VL: replies equal those of full stock forwards, and a video is read once for all questions."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import mrope_models
from support.id_positions import Rules, positions_of_ids
from support.mrope_models import Prompt, forward, greedy, opinionated
from test_niah import run
from test_qwen_niah import fails

from lvctx.artifacts.jsonl_log import read_jsonl
from lvctx.errors import InputError
from lvctx.inference.prefix_scorer import PrefixScorer
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.rope.mrope_positions import Text, positions
from lvctx.video.hybrid import Hybrid
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.qwen_frames import SampledVideo, pixels, resize_frames
from lvctx.vlm.qwen_vl import QwenVL
from lvctx.vlm.registry import open_vlm

DATA = Path(__file__).parent / "data"
QUESTIONS = ("What is it?", "What was on the road before the car came?", "Who?")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("qwen")
    kinds = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    return {kind: mrope_models.save(kind, here / kind) for kind in kinds}


def engine_of(saved: dict[str, Path], kind: str) -> tuple[QwenVL, TransformersEngine]:
    """With `opinionated`'s weights, and no token that ends a reply."""
    vlm = open_vlm(saved[kind])
    assert isinstance(vlm, QwenVL)
    engine = TransformersEngine(vlm, device="cpu", prefill_chunk=50)
    engine.model = opinionated(kind)
    engine.scorer = PrefixScorer(engine.model, None, chunk=50)
    engine.stop_ids = set()
    return vlm, engine


def resized(vlm: QwenVL, frames: list[tuple[float, np.ndarray]], sampling: VideoSampling) -> SampledVideo:
    return resize_frames(
        frames, vlm.token_rule(sampling), threshold=sampling.threshold, resample=vlm.processor.resample
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2_vl", {"hybrid": Hybrid(tokens=8)}),
        (
            "qwen2_5_vl",
            {
                "hybrid": Hybrid(group=2, tokens=24, ratio=4),
                "hybrid_mode": "literal",
                "frame_selection": "adaptive",
                "change_threshold": 0.01,
            },
        ),
    ],
)
def test_a_video_is_read_once_for_all_questions(kind: str, options: dict[str, Any], saved: dict[str, Path]) -> None:
    """Seventeen frames at uneven times: an odd last one, and time that goes far beyond height and width."""
    vlm, engine = engine_of(saved, kind)
    sampling = VideoSampling(**options)
    rng = np.random.default_rng(0)
    frames = [(i / 2 + i % 3 / 10, rng.integers(0, 256, (90, 150, 3), dtype=np.uint8)) for i in range(17)]
    sampled = resized(vlm, frames, sampling)
    engine.set_visual_input(vlm.visual_input([sampled], sampling))
    prompts = [engine.prompt_ids([question]) for question in QUESTIONS]
    seen = pixels(sampled, vlm.processor)
    for ids, question in zip(prompts, QUESTIONS, strict=True):
        text = f"<|im_start|>user\n<|video_pad|>{question}<|im_end|>\n<|im_start|>assistant\n"
        first, last = (engine.tokenizer.encode(part) for part in text.split("<|video_pad|>"))
        plain = [*first, *sampled.rule.layout(sampled.blocks).ids, *last]
        found, after = positions([Text(len(first) + 1), sampled.part(vlm.seconds_to_positions), Text(len(last) + 1)])
        assert torch.equal(engine.scorer.positions(ids, 0)[:, 0], found)
        assert engine.last_position(ids) == after - 1
        stock = greedy(engine.model, Prompt(ids=plain, positions=found, pixels=seen), 4)
        assert engine.finish([engine.start(ids, 4)])[0] == stock
    assert engine.scorer.tokens_run < len(prompts[0]) + 3 * 70
    engine.context = after + 3
    with pytest.raises(InputError, match=rf"{after} positions and 4 to generate exceed.*mrope-extend"):
        engine.finish([engine.start(prompts[2], 4)])[0]


def test_images_are_separate_items(saved: dict[str, Path]) -> None:
    """Two pictures of two shapes: transformers' own positions are right where there is no video."""
    vlm, engine = engine_of(saved, "qwen2_5_vl")
    rng = np.random.default_rng(0)
    sizes = ((60, 110), (140, 56))
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    engine.show(images, VideoSampling())
    ids = engine.prompt_ids(["Which?"])
    seen = vlm.processor(images=images, return_tensors="pt")
    pads = iter(int(grid.prod()) // 4 for grid in seen["image_grid_thw"])
    item = "<|vision_start|>{}<|vision_end|>"
    shown = "".join(item.format("<|image_pad|>" * next(pads)) for _ in images)
    text = f"<|im_start|>user\n{shown}Which?<|im_end|>\n<|im_start|>assistant\n"
    plain = engine.tokenizer.encode(text)
    rules = Rules.of(engine.model.config)
    found, _ = positions_of_ids(plain, rules, images=seen["image_grid_thw"].tolist())
    assert torch.equal(engine.scorer.positions(ids, 0)[:, 0], found)
    grids = {"pixel_values": seen["pixel_values"], "image_grid_thw": seen["image_grid_thw"]}
    with torch.inference_mode():
        stock = engine.model(
            input_ids=torch.tensor([plain]),
            mm_token_type_ids=torch.tensor([[int(i == rules.image) for i in plain]]),
            **grids,
        ).logits
        ours = forward(engine.model, Prompt(ids=plain, positions=found, pixels=grids)).logits
    assert torch.allclose(ours, stock, atol=1e-4)
    assert engine.finish([engine.start(ids, 1)])[0] == [int(stock[0, -1].argmax())]


def test_placeholders_in_a_question_are_text(saved: dict[str, Path]) -> None:
    """Benchmarks have `<image>` in their questions; what a user types is never an image."""
    vlm, engine = engine_of(saved, "qwen2_5_vl")
    engine.show([Image.new("RGB", (60, 60))], VideoSampling())
    prompt = engine.prompt_ids(["Which? <image> <video> <|image_pad|><|video_pad|><|vision_start|>"]).tolist()
    text = [i for i in prompt if i < vlm.vocabulary]
    plain = engine.prompt_ids(["Which? "]).tolist()
    assert len(prompt) - len(text) == sum(i >= vlm.vocabulary for i in plain)
    controls = {token: text.count(token) for token in engine.tokenizer.added_tokens_decoder}
    assert controls == {token: plain.count(token) for token in controls}
    assert "<image> <video> <|image_pad|><|video_pad|><|vision_start|>" in engine.tokenizer.decode(text)


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_vl_moe"])
@pytest.mark.parametrize("hybrid", [Hybrid(tokens=8), Hybrid(group=2, tokens=24, ratio=4)])
def test_qwen3_writes_times_as_the_stock_processor_does(kind: str, hybrid: Hybrid, saved: dict[str, Path]) -> None:
    """Seven frames half a second apart, the last merged with itself: ids, positions and logits against stock."""
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    vlm, engine = engine_of(saved, kind)
    sampling = VideoSampling(hybrid=hybrid)
    rng = np.random.default_rng(0)
    frames = [(7.0 + i / 2, rng.integers(0, 256, (90, 150, 3), dtype=np.uint8)) for i in range(7)]
    sampled = resized(vlm, frames, sampling)
    engine.set_visual_input(vlm.visual_input([sampled], sampling))
    seen = pixels(sampled, vlm.processor)
    grids = seen["video_grid_thw"].repeat_interleave(seen["video_grid_thw"][:, 0], 0)
    grids[:, 0] = 1
    processor = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        _calculate_timestamps=lambda *a: Qwen3VLProcessor._calculate_timestamps(None, *a),
    )
    shown = ""
    for i, grid in enumerate(grids):
        metadata = VideoMetadata(
            total_num_frames=7, fps=24, frames_indices=[12 * j for j in (2 * i, min(2 * i + 1, 6))]
        )
        inputs = {"video_grid_thw": grid[None], "video_metadata": [metadata]}
        shown += Qwen3VLProcessor.replace_video_token(processor, inputs, 0)
    plain = engine.tokenizer.encode(f"<|im_start|>user\n{shown}Who?<|im_end|>\n<|im_start|>assistant\n")
    ids = engine.prompt_ids(["Who?"])
    rules = Rules.of(engine.model.config)
    assert np.where(ids >= engine.scorer.vocabulary, rules.video, ids).tolist() == plain
    types = torch.tensor([[2 * (i == rules.video) for i in plain]])
    found, _ = engine.model.model.get_rope_index(torch.tensor([plain]), types, video_grid_thw=grids)
    assert torch.equal(engine.scorer.positions(ids, 0), found)
    with torch.inference_mode():
        stock = engine.model(
            input_ids=torch.tensor([plain]),
            mm_token_type_ids=types,
            pixel_values_videos=seen["pixel_values_videos"],
            video_grid_thw=grids,
        ).logits[0]
    answer = np.append(ids, [5])
    assert engine.scorer.score(answer, 1).log_prob == pytest.approx(float(stock[-1].log_softmax(0)[5]), abs=1e-3)
    assert engine.finish([engine.start(ids, 1)])[0] == [int(stock[-1].argmax())]


@pytest.mark.nano
def test_the_command_asks_about_video_files(saved: dict[str, Path], nano: Any, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "bikes.mp4").symlink_to(nano.clips / "bikes.mp4")
    flags = ("videomme", "run", "--model", saved["qwen2_vl"], "--videos", videos)
    flags += ("--questions", DATA / "questions.json", "--max-new-tokens", 2, "-q")
    done = run(*flags, "--frames", 5, "--hybrid", "2,24,4", "-o", tmp_path / "a")
    assert done.exit_code == 4, done.stderr
    rows = read_jsonl(tmp_path / "a" / "results.jsonl")
    seen = [row for row in rows if "error" not in row]
    assert [row["video"] for row in seen] == ["bikes"] * 3 or len(seen) == 3
    row = seen[0]
    assert row["made_of"]["sampling"]["frames"] == 5
    assert row["made_of"]["sampling"]["hybrid"] == [2, 24, 4]
    assert (row["frames"], row["high_frames"]) == (5, 3)
    assert row["visual_tokens"] == 2 * 24 + 6 or row["visual_tokens"] < row["tokens"]
    assert row["last_position"] < row["tokens"]
    assert not (tmp_path / "a" / "frames").exists()
    fails(3, run(*flags, "--frames", 5, "--hybrid", "2,24,2", "-o", tmp_path / "a"), "another run (other sampling)")
    fails(2, run(*flags, "--frame-mode", "pad", "-o", tmp_path / "b"), "--frame-mode")
    chat = run(
        "vqa",
        videos / "bikes.mp4",
        "--model",
        saved["qwen2_vl"],
        "--chat",
        "--ask",
        "What?",
        "--ask",
        "Why?",
        "--fps",
        1,
        "--hybrid",
        "1,8,1",
        "--max-new-tokens",
        2,
    )
    tokens = [json.loads(line)["tokens"] for line in chat.stdout.splitlines()]
    assert len(tokens) == 2, chat.stderr
    assert tokens[1] > tokens[0]
