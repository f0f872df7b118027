"""How images are encoded in training: UniRes (LongVA section 3.2), AnyRes (its ablation, appendix B) or one grid.

`unires`: grids like a video's frames, each pooled 2x2, then one newline. `anyres`: a base image and at most 4 grids,
not pooled, with a newline per row; an image among several is one grid, padded to a square, then one newline, as in
stock LlavaOnevision. `single`: one grid, padded to a square and pooled like a frame, then one newline.
`single-unpooled`: one grid, cropped to a square and not pooled, then one newline: LLaVA's first stage.
A video frame is always one pooled grid.

Shapes: G tiles, P features a tile, D tower width, N visual tokens, E language-model width.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from lvctx.models.image_processing import Preprocess, image_size
from lvctx.models.unires import (
    MAX_GRIDS,
    GridRule,
    MaxGrids,
    image_max_grids,
    set_image_max_grids,
    unires_grid,
    unires_tiles,
)
from lvctx.models.vlm_assembly import ImageGrid, embed_frames, frame_features, image_grid, image_rule
from lvctx.video.squares import FrameMode
from lvctx.vlm.anyres import anyres_flatten, anyres_pinpoints, anyres_tiles, anyres_tokens, single_tiles


@dataclass(frozen=True, kw_only=True)
class ImageEncoding:
    """The tiles of an image, and their number of tokens."""

    grid: ImageGrid
    """One of these encodings."""
    rule: GridRule
    """The UniRes rule of the released code or of the paper."""
    max_grids: MaxGrids = MAX_GRIDS
    """Maximum number of UniRes grids per image, or the allowed grids."""
    tile: int
    """Pixels of a tower's side: 336 for CLIP ViT-L/14-336."""
    side: int
    """Features along a tile's side: 24."""

    @classmethod
    def of(cls, vision_config: Any, *, grid: ImageGrid, rule: GridRule, max_grids: MaxGrids = MAX_GRIDS) -> Self:
        """The encoding for a tower's configuration."""
        tile = vision_config.image_size
        return cls(grid=grid, rule=rule, max_grids=max_grids, tile=tile, side=tile // vision_config.patch_size)

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """The encoding that `write_to` wrote into a VLM's configuration. Raises InputError for an unknown one."""
        rule, max_grids = image_rule(config), image_max_grids(config)
        return cls.of(config.vision_config, grid=image_grid(config), rule=rule, max_grids=max_grids)

    def tokens(self, image: Path, *, alone: bool) -> int:
        """Tokens of an image's block, newlines included, from the file's header; `alone`: the sample's only image."""
        return self.tokens_of(*image_size(image), alone=alone)

    def tokens_of(self, width: int, height: int, *, alone: bool) -> int:
        """The same for an image of this size in pixels."""
        if self.grid == "single-unpooled" or (self.grid == "anyres" and not alone):
            return self.side**2 + 1
        if self.grid == "anyres":
            return anyres_tokens(width, height, tile=self.tile, side=self.side)
        tiles = 1
        if self.grid == "unires":
            tiles = math.prod(unires_grid(width, height, tile=self.tile, rule=self.rule, max_grids=self.max_grids))
        return tiles * math.ceil(self.side / 2) ** 2 + 1

    def video_tokens(self, frames: int) -> int:
        """Tokens of a video's block of this many frames, the newline included."""
        return frames * math.ceil(self.side / 2) ** 2 + 1

    def tiles(self, image: Image.Image, *, alone: bool, background: tuple[int, int, int]) -> list[Image.Image]:
        """The square tiles for the tower."""
        if self.grid == "unires":
            return unires_tiles(image, tile=self.tile, rule=self.rule, max_grids=self.max_grids)
        if self.grid == "anyres" and alone:
            return anyres_tiles(image, self.tile)
        mode: FrameMode = "crop" if self.grid == "single-unpooled" else "pad"
        return single_tiles(image, self.tile, mode, background)

    def write_to(self, config: Any) -> None:
        """Write it into a VLM's configuration, in our own keys and in those of stock LlavaOnevision."""
        config.image_grid, config.image_grid_rule = self.grid, self.rule
        set_image_max_grids(config, self.max_grids)
        if self.grid == "anyres":
            config.image_grid_pinpoints, config.vision_aspect_ratio = anyres_pinpoints(self.tile), "anyres_max_4"
        else:  # images are encoded like videos, which use neither
            sides = [self.tile * n for n in range(1, 7)]
            config.image_grid_pinpoints = [[down, across] for down in sides for across in sides]
            config.vision_aspect_ratio = "anyres_max_9"


def embed_image(
    vlm: Any,
    image: Image.Image,
    newline_E: Tensor,
    encoding: ImageEncoding,
    preprocess: Preprocess,
    *,
    alone: bool,
    tower_grad: bool,
) -> Tensor:
    """The block (N, E) of an image (RGB, upright), `ImageEncoding.tokens` long."""
    tiles = encoding.tiles(image, alone=alone, background=preprocess.background)
    with torch.set_grad_enabled(tower_grad and torch.is_grad_enabled()):
        features_GPD = frame_features(vlm, preprocess(tiles).to(vlm.device, vlm.model.vision_tower.dtype))
    if encoding.grid in ("unires", "single"):
        visual = embed_frames(vlm, features_GPD)
        return torch.cat([visual, newline_E[None]])
    linear = vlm.model.multi_modal_projector.linear_1.weight
    projected_GPE = vlm.model.multi_modal_projector(features_GPD.to(linear.device, linear.dtype))
    if encoding.grid == "anyres" and alone:
        return anyres_flatten(projected_GPE, newline_E, *image.size, tile=encoding.tile)
    return torch.cat([projected_GPE[0], newline_E[None]])
