"""Redistributable haystacks: the same pixels everywhere, streamed to a tower, checked against their hashes."""

import importlib
import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.eval.niah.haystack import HaystackConfig, hash_frame, haystack_frames
from lvctx.video.drawn_scenes import _Dice, _lattice, _noise, scene
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_the_hash_is_splitmix64() -> None:
    """The first numbers of seed 0 as its authors' reference program prints them."""
    dice = _Dice()
    assert [dice._next() for _ in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


PINNED = {
    (0, 48): {0: "69520d8451f4c703", 1: "bebf568b0fb9259a", 29: "cee3cd3969f66f04", 60: "353c52f918b7f5f8"},
    (1, 336): {0: "a79cb842ede43606", 1: "0477daef8a605326"},
}
"""(seed, side) -> frame -> hash of its pixels. What two places compare; to change them is to raise scenes.VERSION."""


@pytest.mark.parametrize(("seed", "side"), PINNED)
def test_pixels_are_pinned(seed: int, side: int) -> None:
    pinned = PINNED[seed, side]
    frames = list(haystack_frames(HaystackConfig(frames=max(pinned) + 1, seed=seed, side=side)))
    assert {i: hash_frame(frames[i]) for i in pinned} == pinned
    assert len({hash_frame(f) for f in frames}) == len(frames)


@settings(deadline=None, max_examples=30)
@given(y=st.integers(-999, 999), x=st.integers(-999, 999), cell=st.sampled_from([1, 4, 32]), dy=st.integers(0, 20))
def test_a_pan_moves_only_the_window(y: int, x: int, cell: int, dy: int) -> None:
    whole = _noise(7, y, x, 40, 30, cell)
    assert (_noise(7, y + dy, x + 9, 40 - dy, 21, cell) == whole[dy:, 9:]).all()
    assert whole.min() >= 0
    assert whole.max() <= 255
    # At the points of its grid noise is the hash itself.
    rows, columns = np.array([-1, 0, 1]), np.array([0, 2])
    at = _noise(7, -cell, 0, 2 * cell + 1, 2 * cell + 1, cell)[np.ix_([0, cell, 2 * cell], [0, 2 * cell])]
    assert (at == (_lattice(7, rows, columns) & np.uint64(255)).astype(int)).all()


def test_a_video_moves_and_is_cut(nano: Any) -> None:
    frames = [frame.astype(int) for frame in islice(scene(2, 0, 64), 9)]
    within = [abs(a - b).mean() for a, b in pairwise(frames)]
    assert min(within) > 1  # nothing stands still
    first = sum(1 for _ in scene(2, 0, 16))
    assert 4 <= first <= 40
    config = HaystackConfig(frames=60, seed=2, side=64, clips=(nano.clips / "bikes.mp4",))
    shapes = [frame.shape for frame in haystack_frames(config)]
    # One scene, then the clip's ten seconds, then scenes again.
    assert shapes[:first] == [(64, 64, 3)] * first
    assert shapes[first : first + 10] == [(272, 640, 3)] * 10
    assert shapes[first + 10 :] == [(64, 64, 3)] * (50 - first)


def test_artifact_images_and_a_needle_in_them(tiny_lm: Path, tiny_tower: Path, tmp_path: Path) -> None:
    base = ["niah", "haystack", "--frames", 12, "--side", 48, "--seed", 3]
    artifact = tmp_path / "hay.frames.safetensors"
    done = run(*base, "--model", tiny_tower, "--batch", 5, "-o", artifact)
    assert done.exit_code == 0
    row = json.loads(done.stdout)
    hashes = (tmp_path / "hay.pixels.txt").read_text().split()
    assert (row["frames"], len(hashes), row["schema"]) == (12, 12, "lvctx.frames/1")
    before = artifact.stat().st_mtime_ns
    assert run(*base, "--model", tiny_tower, "--batch", 5, "-o", artifact).stdout == done.stdout
    assert artifact.stat().st_mtime_ns == before

    assert run(*base, "-o", tmp_path / "pictures", "--pixels", tmp_path / "hay.pixels.txt").exit_code == 0
    pictures = sorted((tmp_path / "pictures").glob("*.png"))
    assert [hash_frame(np.asarray(Image.open(p))) for p in pictures] == hashes

    from lvctx.models.vision_encoder import load_tower
    from lvctx.vlm.feature_cache import read_feature_cache

    frames = read_feature_cache(artifact)
    assert frames.pts.tolist() == list(range(12))
    dtype = getattr(torch, frames.provenance["config"]["dtype"])
    seen = load_tower(tiny_tower, dtype=dtype).encode_images(
        np.stack([np.asarray(Image.open(p)) for p in pictures[:5]]), batch=5
    )
    assert (frames.features[:5] == seen.bfloat16()).all()  # 48 pixels are the tower's own side: squares as they are


def test_other_pixels_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    base = ["niah", "haystack", "--frames", 6, "--side", 32]
    assert run(*base, "-o", tmp_path / "a").exit_code == 0
    pinned = tmp_path / "a.pixels.txt"
    refused = run(*base, "--seed", 1, "--pixels", pinned, "-o", tmp_path / "b.mp4")
    assert (refused.exit_code, refused.stderr.count("\n")) == (3, 1)
    assert "frame 0 has other pixels" in refused.stderr
    assert not (tmp_path / "b.mp4").exists()
    assert run(*base, "-o", tmp_path / "x.frames.safetensors").exit_code == 2
    assert run(*base, "--seed", 1, "-o", tmp_path / "a").exit_code == 3
    assert run(*base, "--pixels", pinned, "-o", tmp_path / "c.mp4").exit_code == 0
    assert (tmp_path / "c.pixels.txt").read_text() == pinned.read_text()


def test_videos_of_questions_for_the_number_of_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image is on display from `first` on for `shown` seconds, and on no other; answers are counted by hand."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "recipes" / "nano"))
    drawn = importlib.import_module("draw_videos")
    monkeypatch.setattr(drawn, "SECONDS", 12)
    monkeypatch.setattr(drawn, "SHOWN", (4,))
    row = drawn.draw_video(tmp_path, 0, 0)
    frames = [frame.image.astype(int) for frame in read_video(Path(row["path"]), VideoSampling(fps=1))]
    inside = set(range(row["first"], row["first"] + 4))
    distance = [np.abs(frame - frames[row["first"]]).mean() for frame in frames]
    assert len(frames) == 12
    assert {second for second in range(12) if distance[second] < 5} == inside

    answers = [
        {"answer": "Red.", "expected": "red", "first": 3, "shown": 2, "pts": [0.0, 4.0], "frames": 2, "tokens": 99},
        {"answer": "blue", "expected": "red", "first": 3, "shown": 2, "pts": [0.0, 5.0], "frames": 2, "tokens": 98},
    ]
    for name, rows in (("b", answers), ("a", [{**row, "frames": 3, "tokens": 1200} for row in answers[:1]])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(drawn.tables([tmp_path / "a", tmp_path / "b"])) == [
        "   2 frames,     99 tokens:   1 of 2 right (0.09 to 0.91), 1 have the image among their frames",
        "   3 frames,  1,200 tokens:   1 of 1 right (0.21 to 1.00), 1 have the image among their frames",
    ]
