"""Hybrid resolution of a tower's frames: counts are known first, are recorded, and equal pooling by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import mrope_models
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.errors import InputError
from lvctx.models.loading import load_model
from lvctx.models.vision_encoder import load_tower
from lvctx.models.vlm_assembly import embed_frames, newline_embedding
from lvctx.video.drawn_images import draw_image
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.feature_cache import read_feature_cache
from lvctx.vlm.llava_onevision import FrameRows, LlavaOnevision
from lvctx.vlm.token_count import pooling


def lvctx(*args: object) -> tuple[int, list[dict[str, Any]], str]:
    done = CliRunner().invoke(app, [*map(str, args)])
    assert "Traceback" not in done.stderr
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def encoded(tiny_vlm: Path, nano: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Ten frames, uniform and with (L, m, s) = (3, 4, 2): 4 x 4 features become 2 x 2 or 1 x 2 tokens."""
    out, clip = tmp_path_factory.mktemp("hybrid"), nano.clips / "bikes.mp4"
    found: dict[str, Any] = {"clip": clip}
    for name, more in (("plain", ()), ("same", ("--hybrid", "1,4,1")), ("mixed", ("--hybrid", "3,4,2"))):
        code, rows, said = lvctx("encode-video", clip, "--model", tiny_vlm, "--frames", 10, "-o", out / name, *more)
        assert code == 0, said
        found[name], found[f"{name} row"], found[f"{name} said"] = Path(rows[0]["path"]), rows[0], said
    return found


HIGH = [i % 3 == 0 for i in range(10)]
TOKENS = 4 * 4 + 6 * 2


def test_counts_come_first_and_stay_in_the_artifact(encoded: dict[str, Any]) -> None:
    assert f"10 frames, {TOKENS} visual tokens (nominal {TOKENS})" in encoded["mixed said"]
    row = encoded["mixed row"]
    assert (row["visual_tokens"], row["nominal_tokens"], row["tokens_per_frame"]) == (TOKENS, TOKENS, TOKENS / 10)
    mixed, plain = read_feature_cache(encoded["mixed"]), read_feature_cache(encoded["plain"])
    assert mixed.provenance["schema"] == row["schema"] == "lvctx.frames/2"
    assert mixed.provenance["config"]["hybrid"] == [3, 4, 2]
    assert mixed.grid is not None
    assert mixed.grid.tolist() == [[2, 2] if high else [1, 2] for high in HIGH]
    assert torch.equal(mixed.features, plain.features), "pooling comes after the projector"


def test_uniform_artifacts_are_what_they_were(encoded: dict[str, Any]) -> None:
    assert encoded["same"].read_bytes() == encoded["plain"].read_bytes()
    plain = read_feature_cache(encoded["plain"])
    assert plain.grid is None
    assert plain.provenance["schema"] == "lvctx.frames/1"
    assert "hybrid" not in plain.provenance["config"]


