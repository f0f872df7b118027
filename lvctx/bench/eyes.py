"""How a model sees a haystack of frames: which artifacts it can read, and the embeddings its language model gets.

This is the seam for another family of VLMs. One needs a class with what `LlavaEyes` has, and gives `PrefixScorer` its
positions where they do not simply count up (M-RoPE: see `lvctx.bench.prefix.Positions`).

Shapes: F frames, E width of the language model, R rows of the table.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lvctx.artifacts.frames import Frames, read_frames
from lvctx.bench.video_niah import visual_table
from lvctx.errors import InputError, UsageError
from lvctx.model.load import VLM_TYPE, load_config
from lvctx.model.vlm import embed_frames, newline_embedding, tokens_per_frame
from lvctx.vision.tower import TowerFiles, load_tower

BATCH = 64
"""Frames that go through the projector at once: before its pooling a frame is four times its tokens."""


class LlavaEyes:
    """A CLIP or SigLIP tower, our frames artifacts, a projector and a 2x2 pool: stock LlavaOnevision."""

    def __init__(self, path: Path, *, name: str) -> None:
        """Of the model in directory `path`, which the user calls `name`. Raises UsageError where it cannot see."""
        self.path, self.name = path, name
        config = load_config(path)
        if config.model_type != VLM_TYPE:
            raise UsageError(f"{name} is a language model and cannot see", fix="give a model that align wrote")
        self.per_frame = tokens_per_frame(config)
        """Language-model tokens of a frame."""
        self.vocabulary = int(config.get_text_config().vocab_size)
        """The first id that is a row of the table."""
        self.image_size = int(config.vision_config.image_size)
        """Side of a square that the tower reads, in pixels."""

    def open(self, files: Sequence[Path]) -> tuple[Frames, ...]:
        """The haystack's artifacts. Raises InputError for what is none, or was encoded by another tower."""
        tower = TowerFiles.find(self.path).fingerprint
        frames = []
        for file in files:
            one = read_frames(file)
            if one.provenance["inputs"].get("tower") != tower:
                raise InputError(
                    "frames of another tower", where=file, fix=f"lvctx encode-video VIDEO --model {self.name}"
                )
            frames.append(one)
        return tuple(frames)

    @torch.inference_mode()
    def table(self, model: Any, frames: Sequence[Frames], count: int, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embeddings (R, E) of the first `count` frames, of `images`, and of the newline: see `visual_table`."""
        hay = []
        for one in frames:
            features = one.features[:count]
            count -= len(features)
            hay += [embed_frames(model, batch) for batch in features.split(BATCH) if len(batch)]
        # Needles become squares the way the haystack's frames did.
        mode = frames[0].provenance["config"].get("frame_mode", "pad")
        tower = load_tower(self.path, dtype=model.dtype, device=str(model.device))
        squares = [tower.preprocess.square(image, mode) for image in images]
        return visual_table(torch.cat(hay), embed_frames(model, tower.see(squares)), newline_embedding(model))
