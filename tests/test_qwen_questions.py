"""Questions to Qwen-VL: replies are those of whole stock forwards, and what is shown is read once for all questions."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mrope_models
import numpy as np
import pytest
import torch
from mrope_models import Prompt, forward, greedy, opinionated
from PIL import Image
from test_niah import run
from test_qwen_niah import fails

from lvctx.artifacts.rows import read_rows
from lvctx.bench.reader import Reader
from lvctx.errors import InputError
from lvctx.positions.mrope_ids import Rules, Text, positions, positions_of_ids
from lvctx.stages.qwen_asker import QwenAsker, Viewing
from lvctx.vlm.qwen_frames import pixels, resize_frames
from lvctx.vision.hybrid import Hybrid

DATA = Path(__file__).parent / "data"
QUESTIONS = ("What is it?", "What was on the road before the car came?", "Who?")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("qwen")
    return {kind: mrope_models.save(kind, here / kind) for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")}


def asker_of(saved: dict[str, Path], kind: str, **options: Any) -> QwenAsker:
    asker = QwenAsker(saved[kind], viewing=Viewing(**options), device="cpu", chunk=50)
    asker.vlm = opinionated(kind)
    asker.reader = Reader(asker.vlm, None, chunk=50)
    asker.stop = set()
    return asker


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2_vl", {"hybrid": Hybrid(tokens=8)}),
        ("qwen2_5_vl", {"hybrid": Hybrid(group=2, tokens=24, ratio=4, mode="literal"), "threshold": 0.01}),
    ],
)
def test_a_film_is_read_once_for_all_questions(kind: str, options: dict[str, Any], saved: dict[str, Path]) -> None:
    """Seventeen frames at uneven times: an odd last one, and time that goes far beyond height and width."""
    asker = asker_of(saved, kind, **options)
    rng = np.random.default_rng(0)
    frames = [(i / 2 + i % 3 / 10, rng.integers(0, 256, (90, 150, 3), dtype=np.uint8)) for i in range(17)]
    film = resize_frames(frames, asker.rule, threshold=options.get("threshold"), resample=asker.processor.resample)
    asker.show_film(film)
    prompts = [asker.ids(question) for question in QUESTIONS]
    seen = pixels(film, asker.processor)
    for ids, question in zip(prompts, QUESTIONS, strict=True):
        text = f"<|im_start|>user\n<|video_pad|>{question}<|im_end|>\n<|im_start|>assistant\n"
        first, last = (asker.tokenizer.encode(part) for part in text.split("<|video_pad|>"))
        plain = [*first, *asker.rule.layout(film.blocks).ids, *last]
        found, after = positions([Text(len(first) + 1), film.part(asker.tokens_per_second), Text(len(last) + 1)])
        assert torch.equal(asker.reader.positions(ids, 0)[:, 0], found)
        assert asker.last_position(ids) == after - 1
        stock = greedy(asker.vlm, Prompt(ids=plain, positions=found, pixels=seen), 4)
        assert asker.reply(ids, 4) == stock
    assert asker.reader.tokens_run < len(prompts[0]) + 3 * 70
    asker.context = after + 3
    with pytest.raises(InputError, match=rf"{after} positions and 4 to answer exceed.*mrope-extend"):
        asker.reply(prompts[2], 4)


def test_pictures_are_items_of_their_own(saved: dict[str, Path]) -> None:
    """Two pictures of two shapes: transformers' own positions are right where there is no video."""
    asker = asker_of(saved, "qwen2_5_vl")
    rng = np.random.default_rng(0)
    sizes = ((60, 110), (140, 56))
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    asker.show_images(images)
    ids = asker.ids("Which?")
    seen = asker.processor(images=images, return_tensors="pt")
    pads = iter(int(grid.prod()) // 4 for grid in seen["image_grid_thw"])
    item = "<|vision_start|>{}<|vision_end|>"
    shown = "".join(item.format("<|image_pad|>" * next(pads)) for _ in images)
    text = f"<|im_start|>user\n{shown}Which?<|im_end|>\n<|im_start|>assistant\n"
    plain = asker.tokenizer.encode(text)
    rules = Rules.of(asker.vlm.config)
    found, _ = positions_of_ids(plain, rules, images=seen["image_grid_thw"].tolist())
    assert torch.equal(asker.reader.positions(ids, 0)[:, 0], found)
    grids = {"pixel_values": seen["pixel_values"], "image_grid_thw": seen["image_grid_thw"]}
    with torch.inference_mode():
        stock = asker.vlm(
            input_ids=torch.tensor([plain]),
            mm_token_type_ids=torch.tensor([[int(i == rules.image) for i in plain]]),
            **grids,
        ).logits
        ours = forward(asker.vlm, Prompt(ids=plain, positions=found, pixels=grids)).logits
    assert torch.allclose(ours, stock, atol=1e-4)
    assert asker.reply(ids, 1) == [int(stock[0, -1].argmax())]


@pytest.mark.parametrize("hybrid", [Hybrid(tokens=8), Hybrid(group=2, tokens=24, ratio=4)])
def test_qwen3_writes_times_as_the_stock_processor_does(hybrid: Hybrid, saved: dict[str, Path]) -> None:
    """Seven frames half a second apart, the last merged with itself: ids, positions and logits against stock."""
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    asker = asker_of(saved, "qwen3_vl", hybrid=hybrid)
    rng = np.random.default_rng(0)
    frames = [(7.0 + i / 2, rng.integers(0, 256, (90, 150, 3), dtype=np.uint8)) for i in range(7)]
    film = resize_frames(frames, asker.rule, resample=asker.processor.resample)
    asker.show_film(film)
    seen = pixels(film, asker.processor)
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
    plain = asker.tokenizer.encode(f"<|im_start|>user\n{shown}Who?<|im_end|>\n<|im_start|>assistant\n")
    ids = asker.ids("Who?")
    rules = Rules.of(asker.vlm.config)
    assert np.where(ids >= asker.reader.vocabulary, rules.video, ids).tolist() == plain
    types = torch.tensor([[2 * (i == rules.video) for i in plain]])
    found, _ = asker.vlm.model.get_rope_index(torch.tensor([plain]), types, video_grid_thw=grids)
    assert torch.equal(asker.reader.positions(ids, 0), found)
    with torch.inference_mode():
        stock = asker.vlm(
            input_ids=torch.tensor([plain]),
            mm_token_type_ids=types,
            pixel_values_videos=seen["pixel_values_videos"],
            video_grid_thw=grids,
        ).logits[0]
    answer = np.append(ids, [5])
    assert asker.reader.score(answer, 1).log_prob == pytest.approx(float(stock[-1].log_softmax(0)[5]), abs=1e-3)
    assert asker.reply(ids, 1) == [int(stock[-1].argmax())]


@pytest.mark.nano
def test_the_command_asks_about_video_files(saved: dict[str, Path], nano: Any, tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    (films / "bikes.mp4").symlink_to(nano.clips / "bikes.mp4")
    flags = ("videomme", "run", "--model", saved["qwen2_vl"], "--videos", films)
    flags += ("--questions", DATA / "questions.json", "--max-new-tokens", 2, "-q")
    done = run(*flags, "--frames", 5, "--hybrid", "2,24,4", "-o", tmp_path / "a")
    assert done.exit_code == 4, done.stderr
    rows = read_rows(tmp_path / "a" / "results.jsonl")
    seen = [row for row in rows if "error" not in row]
    assert [row["video"] for row in seen] == ["bikes"] * 3 or len(seen) == 3
    row = seen[0]
    assert row["made_of"]["sampler"]["frames"] == 5
    assert row["made_of"]["sampler"]["ratio"] == 4
    assert (row["frames"], row["high_frames"]) == (5, 3)
    assert row["visual_tokens"] == 2 * 24 + 6 or row["visual_tokens"] < row["tokens"]
    assert row["last_position"] < row["tokens"]
    assert not (tmp_path / "a" / "frames").exists()
    fails(3, run(*flags, "--frames", 5, "--hybrid", "2,24,2", "-o", tmp_path / "a"), "another run (other sampler)")
    fails(2, run(*flags, "--frame-mode", "pad", "-o", tmp_path / "b"), "--frame-mode")
    chat = run(
        "vqa",
        films / "bikes.mp4",
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