def test_clip_at_336_pools_to_exactly_a_third() -> None:
    """24 x 24 features, pooled (4, 3) instead of 2 x 2: 48 tokens instead of 144."""
    assert pooling(24, 3) == (4, 3)
    assert (24 // 4) * (24 // 3) * 3 == 12 * 12


@pytest.mark.parametrize(("hybrid", "words"), [("3,5,2", "m is 4"), ("3,4,3", "cannot be pooled"), ("3,4", "L,M,S")])
def test_what_the_tower_cannot_do_is_refused(
    hybrid: str, words: str, tiny_vlm: Path, encoded: dict[str, Any], tmp_path: Path
) -> None:
    code, _, said = lvctx("encode-video", encoded["clip"], "--model", tiny_vlm, "--hybrid", hybrid, "-o", tmp_path)
    assert (code, words in said) == (2, True), said


def by_hand(vlm: Any, features_FPD: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
    """Means over rectangles of projected features, in float64, one at a time."""
    rows = []
    for frame, (down, across) in zip(features_FPD, grids, strict=True):
        map_HWE = vlm.model.multi_modal_projector(frame.float()).double().view(4, 4, -1)
        for r in np.split(np.arange(4), down):
            rows += [map_HWE[r][:, c].mean((0, 1)) for c in np.split(np.arange(4), across)]
    return torch.stack(rows)


def test_frames_are_means_over_rectangles(tiny_vlm: Path) -> None:
    vlm = load_model(tiny_vlm)
    torch.manual_seed(0)
    features = torch.randn(5, 16, 32)
    grids = [(2, 2), (1, 2), (4, 4), (2, 1), (1, 2)]
    with torch.no_grad():
        found = embed_frames(vlm, features, torch.tensor(grids))
        expected = by_hand(vlm, features, grids)
        uniform = embed_frames(vlm, features, torch.tensor([(2, 2)] * 5))
        torch.testing.assert_close(uniform, embed_frames(vlm, features), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(InputError, match="3 x 2"):
        embed_frames(vlm, features, torch.tensor([(3, 2)] * 5))


def test_what_is_inserted_has_the_resolution_of_its_place() -> None:
    """Pictures 0 to 4 are the haystack's, 10 to 13 rows a frame; 5 and 6 are inserted, each once at 4 and once at 2."""
    tokens = [4, 2, 2, 4, 2]
    layout = FrameRows(vocabulary=100, tokens=tokens, sizes=[4, 2], inserted=2)
    starts = np.cumsum([0, *tokens])
    rows = {i: list(range(starts[i], starts[i + 1])) for i in range(5)}
    fifth, sixth = {4: [14, 15, 16, 17], 2: [18, 19]}, {4: [20, 21, 22, 23], 2: [24, 25]}
    for frame_order, expected in (
        ([0, 5, 1, 2, 3, 4], [rows[0], fifth[2], rows[1], rows[2], rows[3], rows[4]]),
        ([5, 0, 1, 6, 2], [fifth[4], rows[0], rows[1], sixth[2], rows[2]]),
        ([0, 1, 2, 6, 5, 3], [rows[0], rows[1], rows[2], sixth[4], fifth[4], rows[3]]),
        ([0, 1, 5], [rows[0], rows[1], fifth[2]]),
        ([3, 4, 0, 1, 6], [rows[3], rows[4], rows[0], rows[1], sixth[2]]),
    ):
        found = layout.ids(np.array(frame_order)) - 100
        assert found.tolist() == [n for part in expected for n in part] + [26]
    even = FrameRows(vocabulary=7, tokens=[3] * 4, sizes=[3], inserted=2)
    order = [0, 4, 1, 5, 2]
    assert even.ids(np.array(order)).tolist() == [7 + 3 * n + i for n in order for i in range(3)] + [7 + 6 * 3]


def test_the_needle_tests_table_is_what_its_ids_mean(tiny_vlm: Path, encoded: dict[str, Any]) -> None:
    """Artifacts of both kinds, one after the other: every id looks up the token worked out by hand."""
    haystack = LlavaOnevision(tiny_vlm).haystack([encoded["mixed"], encoded["plain"]], VideoSampling(), as_images=False)
    vlm = load_model(tiny_vlm)
    picture = draw_image(np.random.default_rng(0), size=48, shape="star", color="red")
    frames, inserted = 13, [picture, picture.rotate(90)]
    with torch.no_grad():
        tokens = haystack.tokens(frames, inserted)
        table = tokens.table(vlm)
        tower = load_tower(tiny_vlm, dtype=vlm.dtype)
        seen = tower.encode_images([tower.preprocess.square(image, "crop") for image in inserted])
        features = torch.cat(
            [read_feature_cache(encoded["mixed"]).features, read_feature_cache(encoded["plain"]).features]
        )[:frames]
        grids = [(2, 2) if i >= 10 or HIGH[i] else (1, 2) for i in range(frames)]
        order = [*range(4), 14, *range(4, 12), 13, 12]
        assert [order[at + 1] for at in (4, 13)] == [4, 12]
        shown = [features[n] if n < frames else seen[n - frames] for n in order]
        sizes = [grids[n] if n < frames else grids[order[i + 1]] for i, n in enumerate(order)]
        expected = torch.cat([by_hand(vlm, torch.stack(shown), sizes).float(), newline_embedding(vlm)])
    found = table[tokens.ids(np.array(order)) - haystack.vlm.vocabulary]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_vqa_and_niah_read_them(tiny_vlm: Path, encoded: dict[str, Any], tmp_path: Path) -> None:
    read = {}
    for name in ("plain", "mixed"):
        options = ("--model", tiny_vlm, "--ask", "Why?", "--max-new-tokens", 1)
        code, rows, said = lvctx("vqa", encoded[name], *options)
        assert code == 0, said
        read[name] = rows[0]["tokens"]
    assert read["plain"] - read["mixed"] == 10 * 4 - TOKENS
    grid = ("--lengths", "3,10", "--depths", "0,0.5,1", "--trials", 1)
    code, rows, said = lvctx(
        "niah", "video", "--model", tiny_vlm, "--haystack", encoded["mixed"], *grid, "-o", tmp_path / "niah"
    )
    assert code == 0, said
    assert len(rows) == 6
    assert not any("error" in row for row in rows)


def test_a_newline_after_every_frame(tiny_vlm: Path, encoded: dict[str, Any]) -> None:
    """LLaVA-NeXT's mm_newline_position `frame`: a column of newlines is appended to the frames' tokens (F, P, E)."""
    vlm, each = load_model(tiny_vlm), VideoSampling(frame_separator="newline")
    ours = LlavaOnevision(tiny_vlm)

    def rows(visual: Any, ids_N: np.ndarray) -> torch.Tensor:
        return visual.table(vlm)[ids_N - ours.vocabulary]

    with torch.no_grad():
        newline_1E = newline_embedding(vlm)
        frames_FPE = embed_frames(vlm, read_feature_cache(encoded["plain"]).features).view(10, 4, -1)
        columned = torch.cat([frames_FPE, newline_1E.expand(10, 1, -1)], 1)
        once, often = (ours.load([encoded["plain"]], sampling) for sampling in (VideoSampling(), each))
        assert torch.equal(rows(once, once.ids_N), torch.cat([frames_FPE.flatten(0, 1), newline_1E]))
        assert torch.equal(rows(often, often.ids_N), columned.flatten(0, 1))
        assert once.tokens == often.tokens == often.facts["visual_tokens"] == 40

        mixed = ours.load([encoded["mixed"], encoded["plain"]], each)
        sizes = [4 if high else 2 for high in HIGH] + [4] * 10
        found = rows(mixed, mixed.ids_N)
        is_newline = (found == newline_1E).all(1)
        assert np.flatnonzero(is_newline).tolist() == (np.cumsum(sizes) + np.arange(20)).tolist()
        both = torch.cat([rows(x, x.ids_N) for x in (ours.load([encoded[n]], each) for n in ("mixed", "plain"))])
        assert torch.equal(found, both)

        image = draw_image(np.random.default_rng(0), size=48, shape="star", color="red")
        hay = {
            s: ours.haystack([encoded["plain"]], s, as_images=False).tokens(10, [image])
            for s in (VideoSampling(), each)
        }
        order = np.array([2, 10, 7])
        once_N, often_N = (rows(tokens, tokens.ids(order)) for tokens in hay.values())
        expected = torch.cat([once_N[:-1].view(3, 4, -1), newline_1E.expand(3, 1, -1)], 1).flatten(0, 1)
        assert torch.equal(often_N, expected)
    assert [tokens.facts.get("frame_separator") for tokens in hay.values()] == [None, "newline"]
    count = ours.count(10, 48, 48, each)
    assert (count["actual"], count["delimiters"], count["last_position"]) == (40, 10, 49)


def test_a_separator_is_a_runs_own_and_no_ones_else(tiny_vlm: Path, encoded: dict[str, Any], tmp_path: Path) -> None:
    asked = ("vqa", encoded["plain"], "--model", tiny_vlm, "--ask", "Why?", "--max-new-tokens", 1)
    tokens = [lvctx(*asked, *more)[1][0]["tokens"] for more in ((), ("--frame-separator", "newline"))]
    assert tokens[1] - tokens[0] == 9
    grid = ("--lengths", 4, "--depths", "0.5", "--trials", 1, "-o", tmp_path / "niah")
    needles = ("niah", "video", "--model", tiny_vlm, "--haystack", encoded["plain"], *grid)
    assert lvctx(*needles)[0] == 0
    code, _, said = lvctx(*needles, "--frame-separator", "newline")
    assert (code, "another run" in said) == (3, True), said
    qwen = mrope_models.save("qwen2_vl", tmp_path / "qwen")
    for refused in (
        ("encode-video", encoded["clip"], "--model", tiny_vlm, "-o", tmp_path),
        ("vqa", encoded["clip"], "--model", qwen, "--ask", "Why?"),
    ):
        code, _, said = lvctx(*refused, "--frame-separator", "newline")
        assert (code, "--frame-separator" in said) == (2, True), said
