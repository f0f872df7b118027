"""Videos for Qwen-VL: sizes, counts and pixels against stock, logits against stock, answers against full forwards."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import mrope_models
from support.id_positions import Rules, positions_of_ids
from support.mrope_models import Prompt, forward
from test_cli import fails, lvctx, on_terminal

from lvctx.errors import UsageError
from lvctx.rope.mrope_positions import Text, positions
from lvctx.video.hybrid import Hybrid, HybridMode, hybrid_tokens, runs, select_high
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.qwen_frames import SampledVideo, check_reachable, count_video, grid_times, pixels, resize_frames
from lvctx.vlm.registry import open_vlm
from lvctx.vlm.token_count import QwenRule

MODES = ("pair", "image", "literal")
BICUBIC = 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("qwen")
    return {kind: mrope_models.save(kind, here / kind) for kind in ("qwen2_vl", "qwen2_5_vl")}


@pytest.fixture(scope="module")
def processor(saved: dict[str, Path]) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(saved["qwen2_vl"])


def rule_of(path: Path, **hybrid: Any) -> QwenRule:
    rule = open_vlm(path).token_rule(VideoSampling(hybrid=Hybrid(**hybrid), hybrid_mode=hybrid.get("mode", "pair")))
    assert isinstance(rule, QwenRule)
    return rule


def pictures(n: int, *, width: int = 150, height: int = 90) -> list[tuple[float, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(i / 2, rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for i in range(n)]


def prompt_of(sampled: SampledVideo, processor: Any, rules: Rules, text: int = 4) -> Prompt:
    ids = [7] * text + sampled.rule.layout(sampled.blocks).ids + [8] * text
    found, _ = positions([Text(text + 1), sampled.part(rules.tokens_per_second), Text(text + 1)])
    return Prompt(ids=ids, positions=found, pixels=pixels(sampled, processor))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 3), st.sampled_from(MODES))
def test_selection_frame_by_frame_makes_the_runs_that_are_counted(
    n: int, group: int, ratio: int, mode: HybridMode
) -> None:
    hybrid = Hybrid(group=group, tokens=12 * ratio, ratio=ratio, mode=mode)
    is_high = select_high(hybrid, merge=2)
    picture = np.zeros((2, 2, 3), np.uint8)
    high = [is_high(i, picture) for i in range(n)]
    rule = QwenRule(start=1, end=2, pads={"image": 3, "video": 4}, hybrid=hybrid)
    sampled = SampledVideo(frames=[], pts=[], high=high, size=(336, 336), rule=rule)
    assert sampled.runs == list(runs(n, hybrid, merge=2))
    assert sampled.nominal == hybrid_tokens(n, hybrid, merge=2)
    assert sampled.blocks == rule.video(336, 336, n)


def test_the_papers_budget_by_hand() -> None:
    """1,024 frames at (4, 240, 3), 5:3 so that 20 x 12 tokens fill 240: pairs halve the paper's 120 a frame."""
    rule = QwenRule(
        start=1, end=2, pads={"image": 3, "video": 4}, hybrid=Hybrid(group=4, tokens=240, ratio=3, mode="image")
    )
    paper = count_video(1024, 1000, 600, rule, fps=2, tokens_per_second=None)
    assert paper.nominal == 1024 * 120
    assert paper.actual == 256 * 240 + 768 * 66  # 80 at 5:3 is 11 x 6
    assert paper.delimiters == 2 * 1024
    assert paper.last_position == 1023
    pairs = count_video(
        1024, 1000, 600, replace(rule, hybrid=replace(rule.hybrid, mode="pair")), fps=2, tokens_per_second=2
    )
    assert (pairs.nominal, pairs.delimiters) == (512 * 120, 2 * 256)
    assert pairs.last_position == 1022  # the last grid begins at 511 seconds


def test_what_cannot_be_had() -> None:
    with pytest.raises(UsageError, match=r"m/s is 34\.28.*nearest m is 238"):
        check_reachable(Hybrid(group=4, tokens=240, ratio=7))
    with pytest.raises(UsageError, match=r"at least 4 tokens.*m at least 12"):
        check_reachable(Hybrid(group=4, tokens=9, ratio=3))


