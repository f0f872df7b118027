"""Adaptive frame selection: resolution is high where the image changes, in feature caches and in haystacks."""

import json
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from support import mrope_models
from support.mrope_models import Prompt, forward, opinionated
from test_niah import run
from test_prefix import assert_same, plain

from lvctx.artifacts.jsonl_log import read_jsonl
from lvctx.eval.niah.image_needles import ImageNeedle, NeedleSet
from lvctx.eval.niah.video_task import VideoNeedleTask
from lvctx.inference.prefix_scorer import PrefixScorer
from lvctx.models.vlm_assembly import chat_ids
from lvctx.rope.mrope_positions import Text, positions, tokens_per_second
from lvctx.video.hybrid import Hybrid
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.feature_cache import read_feature_cache
from lvctx.vlm.qwen_frames import pixels, resize_frames
from lvctx.vlm.qwen_haystack import QwenHaystack
from lvctx.vlm.registry import open_vlm

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
ADAPTIVE = ("--hybrid", "3,4,2", "--frame-selection", "adaptive")


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One second of black, then one of white, at ten frames per second."""
    out = tmp_path_factory.mktemp("cut") / "cut.mp4"
    sides = [
        part for color in ("black", "white") for part in ("-f", "lavfi", "-i", f"color={color}:s=240x160:r=10:d=1")
    ]
    command = [FFMPEG, "-v", "error", *sides, "-filter_complex", "concat", "-pix_fmt", "yuv420p", str(out)]
    subprocess.run(command, check=True)
    return out


def test_a_feature_cache_has_more_tokens_after_a_cut(cut: Path, tiny_tower: Path, tmp_path: Path) -> None:
    done = run("encode-video", cut, "--tower", tiny_tower, "--fps", 5, *ADAPTIVE, "-o", tmp_path)
    assert done.exit_code == 0, done.stderr
    row = json.loads(done.stdout)
    cache = read_feature_cache(Path(row["path"]))
    assert cache.grid is not None
    assert cache.grid.prod(1).tolist() == [4, 2, 2, 2, 2, 4, 2, 2, 2, 2]
    assert (row["visual_tokens"], row["nominal_tokens"]) == (24, 24)
    assert cache.provenance["config"]["change_threshold"] == 0.1
    blind = run(
        "encode-video", cut, "--tower", tiny_tower, "--fps", 5, *ADAPTIVE, "--change-threshold", 0.5, "-o", tmp_path
    )
    assert (blind.exit_code, "change_threshold: 0.1 -> 0.5" in blind.stderr) == (3, True), blind.stderr
    every = run(
        "encode-video", cut, "--tower", tiny_tower, "--fps", 5, *ADAPTIVE, "--change-threshold", 0, "-o", tmp_path / "0"
    )
    assert every.exit_code == 0, every.stderr
    for flags in (("--frame-selection", "adaptive"), ("--hybrid", "3,4,2", "--change-threshold", 0.2)):
        assert run("encode-video", cut, "--tower", tiny_tower, *flags, "-o", tmp_path).exit_code == 2


@pytest.mark.parametrize(("kind", "mode"), [("qwen2_vl", "pair"), ("qwen2_5_vl", "image")])
def test_a_needle_changes_the_image(kind: str, mode: Any, tmp_path: Path) -> None:
    """Twelve grey frames with a cut and a bright needle: every cell scores like a stock forward of its frames."""
    shots = [np.full((90, 150, 3), 20 + i + 100 * (i >= 6), np.uint8) for i in range(12)]
    (tmp_path / "hay").mkdir()
    for i, shot in enumerate(shots):
        Image.fromarray(shot).save(tmp_path / "hay" / f"{i:02}.png")
    sampling = VideoSampling(
        fps=1.0, hybrid=Hybrid(group=2, tokens=24, ratio=4), hybrid_mode=mode, frame_selection="adaptive"
    )
    vlm = open_vlm(mrope_models.save(kind, tmp_path / "vlm"))
    haystack = vlm.haystack([tmp_path / "hay"], sampling, as_images=False)
    assert isinstance(haystack, QwenHaystack)
    bright = np.full((90, 150, 3), 250, np.uint8)
    needle = ImageNeedle(image=Image.fromarray(bright), question="What?", answer="ab", subject="")
    tokens = haystack.tokens(12, [needle.image])
    tokenizer, model = mrope_models.tokenizer(), opinionated(kind)
    task = VideoNeedleTask(tokenizer, NeedleSet(needles=[needle], distractors=[]), tokens, seconds=haystack.seconds)
    cells = task.cells([8, 12], [0, 0.5, 1], 1)
    for cell in cells:
        task.sequence(cell)  # the table has the frames of all of them
    scorer = PrefixScorer(model, tokens.table(model), chunk=29, positions=tokens.positions)
    unit = 1 if mode == "image" else 2
    for cell in cells:
        ids, answer = task.sequence(cell)
        with_needle = shots[: cell.length]
        with_needle[cell.position : cell.position] = [bright] * unit
        timed = [(float(i), shot) for i, shot in enumerate(with_needle)]
        seen = resize_frames(timed, haystack.rule, threshold=0.1, resample=haystack.vlm.processor.resample)
        assert seen.high[cell.position], "the needle"
        assert sum(seen.high) < len(seen.high)
        before, after = chat_ids(tokenizer, cell.question, mark="<|video_pad|>")
        plain_ids = [*before, *haystack.rule.layout(seen.blocks).ids, *after, *tokenizer.encode(cell.answer)]
        per_second = tokens_per_second(model.config)
        found, _ = positions([Text(len(before) + 1), seen.part(per_second), Text(len(after) + 1 + answer)])
        assert torch.equal(tokens.positions(ids, 0)[:, 0], found)
        prompt = Prompt(ids=plain_ids, positions=found, pixels=pixels(seen, haystack.vlm.processor))
        with torch.inference_mode():
            stock = plain(forward(model, prompt).logits[0], np.array(plain_ids), answer)
        assert_same(scorer.score(ids, answer), stock)


def test_the_command_selects_adaptively_in_a_haystack(cut: Path, tmp_path: Path) -> None:
    vlm = mrope_models.save("qwen2_vl", tmp_path / "vlm")
    flags = ("niah", "video", "--model", vlm, "--haystack", cut, "--fps", 5, "--lengths", 8, "--depths", "0.5")
    flags += ("--trials", 1, "--hybrid", "4,24,4")
    done = run(*flags, "--frame-selection", "adaptive", "-o", tmp_path / "adaptive")
    assert done.exit_code == 0, done.stderr
    assert run(*flags, "-o", tmp_path / "group").exit_code == 0
    (adaptive,), (group,) = (read_jsonl(tmp_path / name / "results.jsonl") for name in ("adaptive", "group"))
    assert adaptive["visual"]["change_threshold"] == 0.1
    assert "change_threshold" not in group["visual"]
    assert adaptive["run"] != group["run"]
    # Pairs are black, black, needle, black, white: of the first and of each change; in groups the first and the fifth.
    assert adaptive["tokens"] > group["tokens"]
