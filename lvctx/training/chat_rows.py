"""Packed chat rows as training inputs of a Qwen-VL model: pixels of all their media, and positions of the whole row.

A row's samples follow each other on one time axis, so that a long row has large positions (GIRAFFE, appendix E:
concatenated to the target length). The sizes of its images and videos are stored in the row's blocks.

Shapes: L tokens of a row, N patches, B blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lvctx.artifacts.store import fingerprint
from lvctx.data.packed import check_shards
from lvctx.data.packed_chat import ChatRows
from lvctx.errors import InputError
from lvctx.models.image_processing import open_image
from lvctx.models.loading import load_config
from lvctx.rope.mrope_positions import Grids, SequencePart, Text, positions
from lvctx.vlm.qwen_frames import part, patches
from lvctx.vlm.token_count import Block, Kind, QwenRule
from lvctx.vlm.training_frames import packed_video


def check_tokens(rows: ChatRows, model: Path) -> None:
    """Raise InputError for rows of another tokenizer than the model's, or with ids that it has no embeddings of."""
    tokenizer, packed_with = model / "tokenizer.json", str(rows.manifest["inputs"].get("model", "")).split()
    if tokenizer.is_file() and fingerprint(tokenizer) not in packed_with:
        raise InputError("packed with another tokenizer", where=rows.directory, fix=f"pack-chat with --model {model}")
    vocabulary = load_config(model).get_text_config().vocab_size
    check_shards(rows.directory, len(rows.manifest["shard_rows"]), vocabulary)


@dataclass(frozen=True, kw_only=True)
class ChatRow:
    """One row."""

    ids_L: Tensor
    """Token ids, with a placeholder for each visual token."""
    labels_L: Tensor
    """Targets, already shifted; -100 is not counted."""
    positions_3L: Tensor
    """Position ids of time, height and width."""
    patches: Tensor | None
    """Patches (N, C) of all blocks in order; None for a row of text."""
    grids_B3: Tensor
    """Grids along time, patches down and across, of each block."""


class RowReader:
    """Reads rows with their media."""

    def __init__(
        self, rows: ChatRows, media: Path, rule: QwenRule, processor: Any, *, tokens_per_second: float | None
    ) -> None:
        """`media` is the folder that the rows' paths are relative to; `processor` the model's own image processor."""
        self.rows, self.media, self.rule, self.processor = rows, media, rule, processor
        self._per_second = tokens_per_second

    def read(self, number: int) -> ChatRow:
        """A row. Raises InputError for media that are missing or have changed since the row was packed."""
        ids = self.rows.row(number)
        items = [item for sample in self.rows.samples(number) for item in sample["media"]]
        patch_rows, grids = [], []
        parts: list[SequencePart] = []
        text_start = 0
        for item in items:
            frames, pts = self._read_media(item)
            blocks = [Block(self._kind(ids[b[0]]), b[1], tuple(b[2:])) for b in item["blocks"]]
            starts = [b[0] for b in item["blocks"]]
            if self.rule.write is None:
                parts += [Text(starts[0] - text_start), part(blocks, pts, self.rule.merge, self._per_second)]
                text_start = starts[-1] + blocks[-1].tokens
            else:  # a grid follows its time, which is text
                for start, block in zip(starts, blocks, strict=True):
                    parts += [Text(start - text_start), Grids(*block.grid)]
                    text_start = start + block.tokens
            for block, block_frames in zip(blocks, _shared_out(frames, blocks), strict=True):
                _, down, across = block.grid
                size = across * self.rule.factor, down * self.rule.factor
                resized = [frame.resize(size, resample=self.processor.resample) for frame in block_frames]
                rows, patched = patches(resized, self.processor, merged=block.kind == "video")
                patch_rows.append(rows)
                grids.append([block.grid[0], *patched])
        placed, _ = positions([*parts, Text(len(ids) - text_start)])
        return ChatRow(
            ids_L=torch.from_numpy(ids.astype(np.int64)),
            labels_L=torch.from_numpy(self.rows.labels(number).astype(np.int64)),
            positions_3L=placed,
            patches=torch.cat(patch_rows) if patch_rows else None,
            grids_B3=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        )

    def _kind(self, token: int) -> Kind:
        return "video" if token == self.rule.pads["video"] else "image"

    def _read_media(self, item: dict[str, Any]) -> tuple[list[Image.Image], list[float]]:
        path = self.media / item["path"]
        return ([open_image(path)], [0.0]) if item["kind"] == "image" else packed_video(path, item)


def _shared_out(frames: list[Image.Image], blocks: list[Block]) -> Iterator[list[Image.Image]]:
    first = 0
    for block in blocks:
        yield frames[first : first + block.frames]
        first += block.frames
