"""The number of tokens of an image or a video in a model, and their order in the sequence.

There are two families. LlavaOnevision as trained by `align`: UniRes grids of a fixed number of tokens, one block closed
by "\\n". Qwen2-VL: pixels rounded to multiples of 28 within a budget, one token per 28 x 28 pixels and two frames.

Sizes are pixels; a grid is (t, h, w) in tokens of the language model. Qwen's own `image_grid_thw` and `video_grid_thw`
count patches before the 2 x 2 merge: (t, 2h, 2w).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

from lvctx.errors import InputError, UsageError
from lvctx.models.unires import MAX_GRIDS, GridRule, MaxGrids, unires_grid
from lvctx.video.hybrid import Hybrid, Run, runs

Kind = Literal["image", "video"]


class Block(NamedTuple):
    """Visual tokens of one size."""

    kind: Kind
    """The kind of placeholder."""
    frames: int
    """Number of source frames in it."""
    grid: tuple[int, int, int]
    """Tokens along time, height and width."""

    @property
    def tokens(self) -> int:
        """Their number."""
        return math.prod(self.grid)


class Layout(NamedTuple):
    """Blocks in the order of a sequence."""

    ids: list[int]
    """Placeholders and delimiters, and times where the model has them as text."""
    at: list[int]
    """Where each block's first placeholder is."""
    blocks: Sequence[Block]
    """The blocks; where a time is written before every grid of a video, each grid is one."""


class VisualRule(Protocol):
    """The token count of a model family."""

    marks: ClassVar[frozenset[str]]
    """Ids of the placeholder tokens of an image and a video."""

    def mark(self, kind: Kind) -> str:
        """The placeholder token of media of this kind in the text."""

    def image(self, width: int, height: int) -> list[Block]:
        """Blocks of an image."""

    def video(self, width: int, height: int, frames: int) -> list[Block]:
        """Blocks of a video's sampled frames."""

    def layout(self, blocks: Sequence[Block], times: Sequence[float] = ()) -> Layout:
        """The blocks of one image or video in the order of the sequence; `times` of its frames, in seconds."""


