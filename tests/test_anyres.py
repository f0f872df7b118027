"""AnyRes against stock transformers: the grid, the tiles, the number of tokens and their order, at any size."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from lvctx.vlm.anyres import (
    anyres_flatten,
    anyres_grid,
    anyres_map,
    anyres_pinpoints,
    anyres_tiles,
    anyres_tokens,
    single_tiles,
)

SIDES = st.integers(1, 20_000)


@pytest.mark.parametrize(
    ("size", "grid", "tokens"),
    [
        # Tokens by hand: 24 features a side, rows left after cutting the padding, one newline a row, 576 for the base.
        ((336, 336), (2, 1), 576 + 24 * (24 + 1)),
        ((640, 480), (2, 2), 576 + 36 * (48 + 1)),
        ((672, 672), (2, 2), 576 + 48 * (48 + 1)),
        ((1920, 1080), (2, 2), 576 + 28 * (48 + 1)),
        ((2000, 500), (3, 1), 576 + 18 * (72 + 1)),
        ((300, 1200), (1, 3), 576 + 72 * (18 + 1)),
    ],
)
def test_known_images(size: tuple[int, int], grid: tuple[int, int], tokens: int) -> None:
    assert anyres_grid(*size, tile=336) == grid
    assert anyres_tokens(*size, tile=336, side=24) == tokens


@given(SIDES, SIDES, st.sampled_from([96, 336, 384]))
@settings(max_examples=200, deadline=None)
def test_the_grid_is_transformers(width: int, height: int, tile: int) -> None:
    columns, rows = anyres_grid(width, height, tile=tile)
    assert select_best_resolution((height, width), anyres_pinpoints(tile)) == (rows * tile, columns * tile)


@given(SIDES, SIDES, st.sampled_from([4, 8, 24]))
@settings(max_examples=100, deadline=None)
def test_tokens_and_their_order_are_transformers(width: int, height: int, side: int) -> None:
    tile = 14 * side
    columns, rows = anyres_grid(width, height, tile=tile)
    count = (1 + columns * rows) * side * side
    feats_GPD = torch.arange(2.0 * count).reshape(1 + columns * rows, side * side, 2)
    newline = torch.tensor([-1.0, -2.0])
    vision = SimpleNamespace(image_size=tile, patch_size=14)
    stock = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=anyres_pinpoints(tile)),
    )
    sizes = torch.tensor([[height, width]])
    if 0 in anyres_map(width, height, tile=tile, side=side):
        assert max(width, height) >= side * min(width, height), "only of a strip nothing is left"
    (theirs,), lengths = LlavaOnevisionModel.pack_image_features(stock, [feats_GPD], sizes, newline, "anyres_max_4")
    ours = anyres_flatten(feats_GPD, newline, width, height, tile=tile)
    assert torch.equal(ours, theirs)
    assert anyres_tokens(width, height, tile=tile, side=side) == len(ours) == int(lengths[0])


@pytest.mark.parametrize("size", [(90, 161), (161, 90), (20, 30), (200, 200), (400, 60)])
def test_tiles_are_llava_nexts(size: tuple[int, int]) -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    stock = LlavaNextImageProcessorPil(
        size={"height": 48, "width": 48},
        crop_size={"height": 48, "width": 48},
        image_grid_pinpoints=anyres_pinpoints(48),
        do_rescale=False,
        do_normalize=False,
    )
    theirs = stock(noise, return_tensors="np")["pixel_values"][0].transpose(0, 2, 3, 1)
    ours = np.stack([np.asarray(tile) for tile in anyres_tiles(noise, 48)])
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (20_000, 200)])
def test_extreme_sizes_cost_no_memory(size: tuple[int, int]) -> None:
    tiles = anyres_tiles(Image.new("RGB", size), 336)
    assert len(tiles) == 1 + math.prod(anyres_grid(*size, tile=336)) <= 5
    assert {tile.size for tile in tiles} == {(336, 336)}


def test_one_grid() -> None:
    image = Image.new("RGB", (100, 40), (9, 9, 9))
    (tile,) = single_tiles(image, 48, "pad", (1, 2, 3))
    assert tile.size == (48, 48)
    assert tile.getpixel((24, 0)) == (1, 2, 3)
    assert tile.getpixel((24, 24)) == (9, 9, 9)
