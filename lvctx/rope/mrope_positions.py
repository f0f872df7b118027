"""Position ids of M-RoPE: one number per token and axis (time, height, width), for Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

A text token has the same position on all three axes. An image or a video begins at the next free position c on each
axis: time c + the grid's time, height c + row, width c + column. The next token follows the largest position on any
axis (Qwen2-VL report, section 2.1). Temporal positions of a video's grids are 1 apart in Qwen2-VL, and
`tokens_per_second` x seconds, rounded down, in Qwen2.5-VL; Qwen3-VL writes times as text and makes every grid an image.

transformers 5.3 and later start the text after a Qwen2-VL or Qwen2.5-VL video at the end of its height or width, within
the video's own time; therefore positions are computed here and passed to the model.

Positions are (3, S): S tokens of one sequence.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Text(NamedTuple):
    """Text tokens: equal positions on all axes."""

    tokens: int


class Grids(NamedTuple):
    """Visual tokens of one size: an image (one grid) or a video."""

    time: int
    """Number of grids along time."""
    height: int
    """Rows of tokens after merging."""
    width: int
    """Columns of tokens after merging."""
    step: float = 1.0
    """Positions from one grid to the next, rounded down at each grid."""


class VideoGrids(NamedTuple):
    """One video as runs of different sizes, each between its own delimiters; time continues from run to run.

    All runs share the height and width positions of the first, as the frames of one video do. Delimiters between runs
    have the time of the grid beside them; the first and the last belong to the text around the video.
    """

    runs: tuple[Grids, ...]
    """In temporal order; `step` is not used."""
    times: tuple[int, ...]
    """Position of every grid, counted from the video's first; ascending, from 0."""


SequencePart = Text | Grids | VideoGrids


def positions(parts: Iterable[SequencePart]) -> tuple[Tensor, int]:
    """Position ids (3, S) int64 of a sequence, and the position of the token after it."""
    position_ids: list[Tensor] = []
    free = 0
    for part in parts:
        if isinstance(part, Text):
            ids = torch.arange(part.tokens).expand(3, -1) + free
        elif isinstance(part, Grids):
            # In float32, as in the model's own code: at steps like 4/3 the precision decides the rounding.
            times = (torch.arange(part.time) * torch.tensor(part.step, dtype=torch.float32)).long()
            ids = _grid(times, part.height, part.width) + free
        else:
            ids = _video_positions(part) + free
        position_ids.append(ids)
        free = max(free, int(ids.max()) + 1) if ids.numel() else free
    return (torch.cat(position_ids, dim=1) if position_ids else torch.zeros(3, 0, dtype=torch.int64)), free


def _grid(times: Tensor, height: int, width: int) -> Tensor:
    axes = torch.meshgrid(times, torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(axes).reshape(3, -1)


def _video_positions(video: VideoGrids) -> Tensor:
    position_ids = []
    at = 0
    for run in video.runs:
        times = torch.tensor(video.times[at : at + run.time])
        if at:
            position_ids += [torch.full((3, 1), video.times[at - 1]), torch.full((3, 1), video.times[at])]
        position_ids.append(_grid(times, run.height, run.width))
        at += run.time
    assert at == len(video.times)
    return torch.cat(position_ids, dim=1)


def tokens_per_second(config: Any) -> float | None:
    """Qwen2.5-VL: positions per second of video. None for other configurations of transformers: grids are 1 apart."""
    rate: float | None = getattr(config.vision_config, "tokens_per_second", None)
    return rate