def smart_resize(width: int, height: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen2-VL's size for an image: multiples of `factor`, aspect approximately kept, pixels within the budget.

    Raises InputError for a side more than 200 times the other, which the model's own processor refuses.
    """
    if max(width, height) > 200 * min(width, height):
        raise InputError(f"{width} x {height} pixels: one side is more than 200 times the other")
    across, down = round(width / factor) * factor, round(height / factor) * factor
    if across * down > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        across, down = (max(factor, math.floor(n / shrink / factor) * factor) for n in (width, height))
    elif across * down < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        across, down = (math.ceil(n * grow / factor) * factor for n in (width, height))
    return across, down


@dataclass(frozen=True, kw_only=True)
class QwenRule:
    """Qwen2-VL and Qwen2.5-VL: an item is `<|vision_start|>`, its placeholders, `<|vision_end|>`."""

    marks: ClassVar = frozenset({"<|image_pad|>", "<|video_pad|>"})

    start: int
    """Id of `<|vision_start|>`."""
    end: int
    """Id of `<|vision_end|>`."""
    pads: dict[Kind, int]
    """Ids of `<|image_pad|>` and `<|video_pad|>`."""
    hybrid: Hybrid
    """Tokens of a video's grids; m is a budget that may not be used completely because of the aspect."""
    min_pixels: int = 56 * 56
    """Minimum pixels of an image; the released preprocessor_config.json."""
    max_pixels: int = 14 * 14 * 4 * 1280
    """Maximum pixels of an image; 16,384 tokens in the released preprocessor_config.json."""
    factor: int = 28
    """Pixels along a side of a token: patch 14, 2 x 2 merged."""
    merge: int = 2
    """Frames per grid: `temporal_patch_size`."""
    write: Callable[[str], list[int]] | None = None
    """Qwen3-VL: tokenizes the time that it has before every grid of a video, the mean of its frames'."""

    def mark(self, kind: Kind) -> str:
        """See `VisualRule`."""
        return f"<|{kind}_pad|>"

    def image(self, width: int, height: int) -> list[Block]:
        """One block."""
        return [self._block("image", Run(1, 1, True), width, height, self.min_pixels, self.max_pixels)]

    def video(self, width: int, height: int, frames: int) -> list[Block]:
        """One block per run; in mode `image` one per frame. Small frames are enlarged to 4 tokens at most."""
        area = self.factor**2
        blocks: list[Block] = []
        for run in runs(frames, self.hybrid, merge=self.merge):
            budget = (self.hybrid.tokens if run.high else self.hybrid.low_tokens) * area
            if self.hybrid.mode == "image":
                blocks += [self._block("image", Run(1, 1, True), width, height, 4 * area, budget)] * run.frames
            else:
                blocks.append(self._block("video", run, width, height, 4 * area, budget))
        return blocks

    def _block(self, kind: Kind, run: Run, width: int, height: int, low: int, high: int) -> Block:
        across, down = smart_resize(width, height, factor=self.factor, min_pixels=low, max_pixels=high)
        return Block(kind, run.frames, (run.grids, down // self.factor, across // self.factor))

    def layout(self, blocks: Sequence[Block], times: Sequence[float] = ()) -> Layout:
        """Every block between its delimiters."""
        if self.write is not None:
            blocks = [grid for block in blocks for grid in self._grids(block)]
        ids: list[int] = []
        at = []
        frame = 0
        for block in blocks:
            if self.write is not None and block.kind == "video":
                ids += self.write(time_text(times, frame, frame + block.frames))
                frame += block.frames
            at.append(len(ids) + 1)
            ids += [self.start, *[self.pads[block.kind]] * block.tokens, self.end]
        return Layout(ids, at, blocks)

    def _grids(self, block: Block) -> Iterator[Block]:
        """Each grid of a block by itself; an odd last frame is merged with itself."""
        for first in range(0, block.frames, self.merge):
            yield Block(block.kind, min(self.merge, block.frames - first), (1, *block.grid[1:]))


@dataclass(frozen=True, kw_only=True)
class LlavaRule:
    """LlavaOnevision: grids of the tower's square, each pooled to the same number of tokens, then one token for "\\n".

    It does not distinguish images and videos.
    """

    marks: ClassVar = frozenset({"<video>"})

    placeholder: int
    """Id of `<video>`; the closing "\\n" is a placeholder too, for the model's own embedding."""
    tile: int
    """Pixels of a tower's side: 336 for CLIP ViT-L/14-336."""
    side: int
    """Features along a side of the tower: 24."""
    grid_rule: GridRule = "code"
    """The UniRes rule of the released code or of the paper."""
    max_grids: MaxGrids = MAX_GRIDS
    """Maximum number of UniRes grids per image, or the allowed grids."""
    hybrid: Hybrid
    """m is the result of 2 x 2 pooling (144); m/s results from pooling s times as many features."""

    def mark(self, kind: Kind) -> str:
        """See `VisualRule`."""
        return "<video>"

    def image(self, width: int, height: int) -> list[Block]:
        """One block: the UniRes tiles, row by row, as if they were frames."""
        tiles = math.prod(unires_grid(width, height, tile=self.tile, rule=self.grid_rule, max_grids=self.max_grids))
        return [Block("image", 1, (tiles, *self._pooled(2, 2)))]

    def video(self, width: int, height: int, frames: int) -> list[Block]:
        """One block per run; frames of any size become squares."""
        return [
            Block("video", run.frames, (run.grids, *self._pooled(*self._pools(run.high))))
            for run in runs(frames, self.hybrid, merge=1)
        ]

    def _pools(self, high: bool) -> tuple[int, int]:
        """Features pooled (down, across) in a frame of high or low resolution."""
        return (2, 2) if high else pooling(self.side, self.hybrid.ratio)

    def _pooled(self, down: int, across: int) -> tuple[int, int]:
        return math.ceil(self.side / down), math.ceil(self.side / across)

    def layout(self, blocks: Sequence[Block], times: Sequence[float] = ()) -> Layout:
        """All blocks, then the closing "\\n"."""
        at = [sum(block.tokens for block in blocks[:i]) for i in range(len(blocks))]
        return Layout([self.placeholder] * (sum(block.tokens for block in blocks) + 1), at, blocks)


def time_text(times: Sequence[float], first: int, end: int) -> str:
    """What Qwen3-VL has before the grid of these frames of a video: their mean time since the first, in seconds."""
    return f"<{(times[first] + times[end - 1]) / 2 - times[0]:.1f} seconds>"


def pooling(side: int, ratio: int) -> tuple[int, int]:
    """Features pooled (down, across) for `ratio` times fewer tokens than 2 x 2: (4, 3) for a side of 24 and 3.

    Among factorizations of 4 * ratio that divide the side, the squarest, taller first. Raises UsageError for none.
    """
    area = 4 * ratio
    for across in range(math.isqrt(area), 0, -1):
        down = area // across
        if across * down == area and side % across == 0 and side % down == 0:
            return down, across
    raise UsageError(f"{side} x {side} features cannot be pooled to {ratio} times fewer", fix="choose another s")
