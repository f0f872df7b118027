"""UniRes: an image as a grid of square tiles, which a model encodes like the frames of a video (LongVA section 3.2).

Two rules, because the paper's text and the released code differ:

- `paper`: (width // tile) x (height // tile) tiles, at most `max_grids`; larger images are resized down first.
- `code`: of all w x h with w * h <= `max_grids`, except 1 x 1, the one that keeps most of the image's resolution, then
  the one that wastes least, then the first in the order of w, then h. The image keeps its aspect, centred on black.

Both give tiles row by row, without base image and without newline tokens.
"""

import math
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, get_args

from PIL import Image

from lvctx.errors import InputError

GridRule = Literal["code", "paper"]
MAX_GRIDS = 49
"""LongVA section 3.2."""


MaxGrids = int | tuple[tuple[int, int], ...]
"""The grids allowed for an image: all with up to this many tiles, or only the listed (columns, rows)."""


def image_max_grids(config: Any) -> MaxGrids:
    """The UniRes grids that a VLM's configuration allows for an image; up to LongVA's 49 tiles by default.

    `image_max_grids` is a number; `image_grids` lists the grids of an imported model with a list of its own. Raises
    InputError for other values.
    """
    grids, most = getattr(config, "image_grids", None), getattr(config, "image_max_grids", MAX_GRIDS)
    if grids is not None:
        pairs = grids if isinstance(grids, list) and grids else [None]
        if not all(isinstance(p, list | tuple) and len(p) == 2 and all(_is_count(n) for n in p) for p in pairs):
            raise InputError(f"config.json has image_grids {str(grids)[:80]}", fix="a list of [columns, rows]")
        return tuple((p[0], p[1]) for p in grids)
    if not _is_count(most):
        raise InputError(f"config.json has image_max_grids {most!r}", fix="a number of at least 1")
    return int(most)


def set_image_max_grids(config: Any, grids: MaxGrids) -> None:
    """Write them into a VLM's configuration, for `image_max_grids` to read."""
    if isinstance(grids, int):
        config.image_max_grids = grids
        if hasattr(config, "image_grids"):
            config.image_grids = None
    else:
        config.image_grids = [list(grid) for grid in grids]


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 10_000


def unires_grid(
    width: int, height: int, *, tile: int, rule: GridRule = "code", max_grids: MaxGrids = MAX_GRIDS
) -> tuple[int, int]:
    """Columns and rows of tiles for an image of `width` x `height` pixels: 640 x 480 at tile 336 gives (2, 2)."""
    assert rule in get_args(GridRule)
    assert min(width, height, tile) > 0
    if rule == "code":
        return best_grid(width, height, tile, grids_up_to(max_grids) if isinstance(max_grids, int) else max_grids)
    most = max_grids if isinstance(max_grids, int) else max(map(math.prod, max_grids))
    return _grid_of_paper(width, height, tile, most)


@cache
def grids_up_to(max_grids: int) -> list[tuple[int, int]]:
    """The released code's grids (columns, rows) of at most this many tiles, in its order."""
    return [(w, h) for w in range(1, max_grids + 1) for h in range(1, max_grids // w + 1) if w * h > 1] or [(1, 1)]


def best_grid(width: int, height: int, tile: int, grids: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The grid (columns, rows) that keeps most of the image, then wastes least, then is listed first."""

    def kept_and_wasted(grid: tuple[int, int]) -> tuple[int, int]:
        # Floating point and truncation as in the released code, so that ties are the same.
        across, down = grid[0] * tile, grid[1] * tile
        scale = min(across / width, down / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return -kept, across * down - kept

    return min(grids, key=kept_and_wasted)


def _grid_of_paper(width: int, height: int, tile: int, max_grids: int) -> tuple[int, int]:
    grid = max(1, width // tile), max(1, height // tile)
    if grid[0] * grid[1] <= max_grids:
        return grid
    # Shrinking removes a column or row when a side falls below a multiple of the tile; the largest such grid is taken.
    by_columns = [(w, max(1, w * height // width)) for w in range(1, min(grid[0], max_grids) + 1)]
    by_rows = [(max(1, h * width // height), h) for h in range(1, min(grid[1], max_grids) + 1)]
    return max((g for g in by_columns + by_rows if g[0] * g[1] <= max_grids), key=math.prod)


def unires_tiles(
    image: Image.Image, tile: int, rule: GridRule = "code", *, max_grids: MaxGrids = MAX_GRIDS
) -> list[Image.Image]:
    """The image's tiles of `tile` x `tile` pixels (RGB), row by row; their number is the product of `unires_grid`.

    Resampling is bicubic. `code` keeps the aspect and pads with black; `paper` resizes both sides to the tiles, so that
    nothing is cut off at the edges.
    """
    columns, rows = unires_grid(*image.size, tile=tile, rule=rule, max_grids=max_grids)
    if rule == "paper":
        return _cut(image.resize((columns * tile, rows * tile), Image.Resampling.BICUBIC), tile)
    return fit_tiles(image, tile, columns, rows)


def fit_tiles(image: Image.Image, tile: int, columns: int, rows: int) -> list[Image.Image]:
    """Tiles of the image, aspect kept, centred on a black canvas of this many: row by row, bicubic."""
    canvas = Image.new("RGB", (columns * tile, rows * tile))
    fitted = image.resize(_fit(*image.size, *canvas.size), Image.Resampling.BICUBIC)
    canvas.paste(fitted, ((canvas.width - fitted.width) // 2, (canvas.height - fitted.height) // 2))
    return _cut(canvas, tile)


def _cut(canvas: Image.Image, tile: int) -> list[Image.Image]:
    across, down = range(0, canvas.width, tile), range(0, canvas.height, tile)
    return [canvas.crop((x, y, x + tile, y + tile)) for y in down for x in across]


def _fit(width: int, height: int, across: int, down: int) -> tuple[int, int]:
    """The largest size of this aspect ratio inside `across` x `down`; the free side is rounded up."""
    scale_x, scale_y = across / width, down / height
    if scale_x < scale_y:
        return across, min(math.ceil(height * scale_x), down)
    return min(math.ceil(width * scale_y), across), down
