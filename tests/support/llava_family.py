"""A family of VLMs that lvctx does not have: stock LLaVA, every frame an image of so many tokens."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lvctx.artifacts.store import sha256_file
from lvctx.cost import CostMeter
from lvctx.errors import UsageError
from lvctx.models.image_processing import Preprocess
from lvctx.models.loading import load_config
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.base import VisualInput, sequential_positions
from lvctx.vlm.token_count import VisualRule


class StockLlava:
    """See `lvctx.vlm.base.VLM`."""

    has_feature_cache = False

    def __init__(self, path: Path, *, device: str = "cpu", feature_cache: Path | None = None) -> None:
        self.path, self.config, self.meter = path, load_config(path), CostMeter()
        self.vocabulary = int(self.config.get_text_config().vocab_size)
        self.per_frame = (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2

    def resolve(self, sampling: VideoSampling) -> VideoSampling:
        if sampling.hybrid is not None:
            raise UsageError("frames are alike", where="--hybrid")
        return replace(sampling, fps=1.0) if sampling.has_default_rate else sampling

    def image_facts(self) -> dict[str, Any]:
        return {}

    def load(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> VisualInput:
        frames, pts, facts = list[Image.Image](), list[float](), {}
        for item in items:
            if isinstance(item, Image.Image):
                frames.append(item)
            else:
                read = list(read_video(item, self.resolve(sampling)))
                frames += [Image.fromarray(frame.image) for frame in read]
                pts += [frame.pts for frame in read]
                facts = {"video_sha256": sha256_file(item)[:16], "frames": len(read), "corrupt_frames": 0}
        tokens = len(frames) * self.per_frame
        return VisualInput(
            ids_N=self.vocabulary + np.arange(tokens),
            table=lambda model: self.embed(model, frames),
            placeholder="<image>",
            tokens=tokens,
            pts=tuple(pts),
            facts={**facts, "visual_tokens": tokens},
        )

    @torch.inference_mode()
    def embed(self, model: Any, frames: Sequence[Image.Image]) -> torch.Tensor:
        preprocess = Preprocess.from_directory(self.path)
        pixels = preprocess([preprocess.square(frame, "squash") for frame in frames])
        return torch.cat(list(model.model.get_image_features(pixels).pooler_output)).flatten(0, -2)

    def haystack(self, files: Sequence[Path], sampling: VideoSampling, *, as_images: bool) -> "LlavaHaystack":
        return LlavaHaystack(self, files, sampling)

    def count(self, frames: int, width: int, height: int, sampling: VideoSampling) -> dict[str, int]:
        return {"actual": frames * self.per_frame}

    def token_rule(self, sampling: VideoSampling) -> VisualRule:
        raise UsageError("not packed for")


class LlavaHaystack:
    """See `lvctx.vlm.base.Haystack`."""

    def __init__(self, vlm: StockLlava, files: Sequence[Path], sampling: VideoSampling) -> None:
        read = [frame for file in files for frame in read_video(file, vlm.resolve(sampling))]
        self.vlm, self.images = vlm, [Image.fromarray(frame.image) for frame in read]
        self.seconds = np.arange(float(len(read)))
        self.image_size = int(vlm.config.vision_config.image_size)

    def tokens(self, frames: int, images: Sequence[Image.Image]) -> "LlavaTokens":
        return LlavaTokens(self.vlm, [*self.images[:frames], *images])


class LlavaTokens:
    """See `lvctx.vlm.base.VisualTokens`."""

    placeholder, frames_per_grid = "<image>", 1
    positions = staticmethod(sequential_positions)

    def __init__(self, vlm: StockLlava, images: Sequence[Image.Image]) -> None:
        self.vlm, self.images, self.facts = vlm, images, {"tokens_per_frame": vlm.per_frame}

    def ids(self, order_F: np.ndarray) -> np.ndarray:
        rows = order_F[:, None] * self.vlm.per_frame + np.arange(self.vlm.per_frame)
        return self.vlm.vocabulary + rows.ravel()

    def table(self, model: Any) -> torch.Tensor:
        return self.vlm.embed(model, self.images)
