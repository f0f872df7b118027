"""LlavaOnevision: a CLIP or SigLIP tower, a projector with a 2x2 pool, a language model.

The features of a video are in a feature cache, which is written by `encode-video` or here on demand. Frames follow each
other without delimiters and one newline closes the block, or one closes every frame (`frame_separator`; LLaVA-NeXT's
`mm_newline_position` one_token and frame); positions count tokens. In a haystack of hybrid resolution an inserted image
has the resolution of the frame that it precedes; at the end, that of the last frame.

Images have the encoding that `lvctx align` or `import-longva` wrote into config.json. A checkpoint of others has none
there: its own processor encodes its images.

Shapes: F frames, P features a frame, D tower width, N tokens, R rows of the table, E width of the language model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lvctx.artifacts.manifest import read_provenance
from lvctx.cost import CostMeter
from lvctx.errors import InputError, UsageError
from lvctx.models.image_processing import Preprocess
from lvctx.models.loading import load_config, load_tokenizer
from lvctx.models.vision_encoder import TowerFiles, load_tower
from lvctx.models.vlm_assembly import VIDEO_TOKEN, embed_frames, newline_embedding, tokens_per_frame
from lvctx.video.container import check_complete
from lvctx.video.hybrid import Hybrid
from lvctx.video.sampling import FrameSeparator, VideoSampling
from lvctx.vlm.base import VisualInput, sequential_positions
from lvctx.vlm.feature_cache import FeatureCache, is_feature_cache, read_feature_cache
from lvctx.vlm.generic import GenericVLM
from lvctx.vlm.image_tiling import ImageEncoding, embed_image
from lvctx.vlm.token_count import LlavaRule, pooling
from lvctx.vlm.video_encoder import VideoEncoder, resolve_for_tower

PROJECTOR_BATCH = 64
"""Number of frames per batch of the projector: before pooling a frame is four times its tokens."""


class LlavaOnevision:
    """A LlavaOnevision checkpoint."""

    has_feature_cache = True

    def __init__(self, path: Path, *, device: str = "cpu", feature_cache: Path | None = None) -> None:
        """See `open_vlm`."""
        self.path, self.device, self.feature_cache = path, device, feature_cache
        self.config = load_config(path)
        self.meter = CostMeter()
        self.vocabulary = int(self.config.get_text_config().vocab_size)
        """V: the first id that is a row of the table."""
        self._encoders: dict[VideoSampling, VideoEncoder] = {}

    @cached_property
    def tower(self) -> TowerFiles:
        """The files of its vision tower."""
        return TowerFiles.find(self.path)

    @property
    def has_stock_images(self) -> bool:
        """Whether config.json has no image encoding of ours: the model's own processor encodes its images."""
        return getattr(self.config, "image_grid", None) is None

    @cached_property
    def image_encoding(self) -> ImageEncoding:
        """The image encoding that it was trained with."""
        return ImageEncoding.from_config(self.config)

    def resolve(self, sampling: VideoSampling) -> VideoSampling:
        """See `VLM`."""
        return replace(resolve_for_tower(self.tower, _of_features(sampling)), frame_separator=sampling.frame_separator)

    def image_facts(self) -> dict[str, Any]:
        """See `VLM`."""
        if self.has_stock_images:
            return {"image_encoding": "processor"}
        encoding = self.image_encoding
        return {"image_encoding": encoding.grid, "unires_rule": encoding.rule, "max_grids": encoding.max_grids}

    def count(self, frames: int, width: int, height: int, sampling: VideoSampling) -> dict[str, int]:
        """See `VLM`."""
        tokens = sum(block.tokens for block in self.token_rule(sampling).video(width, height, frames))
        newlines = 1 if sampling.frame_separator == "none" else frames
        return {"nominal": tokens, "actual": tokens, "delimiters": newlines, "last_position": tokens + newlines - 1}

    def token_rule(self, sampling: VideoSampling) -> LlavaRule:
        """See `VLM`; only UniRes rows can be packed."""
        vision, encoding = self.config.vision_config, self.image_encoding
        if self.has_stock_images or encoding.grid != "unires":
            how = "without lvctx" if self.has_stock_images else f"with --image-encoding {encoding.grid}"
            raise InputError(f"aligned {how}: only UniRes rows can be packed", where=self.path)
        side = vision.image_size // vision.patch_size
        frame_tokens = ((side + 1) // 2) ** 2
        hybrid = sampling.resolution
        if hybrid is not None and hybrid.tokens != frame_tokens:
            raise UsageError(f"this model's frames have {frame_tokens} tokens, not {hybrid.tokens}", fix="change m")
        if hybrid is not None:
            pooling(side, hybrid.ratio)
        placeholder = load_tokenizer(self.path).get_vocab().get(VIDEO_TOKEN)
        if placeholder is None:
            raise InputError(f"the tokenizer has no {VIDEO_TOKEN}", where=self.path)
        return LlavaRule(
            placeholder=int(placeholder),
            tile=encoding.tile,
            side=side,
            grid_rule=encoding.rule,
            max_grids=encoding.max_grids,
            hybrid=hybrid or Hybrid(tokens=frame_tokens),
        )

    def open_cache(self, path: Path, sampling: VideoSampling) -> FeatureCache:
        """The features of a video file, kept in the folder of feature caches if there is one, or of a feature cache.

        Raises InputError for features of another tower, UsageError for sampling options given for a feature cache.
        """
        sampling = _of_features(sampling)
        if not is_feature_cache(path):
            if sampling not in self._encoders:
                self._encoders[sampling] = VideoEncoder.open(self.path, sampling, device=self.device)
            encoder = self._encoders[sampling]
            if self.feature_cache is None:
                return encoder.read(path, self.meter)
            encoded = encoder.encode(path, self._folder(encoder, path), meter=self.meter)
            return read_feature_cache(Path(encoded["path"]))
        cache = read_feature_cache(path, model=str(self.path))
        if cache.provenance["inputs"].get("tower") != self.tower.fingerprint:
            fix = f"lvctx encode-video VIDEO --model {self.path}"
            raise InputError("features of another vision tower", where=path, fix=fix)
        if sampling != VideoSampling():
            raise UsageError("sampling options do not apply to encoded features", where=path, fix="drop them")
        return cache

    def _folder(self, encoder: VideoEncoder, video: Path) -> Path:
        """The cache folder, or a subfolder if it has a video of this name that was encoded differently."""
        assert self.feature_cache is not None
        check_complete(video, allow_partial=encoder.config.sampling.allow_partial)
        provenance = encoder.provenance(video)
        stored = read_provenance(encoder.target(video, self.feature_cache, provenance.inputs["video"]))
        if stored is None or stored.get("config_hash") == provenance.config_hash:
            return self.feature_cache
        return self.feature_cache / provenance.config_hash[:16]

    def load(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> VisualInput:
        """See `VLM`."""
        images = sum(isinstance(item, Image.Image) for item in items)
        if images and self.has_stock_images:
            return self._load_as_stock(items, sampling)
        alone = images == 1
        embed: list[Callable[[Any], Tensor]] = []
        blocks: list[np.ndarray] = []
        caches: list[FeatureCache] = []
        first = self.vocabulary
        for item in items:
            if isinstance(item, Image.Image):
                embed.append(self._image_embedder(item, alone=alone))
                blocks.append(first + np.arange(self.image_encoding.tokens_of(*item.size, alone=alone)))
            else:
                cache = self.open_cache(item, sampling)
                caches.append(cache)
                embed.append(_video_embedder(cache))
                tokens = cache.frame_tokens(tokens_per_frame(self.config))
                rows = FrameRows(vocabulary=first, tokens=tokens, separator=sampling.frame_separator)
                blocks.append(rows.ids(np.arange(len(tokens))))
            first = int(blocks[-1].max()) + 1
        facts: dict[str, Any] = {"visual_tokens": sum(map(len, blocks))}
        if len(caches) == len(items) == 1:
            cache_facts = caches[0].provenance.get("facts", {})
            facts = {
                "video_sha256": caches[0].provenance["inputs"].get("video", "")[:16],
                "frames": len(caches[0].pts),
                "visual_tokens": first - self.vocabulary - 1,
                "corrupt_frames": cache_facts.get("corrupt", 0),
                **({"partial": True} if cache_facts.get("partial") else {}),
            }
        return VisualInput(
            ids_N=np.concatenate(blocks),
            table=lambda model: torch.cat([block(model) for block in embed]),
            placeholder=VIDEO_TOKEN,
            tokens=facts["visual_tokens"],
            pts=tuple(t for cache in caches for t in cache.pts.tolist()),
            facts=facts,
        )

    def _load_as_stock(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> VisualInput:
        """Images, and files of videos among them, as the model's own processor and code encode them."""
        if any(isinstance(item, Path) and is_feature_cache(item) for item in items):
            what = "this model's processor encodes images together with the video itself, not with its features"
            raise UsageError(what, where=self.path, fix="give the video file")
        stock = GenericVLM(self.path, device=self.device)
        stock.meter = self.meter
        return stock.load(items, replace(sampling, frame_mode=None))

    def _image_embedder(self, image: Image.Image, *, alone: bool) -> Callable[[Any], Tensor]:
        @torch.inference_mode()
        def embed(model: Any) -> Tensor:
            newline_E, preprocess = newline_embedding(model)[0], Preprocess.from_directory(self.path)
            return embed_image(model, image, newline_E, self.image_encoding, preprocess, alone=alone, tower_grad=False)

        return embed

    def haystack(self, files: Sequence[Path], sampling: VideoSampling, *, as_images: bool) -> "LlavaHaystack":
        """See `VLM`: feature caches or video files."""
        if as_images:
            raise UsageError("this model needs a video haystack", where="--as-images", fix="drop it, or use a Qwen-VL")
        caches = [self.open_cache(file, sampling) for file in files]
        return LlavaHaystack(self, caches, separator=sampling.frame_separator)


def _of_features(sampling: VideoSampling) -> VideoSampling:
    """The part of the options that decides the features of frames."""
    return replace(sampling, frame_separator="none")


def _video_embedder(cache: FeatureCache) -> Callable[[Any], Tensor]:
    @torch.inference_mode()
    def embed(model: Any) -> Tensor:
        embedded = [embed_frames(model, *batch) for batch in cache.batches(PROJECTOR_BATCH)]
        return torch.cat([*embedded, newline_embedding(model).to(embedded[0].device)])

    return embed


class LlavaHaystack:
    """Consecutive feature caches."""

    def __init__(self, vlm: LlavaOnevision, caches: Sequence[FeatureCache], *, separator: FrameSeparator) -> None:
        self.vlm, self.caches, self.separator = vlm, caches, separator
        self.seconds = joined_times([cache.pts.numpy() for cache in caches])
        self.image_size = int(vlm.config.vision_config.image_size)

    def grids(self, frames: int) -> list[tuple[int, int]]:
        """Rows and columns of the first frames' tokens."""
        side = math.isqrt(tokens_per_frame(self.vlm.config))
        grids = [
            (side, side) if cache.grid is None else (int(cache.grid[i, 0]), int(cache.grid[i, 1]))
            for cache in self.caches
            for i in range(len(cache.pts))
        ]
        return grids[:frames]

    def tokens(self, frames: int, images: Sequence[Image.Image]) -> "LlavaTokens":
        """See `Haystack`."""
        return LlavaTokens(self, frames, images)


class LlavaTokens:
    """See `VisualTokens`. The table has the frames, every inserted image in each size, and the newline."""

    placeholder, frames_per_grid = VIDEO_TOKEN, 1

    def __init__(self, haystack: LlavaHaystack, frames: int, images: Sequence[Image.Image]) -> None:
        self.haystack, self.frames, self.images = haystack, frames, images
        grids = haystack.grids(frames)
        self.grids = sorted(set(grids), reverse=True)
        """The distinct sizes of frames, finest first."""
        self._layout = FrameRows(
            vocabulary=haystack.vlm.vocabulary,
            tokens=[rows * columns for rows, columns in grids],
            sizes=[rows * columns for rows, columns in self.grids],
            inserted=len(images),
            separator=haystack.separator,
        )
        separated = {} if haystack.separator == "none" else {"frame_separator": haystack.separator}
        self.facts = {"tokens_per_frame": self._layout.sizes, **separated}

    def ids(self, order_F: np.ndarray) -> np.ndarray:
        """See `VisualTokens`."""
        return self._layout.ids(order_F)

    positions = staticmethod(sequential_positions)

    @torch.inference_mode()
    def table(self, model: Any) -> Tensor:
        """See `VisualTokens`."""
        rows, remaining = [], self.frames
        for cache in self.haystack.caches:
            rows += [embed_frames(model, *batch) for batch in cache.batches(PROJECTOR_BATCH, remaining)]
            remaining -= min(remaining, len(cache.pts))
        if self.images:
            # Needles are made square like the haystack's frames.
            mode = self.haystack.caches[0].provenance["config"].get("frame_mode", "pad")
            with self.haystack.vlm.meter.phase(None):
                tower = load_tower(self.haystack.vlm.path, dtype=model.dtype, device=str(model.device))
            features = tower.encode_images([tower.preprocess.square(image, mode) for image in self.images])
            even = all(cache.grid is None for cache in self.haystack.caches)
            sizes = [None if even else torch.tensor([grid] * len(self.images)) for grid in self.grids]
            inserted = [embed_frames(model, features, size).unflatten(0, (len(self.images), -1)) for size in sizes]
            rows.append(torch.cat(inserted, 1).flatten(0, 1))
        return torch.cat([*rows, newline_embedding(model)])


class FrameRows:
    """The rows of each frame in a table, which has one row more for the newline."""

    def __init__(
        self,
        *,
        vocabulary: int,
        tokens: Sequence[int],
        sizes: Sequence[int] = (),
        inserted: int = 0,
        separator: FrameSeparator = "none",
    ) -> None:
        """`tokens` are those of each frame of the video; every inserted image has rows for each of `sizes`."""
        self._tokens, self.sizes, self._separator = np.asarray(tokens), list(sizes), separator
        self._starts = vocabulary + np.cumsum(self._tokens) - self._tokens
        self._inserted = vocabulary + int(self._tokens.sum())
        self._newline = self._inserted + inserted * sum(sizes)

    def ids(self, order_F: np.ndarray) -> np.ndarray:
        """The block of these frames in this order, closed by the newline, as is every frame with a separator."""
        is_haystack = order_F < len(self._tokens)
        rows = np.minimum(order_F, len(self._tokens) - 1)
        counts, starts = self._tokens[rows], self._starts[rows]
        for index in np.flatnonzero(~is_haystack)[::-1]:
            # At the end it is the haystack's last frame.
            previous = counts[:index][is_haystack[:index]][-1:]
            counts[index] = counts[index + 1] if index + 1 < len(counts) else [*previous, self._tokens[-1]][0]
            offset = sum(self.sizes[: self.sizes.index(int(counts[index]))])
            starts[index] = self._inserted + (int(order_F[index]) - len(self._tokens)) * sum(self.sizes) + offset
        offsets = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = np.cumsum(counts)
        ends = ends[-1:] if self._separator == "none" else ends
        return np.insert(np.repeat(starts, counts) + offsets, ends, self._newline)


def joined_times(times: Sequence[np.ndarray]) -> np.ndarray:
    """Timestamps of the frames in seconds; each video starts one of its own steps after the end of the previous one."""
    parts: list[np.ndarray] = []
    for pts in times:
        step = float(np.median(np.diff(pts))) if len(pts) > 1 else 1.0
        parts.append(pts if not parts else pts - pts[0] + parts[-1][-1] + step)
    return np.concatenate(parts)
