"""AnyRes as in LLaVA-NeXT, UniRes's ablation in LongVA (appendix B, figure 8); and one grid as in LLaVA-1.5.

AnyRes encodes a small base image first, then at most 4 grids whose features are joined into one map: rows cross the
borders of the grids, features of the padding are removed, and every row ends with a newline token. There is no pooling.

    base_P, row_0, newline, row_1, newline, ...         tokens: P + rows * (columns + 1)

This is what stock LlavaOnevision does with images, given `image_grid_pinpoints` of `anyres_pinpoints` and
`vision_aspect_ratio` "anyres_max_4", with which it never interpolates.

Suffixes: G tiles (base first), P features a tile, D width, T tokens.
"""

import torch
from PIL import Image
from torch import Tensor

from lvctx.models.unires import best_grid, fit_tiles
from lvctx.video.squares import FrameMode, square

GRIDS = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
"""Allowed columns and rows, in the order that decides ties: LLaVA-NeXT's 336 x 672 ... (height x width)."""


def anyres_pinpoints(tile: int) -> list[list[int]]:
    """`image_grid_pinpoints` of a stock configuration: [height, width] in pixels of every grid."""
    return [[rows * tile, columns * tile] for columns, rows in GRIDS]


def anyres_grid(width: int, height: int, *, tile: int) -> tuple[int, int]:
    """Columns and rows of tiles for an image of `width` x `height` pixels, excluding the base."""
    return best_grid(width, height, tile, GRIDS)


def anyres_tiles(image: Image.Image, tile: int) -> list[Image.Image]:
    """The base (both sides resized) and then the tiles, row by row: RGB, `tile` x `tile` pixels, bicubic."""
    base = image.resize((tile, tile), Image.Resampling.BICUBIC)
    return [base, *fit_tiles(image, tile, *anyres_grid(*image.size, tile=tile))]


def anyres_map(width: int, height: int, *, tile: int, side: int) -> tuple[int, int]:
    """Rows and columns of features without the padding; `side` features along a tile."""
    columns, rows = anyres_grid(width, height, tile=tile)
    across, down = columns * side, rows * side
    # Both ends are cut equally, with the rounding of the released code: half a feature may be kept or cut.
    if width / height > across / down:
        down -= (down - int(round(height * (across / width), 7))) // 2 * 2
    else:
        across -= (across - int(round(width * (down / height), 7))) // 2 * 2
    return down, across


def anyres_tokens(width: int, height: int, *, tile: int, side: int) -> int:
    """Tokens of an image, including base and newlines: 640 x 480 at tile 336 and side 24 has 576 + 36 * (48 + 1)."""
    rows, columns = anyres_map(width, height, tile=tile, side=side)
    return side * side + rows * (columns + 1)


def anyres_flatten(feats_GPD: Tensor, newline_D: Tensor, width: int, height: int, *, tile: int) -> Tensor:
    """Projected features of `anyres_tiles` in the language model's order: (T, D)."""
    side = round(feats_GPD.shape[1] ** 0.5)
    columns, rows = anyres_grid(width, height, tile=tile)
    left, top = columns * side, rows * side
    map_HWD = feats_GPD[1:].reshape(rows, columns, side, side, -1).transpose(1, 2).reshape(top, left, -1)
    down, across = anyres_map(width, height, tile=tile, side=side)
    top, left = (top - down) // 2, (left - across) // 2
    map_HWD = map_HWD[top : top + down, left : left + across]
    ends_H1D = newline_D.to(map_HWD).expand(down, 1, -1)
    return torch.cat([feats_GPD[0], torch.cat([map_HWD, ends_H1D], 1).flatten(0, 1)])


def single_tiles(image: Image.Image, tile: int, mode: FrameMode, background: tuple[int, int, int]) -> list[Image.Image]:
    """A single grid: the image as a square, with its P features in row order."""
    return [square(image, tile, mode, background)]
