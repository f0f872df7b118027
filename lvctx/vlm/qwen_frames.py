"""Frames of a video for Qwen-VL: each at its own resolution, in runs of one size, with continuous times.

Hybrid resolution (GIRAFFE section 3.5) changes the size from grid to grid, but an item of the model has one size. So
each run of one size is a separate video item (in mode `image` each frame is an image item), and position ids are
given explicitly, so that time does not restart at each (`rope/mrope_positions.py`). Uniform resolution is one run.

Frames are resized as they are read, with the arithmetic of the model's own processor but without its lower limit for
video (128 tokens), which would enlarge small frames again; the processor then normalises them and cuts patches.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lvctx.errors import UsageError
from lvctx.rope import mrope_positions
from lvctx.rope.mrope_positions import Grids
from lvctx.video.hybrid import Hybrid, Run, hybrid_tokens, select_high
from lvctx.vlm.token_count import Block, QwenRule

LEAST = 4
"""Tokens of the smallest frame; the processor's minimum number of pixels is set to this."""


def check_reachable(hybrid: Hybrid) -> None:
    """Raise UsageError, with the nearest valid value, if m/s is not a whole number or is less than `LEAST` tokens."""
    group, m, s = hybrid.group, hybrid.tokens, hybrid.ratio
    if m < LEAST or m // s < LEAST:
        fix = f"m at least {LEAST * s}, or s at most {max(m // LEAST, 1)}"
        raise UsageError(
            f"a frame has at least {LEAST} tokens, and m/s is {m / s:g}", where=f"{group},{m},{s}", fix=fix
        )
    if m % s:
        nearest = max(round(m / s), LEAST) * s
        raise UsageError(
            f"m/s is {m / s:g}, not a whole number", where=f"{group},{m},{s}", fix=f"the nearest m is {nearest}"
        )


@dataclass(frozen=True, kw_only=True)
class SampledVideo:
    """Sampled frames at their sizes."""

    frames: list[Image.Image]
    """RGB, resized."""
    pts: list[float]
    """Seconds."""
    high: list[bool]
    """Whether each frame has the high resolution."""
    size: tuple[int, int]
    """Width and height of the source in pixels."""
    rule: QwenRule
    """The model's token count."""

    @property
    def runs(self) -> list[Run]:
        """Runs of consecutive frames of one resolution."""
        return runs_of(self.high, self.rule)

    @property
    def blocks(self) -> list[Block]:
        """The model's items; the sum of their tokens is exact."""
        return blocks_of(self.runs, self.rule, *self.size)

    @property
    def nominal(self) -> int:
        """Number of visual tokens if every grid filled its budget."""
        hybrid = self.rule.hybrid
        return sum(run.grids * (hybrid.tokens if run.high else hybrid.low_tokens) for run in self.runs)

    def part(self, tokens_per_second: float | None) -> mrope_positions.VideoGrids:
        """The grids and times for position ids. Times count grids, or seconds if the model does."""
        return part(self.blocks, self.pts, self.rule.merge, tokens_per_second)


