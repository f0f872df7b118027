"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: whole frames, merged in pairs, with M-RoPE positions computed here.

A video is sampled at a rate, resized by hybrid resolution, and its grids are encoded by the model's own tower. Stock
generation is not used: it lets the model compute positions, and transformers 5.3 and later compute wrong ones after a
video (`rope/mrope_positions.py`).

Shapes: F frames, N tokens, E width of the language model, R rows of the table.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from lvctx.artifacts.store import read_json, sha256_file
from lvctx.cost import CostMeter
from lvctx.errors import InputError, UsageError
from lvctx.models.loading import load_config, load_image_processor, load_tokenizer
from lvctx.rope.mrope_positions import tokens_per_second
from lvctx.video.frame_count import bounded
from lvctx.video.hybrid import Hybrid
from lvctx.video.reader import Frame, read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.base import VisualInput
from lvctx.vlm.grid_table import GridTable, empty_table, encode_grids
from lvctx.vlm.qwen_frames import SampledVideo, check_reachable, count_video, resize_frames
from lvctx.vlm.qwen_haystack import QwenHaystack
from lvctx.vlm.token_count import QwenRule

MAX_FRAMES = 768
"""Maximum frames of a video; the processor's own default."""


class QwenVL:
    """A Qwen2-VL or Qwen2.5-VL checkpoint."""

    writes_times = False
    """Whether the time of each grid precedes it as text."""
    has_feature_cache = False

    def __init__(self, path: Path, *, device: str = "cpu", feature_cache: Path | None = None) -> None:
        """See `open_vlm`; this family has no feature cache, since its tower's output depends on the resolution."""
        self.path, self.config = path, load_config(path)
        self.vocabulary = int(self.config.get_text_config().vocab_size)
        self.meter = CostMeter()
        self.seconds_to_positions = tokens_per_second(self.config)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        with self.meter.phase(None):
            return load_tokenizer(self.path)

    @cached_property
    def processor(self) -> Any:
        """The model's own image processor."""
        with self.meter.phase(None):
            return load_image_processor(self.path)

    def resolve(self, sampling: VideoSampling) -> VideoSampling:
        """See `VLM`: two frames per second (GIRAFFE), at most 768; uniform resolution at 240 tokens a grid."""
        if sampling.fps == "native" or sampling.frame_mode is not None:
            raise UsageError("Qwen-VL needs whole frames at a rate", fix="drop --frame-mode; give --fps a number")
        sampling.refuse_separator("Qwen-VL has its own delimiters")
        hybrid = sampling.resolution or Hybrid()
        check_reachable(hybrid)
        self._check_mode(hybrid)
        rate = sampling.fps is not None or sampling.has_default_rate
        return replace(
            sampling,
            fps=(sampling.fps or 2.0) if rate else None,
            max_frames=(sampling.max_frames or MAX_FRAMES) if rate else None,
            hybrid=hybrid,
            hybrid_mode=hybrid.mode,
            decoder="decord" if sampling.decoder == "decord" else "pyav",
        )

    def _check_mode(self, hybrid: Hybrid) -> None:
        if self.writes_times and hybrid.mode != "pair":
            raise UsageError(f"--hybrid-mode {hybrid.mode}: this model merges pairs of frames", fix="drop it")

    def image_facts(self) -> dict[str, Any]:
        """See `VLM`."""
        return {"image_encoding": "whole"}

    def token_rule(self, sampling: VideoSampling) -> QwenRule:
        """See `VLM`."""
        return self.rule(sampling.resolution or Hybrid())

    def rule(self, hybrid: Hybrid) -> QwenRule:
        """The token count for images and videos of this resolution, from the tokenizer's and processor's files."""
        self._check_mode(hybrid)
        vision = self.config.vision_config
        pixels, file = _image_settings(self.path)
        configured = pixels.get("size")
        size: dict[str, Any] = configured if isinstance(configured, dict) else {}
        least = pixels.get("min_pixels") or size.get("shortest_edge", QwenRule.min_pixels)
        most = pixels.get("max_pixels") or size.get("longest_edge", QwenRule.max_pixels)
        if not (isinstance(least, int) and isinstance(most, int) and 0 < least <= most):
            raise InputError(
                f"images of {least!r} to {most!r} pixels", where=file, fix="correct min_pixels and max_pixels"
            )
        return QwenRule(
            start=self._id("<|vision_start|>"),
            end=self._id("<|vision_end|>"),
            pads={"image": self._id("<|image_pad|>"), "video": self._id("<|video_pad|>")},
            hybrid=hybrid,
            min_pixels=least,
            max_pixels=most,
            factor=vision.patch_size * vision.spatial_merge_size,
            merge=vision.temporal_patch_size,
            write=partial(self.tokenizer.encode, add_special_tokens=False) if self.writes_times else None,
        )

    def _id(self, token: str) -> int:
        token_id = self.tokenizer.get_vocab().get(token)
        if token_id is None:
            raise InputError(f"the tokenizer has no {token}", where=self.path)
        return int(token_id)

    def count(self, frames: int, width: int, height: int, sampling: VideoSampling) -> dict[str, int]:
        """See `VLM`."""
        rate = sampling.fps if isinstance(sampling.fps, float | int) else 1.0
        seconds = self.seconds_to_positions
        return count_video(
            frames, width, height, self.token_rule(sampling), fps=rate, tokens_per_second=seconds
        )._asdict()

    def load(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> VisualInput:
        """See `VLM`; only the resized frames of a video are in memory."""
        sampling = self.resolve(sampling)
        loaded = [item if isinstance(item, Image.Image) else self._read(item, sampling) for item in items]
        visual = self.visual_input([item if isinstance(item, Image.Image) else item[0] for item in loaded], sampling)
        videos = [item for item in loaded if not isinstance(item, Image.Image)]
        if len(videos) == len(items) == 1:
            (video, facts), (path,) = videos[0], items
            assert isinstance(path, Path)
            visual.facts.update(
                video_sha256=sha256_file(path)[:16],
                frames=len(video.frames),
                high_frames=sum(video.high),
                runs=len(video.runs),
                nominal_tokens=video.nominal,
                delimiters=len(visual.ids_N) - visual.tokens,
                frame_size=list(video.frames[0].size),
                corrupt_frames=facts.get("corrupt", 0),
                **({"partial": True} if facts.get("partial") else {}),
            )
        return visual

    def _read(self, path: Path, sampling: VideoSampling) -> tuple[SampledVideo, dict[str, Any]]:
        reader = read_video(path, bounded(path, sampling))
        return self.resize(self.meter.decoding(reader), sampling), reader.facts

    def resize(self, frames: Iterable[Frame], sampling: VideoSampling) -> SampledVideo:
        """Resize frames to the sizes for the model."""
        timed_frames = ((frame.pts, frame.image) for frame in frames)
        rule = self.token_rule(sampling)
        return resize_frames(timed_frames, rule, threshold=sampling.threshold, resample=self.processor.resample)

    def visual_input(self, items: Sequence[SampledVideo | Image.Image], sampling: VideoSampling) -> VisualInput:
        """The input for resized videos and for images, in order."""
        rule, frames, parts = self.token_rule(sampling), list[Image.Image](), list[np.ndarray]()
        pts: list[float] = []
        tokens = 0
        grids = self.grid_table(rule, lambda numbers: [pts[n] for n in numbers])
        for item in items:
            if isinstance(item, Image.Image):
                blocks = rule.image(*item.size)
                _, down, across = blocks[0].grid
                size = across * rule.factor, down * rule.factor
                resized, times = [item.resize(size, resample=self.processor.resample)], [0.0]
            else:
                blocks, resized, times = item.blocks, item.frames, item.pts
            pts += times
            parts.append(grids.ids(range(len(frames), len(frames) + len(resized)), blocks))
            frames += resized
            tokens += sum(block.tokens for block in blocks)

        def table(model: Any) -> Tensor:
            table_RE = empty_table(model, grids)
            encode_grids(model, self.processor, grids, table_RE, list(grids.grids), lambda number, size: frames[number])
            return table_RE

        return VisualInput(
            ids_N=np.concatenate(parts),
            table=table,
            placeholder=rule.mark("video"),
            positions=grids.positions,
            tokens=tokens,
            pts=tuple(t for item in items if isinstance(item, SampledVideo) for t in item.pts),
            facts={"visual_tokens": tokens},
        )

    def grid_table(self, rule: QwenRule, times: Any) -> GridTable:
        """An empty table; `times(numbers)` are the timestamps of these frames in seconds."""
        return GridTable(rule, vocabulary=self.vocabulary, tokens_per_second=self.seconds_to_positions, times=times)

    def haystack(self, files: Sequence[Path], sampling: VideoSampling, *, as_images: bool) -> QwenHaystack:
        """See `VLM`: video files, or folders of images."""
        return QwenHaystack(self, files, sampling, as_images=as_images)


class Qwen3VL(QwenVL):
    """A Qwen3-VL checkpoint: times are text, and every grid is a separate item."""

    writes_times = True

    def count(self, frames: int, width: int, height: int, sampling: VideoSampling) -> dict[str, int]:
        """Raises InputError: times are text tokens, and their number depends on the times."""
        raise InputError("only videos of Qwen2-VL and Qwen2.5-VL are counted", where=self.path, fix="drop --frames")


def _image_settings(path: Path) -> tuple[dict[str, Any], Path]:
    """The image processor's settings and their file, found as transformers finds them.

    A part of processor_config.json, which transformers 5 writes alone, comes before preprocessor_config.json.
    """
    both = path / "processor_config.json"
    nested = read_json(both).get("image_processor") if both.is_file() else None
    if isinstance(nested, dict):
        return nested, both
    file = path / "preprocessor_config.json"
    return (read_json(file) if file.is_file() else {}), file
