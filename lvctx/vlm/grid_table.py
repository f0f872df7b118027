"""Qwen-VL's frames as ids of an extended vocabulary: videos that begin alike have ids that begin alike.

Ids below V are text. From V on, an id is a row of a table of visual embeddings: a grid of Qwen-VL has its rows wherever
it stands, since the tower looks at one grid at a time and only position ids know of time. So a walk over prefixes
(`lvctx.inference.prefix_scorer`) computes what videos share only once.

Qwen3-VL has no such runs: before every grid it writes the grid's time in text, and each is an item by itself.

Delimiters between the runs of a video have the time of the grid beside them, those at its ends belong to the text
around it: the same tokens at other positions. Therefore the former are rows too, the first two.

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
from lvctx.rope.mrope_positions import Part, Text
from lvctx.vlm.qwen_frames import part, patches
from lvctx.vlm.token_count import Block, QwenRule

END, START = 0, 1
"""Rows of the delimiters between runs."""

BATCH = 16
"""Grids that go through the tower at once."""


class Grid(NamedTuple):
    """What some rows of the table show."""

    pictures: tuple[int, ...]
    """One number, or two where two frames are merged; one alone is merged with itself."""
    height: int
    """Rows of tokens."""
    width: int
    """Columns of tokens."""


class GridTable:
    """Grids so far, and sequences of them."""

    def __init__(
        self,
        rule: QwenRule,
        *,
        vocabulary: int,
        tokens_per_second: float | None,
        times: Callable[[Sequence[int]], Sequence[float]],
        write: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        """Ids from `vocabulary` on are rows; `times(numbers)` is when a video's frames are shown, in seconds.

        `write` is for models that write the time of a grid, the mean of its frames', before it: ids of a text.
        """
        self.rule, self.vocabulary = rule, vocabulary
        self._per_second, self._times, self._write = tokens_per_second, times, write
        self._first_row: dict[Grid, int] = {}
        self._grid_at: dict[int, Grid] = {}
        self.rows = 2
        """R: rows of the table so far."""

    @property
    def grids(self) -> dict[Grid, int]:
        """Every grid and its first row."""
        return self._first_row

    def ids(self, pictures: Sequence[int], blocks: Sequence[Block]) -> np.ndarray:
        """A video (or an image) of these frames between its delimiters; blocks have what is merged, and sizes."""
        times = self._times(pictures)
        start, end, between = [self.rule.start], [self.rule.end], [self.vocabulary + row for row in (END, START)]
        found: list[Sequence[int] | np.ndarray] = []
        at = 0
        for number, block in enumerate(blocks):
            merged = self.rule.merge if block.kind == "video" else 1
            for i in range(at, at + block.frames, merged):
                last = min(i + merged, at + block.frames)
                if self._write and block.kind == "video":
                    # A frame that is merged with itself is shown at its own time.
                    seconds = (times[i] + times[last - 1]) / 2 - times[0]
                    found += [end] if found else []
                    found += [self._write(f"<{seconds:.1f} seconds>"), start]
                elif i == at:
                    found.append(between if number else start)
                grid = Grid(tuple(pictures[i:last]), *block.grid[1:])
                found.append(self.vocabulary + self._rows(grid))
            at += block.frames
        assert at == len(pictures)
        return np.concatenate([*found, end]).astype(np.int64)

    def _rows(self, grid: Grid) -> np.ndarray:
        if grid not in self._first_row:
            self._first_row[grid], self._grid_at[self.rows] = self.rows, grid
            self.rows += grid.height * grid.width
        return np.arange(grid.height * grid.width) + self._first_row[grid]

    def positions(self, ids_L: np.ndarray, first: int) -> Tensor:
        """Position ids (3, 1, L - first) of a sequence, or the beginning of one, from its token `first` on."""
        return mrope_positions.positions(self._parts(ids_L))[0][:, None, first : len(ids_L)]

    def _parts(self, ids_L: np.ndarray) -> Iterator[Part]:
        """Text and videos. A truncated video is completed to its next grid: that moves nothing before the cut."""
        edges = np.flatnonzero(np.diff(ids_L >= self.vocabulary)) + 1
        for piece in np.split(ids_L, edges):
            if not len(piece) or piece[0] < self.vocabulary:
                yield Text(len(piece))
            else:
                yield self._film(piece - self.vocabulary)

    def _film(self, rows: np.ndarray) -> mrope_positions.Film:
        runs: list[list[Grid]] = [[]]
        at = 0
        while at < len(rows):
            row = int(rows[at])
            if row == END:
                runs.append([])
            elif row != START:
                runs[-1].append(self._grid_at[row])
                at += runs[-1][-1].height * runs[-1][-1].width - 1
            at += 1
        runs[-1] = runs[-1] or runs[-2][-1:]
        blocks = [
            Block("video", sum(len(g.pictures) for g in run), (len(run), run[0].height, run[0].width)) for run in runs
        ]
        times = self._times([number for run in runs for grid in run for number in grid.pictures])
        return part(blocks, times, self.rule.merge, self._per_second)


Take = Callable[[int, tuple[int, int]], Image.Image]
"""A frame by its number, in a size in pixels."""


@torch.inference_mode()
def encode_grids(
    model: Any, processor: Any, table: GridTable, table_RE: Tensor, grids: Sequence[Grid], take: Take
) -> None:
    """Fill the rows of these grids: they go through the model's vision tower."""
    side, device = table.rule.factor, device_of(model.model.visual)
    for (_, height, width), alike in groupby(grids, key=lambda grid: (None, grid.height, grid.width)):
        same = list(alike)
        for i in range(0, len(same), BATCH):
            frames = [
                take(number, (width * side, height * side))
                for grid in same[i : i + BATCH]
                for number in (grid.pictures * table.rule.merge)[: table.rule.merge]
            ]
            rows, (down, across) = patches(frames, processor, merged=True)
            sizes = torch.tensor([[len(frames) // table.rule.merge, down, across]], device=device)
            encoded = model.model.get_video_features(rows.to(device), sizes)
            deep = getattr(encoded, "deepstack_features", None) or []
            features = torch.cat([torch.cat(list(part)) for part in (encoded.pooler_output, *deep)], dim=1)
            size = height * width
            for grid, features_TE in zip(same[i : i + BATCH], features.split(size), strict=True):
                first = table.grids[grid]
                table_RE[first : first + size] = features_TE


@torch.inference_mode()
def empty_table(model: Any, table: GridTable) -> Tensor:
    """The embeddings (R, E) of all rows so far with the delimiters', for `encode_grids` to fill.

    Where the tower feeds layers beyond the first (Qwen3-VL's deepstack), what it has for them is to the right.
    """
    embedding = model.get_input_embeddings()
    own, device = embedding.weight.shape[1], device_of(embedding)
    width = own * (1 + len(getattr(model.config.vision_config, "deepstack_visual_indexes", ())))
    table_RE = torch.zeros(table.rows, width, dtype=embedding.weight.dtype, device=device)
    table_RE[[END, START], :own] = embedding(torch.tensor([table.rule.end, table.rule.start], device=device))
    return table_RE