def runs_of(high: Iterable[bool], rule: QwenRule) -> list[Run]:
    """Runs of consecutive frames of one resolution, from the resolution of each frame."""
    merge = 1 if rule.hybrid.mode == "image" else rule.merge
    lengths = [(is_high, len(list(same))) for is_high, same in groupby(high)]
    return [Run(n, -(-n // merge), is_high) for is_high, n in lengths]


def blocks_of(runs: Iterable[Run], rule: QwenRule, width: int, height: int) -> list[Block]:
    """The model's items for runs of frames of this size in pixels."""
    return [block for run in runs for block in _blocks(rule, run, width, height)]


def _blocks(rule: QwenRule, run: Run, width: int, height: int) -> list[Block]:
    tokens = rule.hybrid.tokens if run.high else rule.hybrid.low_tokens
    one_size = replace(rule, hybrid=Hybrid(group=1, tokens=tokens, ratio=1, mode=rule.hybrid.mode))
    return one_size.video(width, height, run.frames)


def part(
    blocks: Sequence[Block], pts: Sequence[float], merge: int, tokens_per_second: float | None
) -> mrope_positions.VideoGrids:
    """The grids and times for the position ids of a video's blocks; `pts` are its timestamps in seconds."""
    times = tuple(grid_times(blocks, pts, merge, tokens_per_second))
    return mrope_positions.VideoGrids(runs=tuple(Grids(*block.grid) for block in blocks), times=times)


def grid_times(
    blocks: Iterable[Block], pts: Sequence[float], merge: int, tokens_per_second: float | None
) -> Iterator[int]:
    """The temporal position of each grid, from 0: its index, or its first frame's time in positions."""
    number = frame = 0
    for block in blocks:
        a_grid = merge if block.kind == "video" else 1
        for i in range(block.grid[0]):
            seconds = pts[frame + i * a_grid] - pts[0]
            # Times of regular sampling are whole positions except for rounding errors.
            yield number if tokens_per_second is None else int(seconds * tokens_per_second + 1e-6)
            number += 1
        frame += block.frames


def resize_frames(
    frames: Iterable[tuple[float, np.ndarray]], rule: QwenRule, *, threshold: float | None = None, resample: int
) -> SampledVideo:
    """Resize frames (seconds, uint8 (H, W, 3)) as they arrive; memory holds only the resized ones.

    `threshold` selects adaptively (see `select_high`). Raises UsageError for an impossible resolution.
    """
    check_reachable(rule.hybrid)
    is_high = select_high(rule.hybrid, merge=rule.merge, threshold=threshold)
    images: list[Image.Image] = []
    pts: list[float] = []
    high: list[bool] = []
    sizes: dict[bool, tuple[int, int]] = {}
    size = (0, 0)
    for number, (seconds, frame_HW3) in enumerate(frames):
        if not number:
            size = (frame_HW3.shape[1], frame_HW3.shape[0])
            for level in (True, False):
                _, down, across = _blocks(rule, Run(1, 1, level), *size)[0].grid
                sizes[level] = (across * rule.factor, down * rule.factor)
        high.append(is_high(number, frame_HW3))
        images.append(Image.fromarray(frame_HW3).resize(sizes[high[-1]], resample=resample))
        pts.append(seconds)
    return SampledVideo(frames=images, pts=pts, high=high, size=size, rule=rule)


def pixels(video: SampledVideo, processor: Any) -> dict[str, Tensor]:
    """Patches and grids for the model's forward, for all items of the video in order.

    `processor` is the model's own image processor. It fills both frames of a grid with one image; a video's grid takes
    the first image's first half and the second image's second. A run's odd last frame is merged with itself.
    """
    merged = video.blocks[0].kind == "video"
    patch_rows, grids = [], []
    first = 0
    for block in video.blocks:
        rows, (down, across) = patches(video.frames[first : first + block.frames], processor, merged=merged)
        first += block.frames
        assert (down, across) == tuple(2 * n for n in block.grid[1:])
        patch_rows.append(rows)
        grids.append([block.grid[0], down, across])
    names = ("pixel_values_videos", "video_grid_thw") if merged else ("pixel_values", "image_grid_thw")
    return dict(zip(names, (torch.cat(patch_rows), torch.tensor(grids)), strict=True))


def patches(frames: Sequence[Image.Image], processor: Any, *, merged: bool) -> tuple[Tensor, tuple[int, int]]:
    """Patches of frames of one size, and the numbers of patches down and across.

    `merged` merges pairs, an odd last frame with itself; otherwise each with itself, as in the image processor.
    """
    processed = processor(images=list(frames), do_resize=False, return_tensors="pt")
    down, across = (int(n) for n in processed["image_grid_thw"][0, 1:])
    rows = processed["pixel_values"].reshape(len(frames), down * across, 3, processor.temporal_patch_size, -1)
    if merged:
        rows = torch.cat([rows, rows[-1:].expand(-len(frames) % rows.shape[3], -1, -1, -1, -1)])
        rows = torch.stack([rows[i :: rows.shape[3], :, :, i] for i in range(rows.shape[3])], dim=3)
    return rows.flatten(2).flatten(0, 1), (down, across)


class VideoCount(NamedTuple):
    """Tokens and positions of a video, computed without reading one."""

    nominal: int
    """Number of visual tokens if every grid filled its budget."""
    actual: int
    """Number of visual tokens at the sizes that the aspect allows."""
    delimiters: int
    """Number of delimiter tokens around the items."""
    last_position: int
    """Largest position of the video, starting from 0."""


def count_video(
    frames: int, width: int, height: int, rule: QwenRule, *, fps: float, tokens_per_second: float | None
) -> VideoCount:
    """Tokens and positions of `frames` frames of a size in pixels, `fps` per second. Raises UsageError."""
    check_reachable(rule.hybrid)
    blocks = rule.video(width, height, frames)
    pts = [i / fps for i in range(frames)]
    _, next_position = mrope_positions.positions([part(blocks, pts, rule.merge, tokens_per_second)])
    return VideoCount(
        nominal=hybrid_tokens(frames, rule.hybrid, merge=rule.merge),
        actual=sum(block.tokens for block in blocks),
        delimiters=2 * len(blocks),
        last_position=next_position - 1,
    )