def test_pixels_are_the_stock_processors(saved: dict[str, Path], processor: Any) -> None:
    """Image by image at the same limits; and a video of one still picture is that picture, grid after grid."""
    frames = pictures(3)
    rule = rule_of(saved["qwen2_vl"], tokens=8, mode="image")
    ours = pixels(resize_frames(frames, rule, resample=BICUBIC), processor)
    size = {"shortest_edge": 4 * 784, "longest_edge": 8 * 784}
    stock = processor(images=[Image.fromarray(p) for _, p in frames], size=size, return_tensors="pt")
    assert torch.equal(ours["image_grid_thw"], stock["image_grid_thw"])
    assert torch.equal(ours["pixel_values"], stock["pixel_values"])
    still = [(i / 2, frames[0][1]) for i in range(3)]
    video = pixels(resize_frames(still, replace(rule, hybrid=Hybrid(tokens=8)), resample=BICUBIC), processor)
    one = stock["pixel_values"][: stock["image_grid_thw"][0].prod()]
    assert video["video_grid_thw"].tolist() == [[2, *stock["image_grid_thw"][0, 1:].tolist()]]
    assert torch.equal(video["pixel_values_videos"], one.repeat(2, 1))


def test_sizes_of_images_are_those_of_processor_config_json(saved: dict[str, Path], tmp_path: Path) -> None:
    """transformers 5 writes this file alone, and reads it before preprocessor_config.json where both are there."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = tmp_path / "model"
    shutil.copytree(saved["qwen2_vl"], model)
    given = json.loads((model / "preprocessor_config.json").read_text())
    for most, alone in ((112 * 112, False), (56 * 112, True)):
        if alone:
            (model / "preprocessor_config.json").unlink()
        small = {**given, "size": {"shortest_edge": 56 * 56, "longest_edge": most}}
        (model / "processor_config.json").write_text(json.dumps({"image_processor": small}))
        stock = Qwen2VLImageProcessorPil.from_pretrained(model)
        image = Image.new("RGB", (168, 71))
        grid = stock(images=[image], return_tensors="np")["image_grid_thw"][0]
        assert open_vlm(model).load([image], VideoSampling()).tokens == grid.prod() // 4


def test_two_frames_share_a_grid(saved: dict[str, Path], processor: Any) -> None:
    """The convolution over two frames sees the first with its first half and the second with its second."""
    model = mrope_models.build("qwen2_vl")
    (_, a), (_, b) = pictures(2)
    rule = rule_of(saved["qwen2_vl"], tokens=8)

    def embed(*frames: np.ndarray) -> torch.Tensor:
        sampled = resize_frames([(i / 2, frame) for i, frame in enumerate(frames)], rule, resample=BICUBIC)
        embedded: torch.Tensor = model.model.visual.patch_embed(pixels(sampled, processor)["pixel_values_videos"])
        return embedded

    with torch.inference_mode():
        assert torch.allclose(embed(a, b) + embed(b, a), embed(a, a) + embed(b, b), atol=1e-5)
        assert not torch.allclose(embed(a, b), embed(b, a), atol=1e-3)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_uniform_is_the_stock_forward(kind: str, saved: dict[str, Path], processor: Any) -> None:
    """Six frames, three grids of 2 x 4 tokens: few enough that stock's own position ids are right as well."""
    model = mrope_models.build(kind)
    rules = Rules.of(model.config)
    sampled = resize_frames(pictures(6), rule_of(saved[kind], tokens=8), resample=BICUBIC)
    prompt = prompt_of(sampled, processor, rules)
    with torch.inference_mode():
        ours = forward(model, prompt).logits
        types = torch.tensor([[2 * (i == rules.video) for i in prompt.ids]])
        seconds = {"second_per_grid_ts": torch.tensor([1.0])} if kind == "qwen2_5_vl" else {}
        stock = model(
            input_ids=torch.tensor([prompt.ids]),
            attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
            mm_token_type_ids=types,
            **seconds,
            **prompt.pixels,
        ).logits
    grids = prompt.pixels["video_grid_thw"].tolist()
    plain, _ = positions_of_ids(prompt.ids, rules, videos=grids, seconds_per_grid=[1.0])
    assert torch.equal(prompt.positions, plain)
    visual = [i for i, token in enumerate(prompt.ids) if token == rules.video]
    upto = visual[-1] + 1 if kind == "qwen2_5_vl" else len(prompt.ids)  # 2 positions a grid: stock is early after it
    assert torch.allclose(ours[:, :upto], stock[:, :upto], atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_hybrid_runs_in_every_mode(mode: HybridMode, saved: dict[str, Path], processor: Any) -> None:
    """Nine frames: what is counted is what the model reads, and time never goes back."""
    model = mrope_models.build("qwen2_vl")
    sampled = resize_frames(
        pictures(9), rule_of(saved["qwen2_vl"], group=3, tokens=24, ratio=4, mode=mode), resample=BICUBIC
    )
    prompt = prompt_of(sampled, processor, Rules.of(model.config))
    with torch.inference_mode():
        logits = forward(model, prompt).logits
    assert logits.shape[1] == len(prompt.ids) == 8 + sum(b.tokens for b in sampled.blocks) + 2 * len(sampled.blocks)
    assert bool((prompt.positions[0].diff() >= 0).all())
    times = list(grid_times(sampled.blocks, sampled.pts, 2, None))
    assert times == list(range(sum(run.grids for run in sampled.runs)))
    sizes = {block.grid[1:] for block in sampled.blocks}
    assert len(sizes) == 2


def test_adaptive_sees_a_cut(saved: dict[str, Path]) -> None:
    """Black for eight frames, then white: the first pair and the pair of the cut are of high resolution."""
    frames = [(i / 2, np.full((90, 150, 3), 255 * (i >= 8), np.uint8)) for i in range(12)]
    rule = rule_of(saved["qwen2_vl"], group=4, tokens=24, ratio=4)
    sampled = resize_frames(frames, rule, threshold=0.1, resample=BICUBIC)
    assert [(run.frames, run.high) for run in sampled.runs] == [(2, True), (6, False), (2, True), (2, False)]
    assert sampled.nominal == 24 + 3 * 6 + 24 + 6


@pytest.mark.nano
def test_the_command_watches_a_video_file(saved: dict[str, Path], nano: Any) -> None:
    """A clip of 10 seconds at 1 a second, in groups of 2 pairs: what it costs is said first, and is what was read."""
    clip, model = nano.clips / "bikes.mp4", saved["qwen2_vl"]
    flags = ("--ask", "What?", "--fps", 1, "--hybrid", "2,24,4", "--max-new-tokens", 2)
    done = lvctx("vqa", clip, "--model", model, *flags)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    said = next(line for line in done.stderr.splitlines() if line.endswith("delimiters"))
    cost = [int(word) for word in said.replace(")", "").split() if word.isdigit()]
    frames, runs_, visual, _nominal, delimiters = cost
    assert (row["frames"], delimiters) == (frames, 2 * runs_)
    words = len(mrope_models.tokenizer().encode("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"))
    assert row["tokens"] == visual + delimiters + words
    fails(2, lvctx("vqa", clip, "--model", model, "--ask", "?", "--hybrid", "4,240,7"), "nearest m is 238")


def test_info_shows_what_transformers_computes(saved: dict[str, Path]) -> None:
    facts = json.loads(lvctx("info", saved["qwen2_5_vl"], "--json").stdout)["mrope"]
    assert facts["channels"] == {"time": 16, "height": 24, "width": 24}
    assert facts["largest_relative_error"] < 1e-6
    assert facts["stretched"] == "no"
    table = on_terminal("info", saved["qwen2_5_vl"])
    assert "largest relative error" in table
