"""How a model sees a haystack of frames: what it reads, and the ids, embeddings and positions its language model gets.

This is the seam for another family of VLMs: one needs a class with what `Eyes` asks for, and a line in `open_eyes`.

Shapes: E width of the language model, R rows of the table.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from lvctx.artifacts.frames import Frames, read_frames
from lvctx.bench.prefix import Positions, count_up
from lvctx.bench.video_niah import EvenFrames, Layout, MixedFrames, visual_table
from lvctx.errors import InputError, UsageError
from lvctx.model.load import VLM_TYPE, load_config
from lvctx.model.qwen_vl import TIMED, TYPES
from lvctx.model.vlm import embed_frames, newline_embedding, tokens_per_frame
from lvctx.vision.hybrid import Hybrid
from lvctx.vision.tower import TowerFiles, load_tower

BATCH = 64
"""Frames that go through the projector at once: before its pooling a frame is four times its tokens."""


class Eyes(Protocol):
    """A model that sees, and a haystack."""

    image_size: int
    """Side in pixels of a picture that is drawn for it."""
    seconds: np.ndarray
    """When each frame of the haystack is shown; as many as there are whole units of frames."""

    @property
    def positions(self) -> Positions:
        """The language model's."""

    def layout(self, frames: int, inserted: int) -> Layout:
        """How the first `frames` frames and `inserted` pictures become ids."""

    def table(self, model: Any, frames: int, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embeddings (R, E) of the rows that the layout's ids stand for, of these frames and pictures."""


def open_eyes(
    path: Path,
    *,
    name: str,
    tokenizer: Any,
    files: Sequence[Path],
    fps: float | None,
    hybrid: Hybrid | None,
    apart: bool = False,
    allow_partial: bool = False,
) -> Eyes:
    """The eyes of the model in directory `path`, which the user calls `name`, on a haystack of `files` in order.

    `fps`, `hybrid`, `apart` and `allow_partial` are for models that read video files; None is a frame a second, and
    uniform resolution.
    Raises UsageError where the model cannot see or has no use for them, InputError for files that it cannot read.
    """
    kind = load_config(path).model_type
    if kind in TYPES + TIMED:
        from lvctx.bench.qwen_eyes import QwenEyes

        options: dict[str, Any] = {"fps": fps or 1.0, "hybrid": hybrid, "apart": apart, "allow_partial": allow_partial}
        return QwenEyes(path, tokenizer=tokenizer, files=files, **options)
    if kind != VLM_TYPE:
        raise UsageError(
            f"{name} is a language model and cannot see", fix="give a model that align wrote, or a Qwen2-VL"
        )
    if fps is not None or hybrid is not None or apart or allow_partial:
        flags = "--fps, --hybrid, --apart and --allow-partial"
        raise UsageError(f"{name} reads encoded frames as they are", fix=f"drop {flags}")
    return LlavaEyes(path, name=name, files=files)


class LlavaEyes:
    """A CLIP or SigLIP tower, our frames artifacts, a projector and a 2x2 pool: stock LlavaOnevision."""

    positions: Positions = staticmethod(count_up)

    def __init__(self, path: Path, *, name: str, files: Sequence[Path]) -> None:
        self.path = path
        config = load_config(path)
        self.per_frame = tokens_per_frame(config)
        """Language-model tokens of a frame."""
        self.vocabulary = int(config.get_text_config().vocab_size)
        """The first id that is a row of the table."""
        self.image_size = int(config.vision_config.image_size)
        tower = TowerFiles.find(path).fingerprint
        self.frames: list[Frames] = []
        for file in files:
            one = read_frames(file, model=name)
            if one.provenance["inputs"].get("tower") != tower:
                raise InputError("frames of another tower", where=file, fix=f"lvctx encode-video VIDEO --model {name}")
            self.frames.append(one)
        self.seconds = timeline(self.frames)

    def layout(self, frames: int, inserted: int) -> Layout:
        """See `Eyes.layout`."""
        grids = self._grids(frames)
        if not grids:
            return EvenFrames(vocabulary=self.vocabulary, per_frame=self.per_frame, shown=frames + inserted)
        tokens, sizes = ([rows * columns for rows, columns in some] for some in (grids, _distinct(grids)))
        return MixedFrames(vocabulary=self.vocabulary, tokens=tokens, sizes=sizes, inserted=inserted)

    def _grids(self, frames: int) -> list[tuple[int, int]]:
        """Rows and columns of the first frames' tokens; nothing where all artifacts are of uniform resolution."""
        if all(one.grid is None for one in self.frames):
            return []
        side = math.isqrt(self.per_frame)
        found = [
            (side, side) if one.grid is None else (int(one.grid[i, 0]), int(one.grid[i, 1]))
            for one in self.frames
            for i in range(len(one.pts))
        ]
        return found[:frames]

    @torch.inference_mode()
    def table(self, model: Any, frames: int, images: Sequence[Image.Image]) -> torch.Tensor:
        """See `Eyes.table` and `visual_table`."""
        sizes: Sequence[tuple[int, int] | None] = _distinct(self._grids(frames)) or [None]
        hay = []
        for one in self.frames:
            hay += [embed_frames(model, *batch) for batch in one.batches(BATCH, frames)]
            frames -= min(frames, len(one.pts))
        # Needles become squares the way the haystack's frames did.
        mode = self.frames[0].provenance["config"].get("frame_mode", "pad")
        tower = load_tower(self.path, dtype=model.dtype, device=str(model.device))
        seen = tower.see([tower.preprocess.square(image, mode) for image in images])
        grids = [None if size is None else torch.tensor([size] * len(images)) for size in sizes]
        inserted = [embed_frames(model, seen, grid).unflatten(0, (len(images), -1)) for grid in grids]
        return visual_table(torch.cat(hay), torch.cat(inserted, 1).flatten(0, 1), newline_embedding(model))


def _distinct(grids: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Each grid once, the finest first."""
    return sorted(set(grids), reverse=True)


def timeline(frames: Sequence[Frames]) -> np.ndarray:
    """When each frame is shown, in seconds: a video that follows another begins one of its own steps after its end."""
    parts: list[np.ndarray] = []
    for one in frames:
        pts = one.pts.numpy()
        step = float(np.median(np.diff(pts))) if len(pts) > 1 else 1.0
        parts.append(pts if not parts else pts - pts[0] + parts[-1][-1] + step)
    return np.concatenate(parts)
