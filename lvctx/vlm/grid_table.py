"""Qwen-VL's frames as ids of an extended vocabulary: videos with a common beginning have ids with a common prefix.

Ids below V are text. An id from V on is a row of a table of visual embeddings: the rows of a grid do not depend on its
position, since the tower encodes grids one at a time and only position ids depend on time. So a walk over prefixes
(`lvctx.inference.prefix_scorer`) computes the common part of videos only once.

Qwen3-VL has no such runs: it writes the time of every grid as text before it, and each grid is a separate item.
Delimiters between the runs of a video have the time of the adjacent grid, those at its ends belong to the text around
it: the same tokens with different positions. Therefore the former are rows of the table too, the first two.

Shapes: L tokens of a sequence, R rows, E width of the language model.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lvctx.models.loading import device_of
from lvctx.rope import mrope_positions
from lvctx.rope.mrope_positions import SequencePart, Text
from lvctx.vlm.qwen_frames import part, patches
from lvctx.vlm.token_count import Block, QwenRule, time_text

END, START = 0, 1
"""Rows for the delimiters between runs."""

GRID_BATCH = 16
"""Number of grids per batch of the tower."""


class TokenGrid(NamedTuple):
    """A grid of the table, encoded as consecutive rows."""

    frames: tuple[int, ...]
    """One frame number, or two for two merged frames; a single one is merged with itself."""
    height: int
    """Rows of tokens."""
    width: int
    """Columns of tokens."""


class GridTable:
    """The grids used so far, and sequences of them."""

    def __init__(
        self,
        rule: QwenRule,
        *,
        vocabulary: int,
        tokens_per_second: float | None,
        times: Callable[[Sequence[int]], Sequence[float]],
    ) -> None:
        """Ids from `vocabulary` on are rows; `times(numbers)` are a video's timestamps in seconds."""
        self.rule, self.vocabulary = rule, vocabulary
        self._per_second, self._times = tokens_per_second, times
        self._first_row: dict[TokenGrid, int] = {}
        self._grid_at: dict[int, TokenGrid] = {}
        self.rows = 2
        """R: rows of the table so far."""

    @property
    def grids(self) -> dict[TokenGrid, int]:
        """Every grid and its first row."""
        return self._first_row

    def ids(self, frames: Sequence[int], blocks: Sequence[Block]) -> np.ndarray:
        """A video (or an image) of these frames between its delimiters; `blocks` give merging and sizes."""
        times = self._times(frames)
        start, end, separator = [self.rule.start], [self.rule.end], [self.vocabulary + row for row in (END, START)]
        parts: list[Sequence[int] | np.ndarray] = []
        position = 0
        for number, block in enumerate(blocks):
            merged = self.rule.merge if block.kind == "video" else 1
            for i in range(position, position + block.frames, merged):
                last = min(i + merged, position + block.frames)
                if self.rule.write is not None and block.kind == "video":
                    parts += [end] if parts else []
                    parts += [self.rule.write(time_text(times, i, last)), start]
                elif i == position:
                    parts.append(separator if number else start)
                grid = TokenGrid(tuple(frames[i:last]), *block.grid[1:])
                parts.append(self.vocabulary + self._rows(grid))
            position += block.frames
        assert position == len(frames)
        return np.concatenate([*parts, end]).astype(np.int64)

    def _rows(self, grid: TokenGrid) -> np.ndarray:
        if grid not in self._first_row:
            self._first_row[grid], self._grid_at[self.rows] = self.rows, grid
            self.rows += grid.height * grid.width
        return np.arange(grid.height * grid.width) + self._first_row[grid]

    def positions(self, ids_L: np.ndarray, first: int) -> Tensor:
        """Position ids (3, 1, L - first) of a sequence, or the beginning of one, from its token `first` on."""
        return mrope_positions.positions(self._parts(ids_L))[0][:, None, first : len(ids_L)]

    def _parts(self, ids_L: np.ndarray) -> Iterator[SequencePart]:
        """Text and videos. A truncated video is completed to its next grid, without effect on earlier positions."""
        edges = np.flatnonzero(np.diff(ids_L >= self.vocabulary)) + 1
        for segment in np.split(ids_L, edges):
            if not len(segment) or segment[0] < self.vocabulary:
                yield Text(len(segment))
            else:
                yield self._video(segment - self.vocabulary)

    def _video(self, rows: np.ndarray) -> mrope_positions.VideoGrids:
        runs: list[list[TokenGrid]] = [[]]
        position = 0
        while position < len(rows):
            row = int(rows[position])
            if row == END:
                runs.append([])
            elif row != START:
                runs[-1].append(self._grid_at[row])
                position += runs[-1][-1].height * runs[-1][-1].width - 1
            position += 1
        runs[-1] = runs[-1] or runs[-2][-1:]
        blocks = [
            Block("video", sum(len(g.frames) for g in run), (len(run), run[0].height, run[0].width)) for run in runs
        ]
        times = self._times([number for run in runs for grid in run for number in grid.frames])
        return part(blocks, times, self.rule.merge, self._per_second)


GetFrame = Callable[[int, tuple[int, int]], Image.Image]
"""Returns a frame by its number, resized to a size in pixels."""


@torch.inference_mode()
def encode_grids(
    model: Any, processor: Any, table: GridTable, table_RE: Tensor, grids: Sequence[TokenGrid], get_frame: GetFrame
) -> None:
    """Fill the rows of these grids with the output of the model's vision tower."""
    side, device = table.rule.factor, device_of(model.model.visual)
    for (_, height, width), group in groupby(grids, key=lambda grid: (None, grid.height, grid.width)):
        same_size = list(group)
        for i in range(0, len(same_size), GRID_BATCH):
            frames = [
                get_frame(number, (width * side, height * side))
                for grid in same_size[i : i + GRID_BATCH]
                for number in (grid.frames * table.rule.merge)[: table.rule.merge]
            ]
            rows, (down, across) = patches(frames, processor, merged=True)
            sizes = torch.tensor([[len(frames) // table.rule.merge, down, across]], device=device)
            encoded = model.model.get_video_features(rows.to(device), sizes)
            deep = getattr(encoded, "deepstack_features", None) or []
            features = torch.cat([torch.cat(list(part)) for part in (encoded.pooler_output, *deep)], dim=1)
            size = height * width
            for grid, features_TE in zip(same_size[i : i + GRID_BATCH], features.split(size), strict=True):
                first = table.grids[grid]
                table_RE[first : first + size] = features_TE


@torch.inference_mode()
def empty_table(model: Any, table: GridTable) -> Tensor:
    """The embeddings (R, E) of all rows so far, with only the delimiters set; `encode_grids` fills the others.

    If the tower also feeds deeper layers (Qwen3-VL's deepstack), their inputs are in further columns.
    """
    embedding = model.get_input_embeddings()
    text_width, device = embedding.weight.shape[1], device_of(embedding)
    width = text_width * (1 + len(getattr(model.config.vision_config, "deepstack_visual_indexes", ())))
    table_RE = torch.zeros(table.rows, width, dtype=embedding.weight.dtype, device=device)
    table_RE[[END, START], :text_width] = embedding(torch.tensor([table.rule.end, table.rule.start], device=device))
    return table_RE
