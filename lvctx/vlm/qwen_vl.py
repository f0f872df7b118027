"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: whole frames, merged in pairs, with M-RoPE positions of our own.

A video is sampled at a rate, sized by hybrid resolution, and its grids go through the model's own tower. Stock
generation is not used: it asks the model for positions, and transformers 5.3 and later give it wrong ones after a video
(`positions/mrope_ids.py`).

In a haystack an inserted image is a grid of the video: where two frames are merged it is shown for both, so that it has
a grid to itself, and groups of hybrid resolution are counted with it among them. A frame's time is its number in that
sequence over the rate. As images, every frame has delimiters around it and positions that go on by its height or width
(Visual Haystacks; GIRAFFE section 3.1), so positions grow much faster than in a video.

Shapes: F frames, N tokens, E width of the language model, R rows of the table.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lvctx.artifacts.store import read_json, sha256_file
from lvctx.errors import InputError, UsageError
from lvctx.model.load import load_config, load_image_processor, load_tokenizer
from lvctx.positions.mrope_ids import Rules
from lvctx.vision.decode import Count, Frame, bounded, count_frames, read_video
from lvctx.vision.hybrid import Hybrid, select_high, thumbnail
from lvctx.vision.images import image_size, open_image
from lvctx.vision.sampling import VideoSampling
from lvctx.vision.tokens import Block, QwenRule
from lvctx.vlm.base import VisualInput
from lvctx.vlm.grid_table import Grid, GridTable, empty_table, encode_grids
from lvctx.vlm.qwen_frames import (
    SampledVideo,
    blocks_of,
    check_reachable,
    count_video,
    resize_frames,
    runs_of,
)

IMAGES = (".png", ".jpg", ".jpeg")
"""What is read of a folder, in the order of names; `lvctx niah haystack` writes such."""
MAX_FRAMES = 768
"""Frames of a video at most; the processor's own default."""


class QwenVL:
    """A Qwen2-VL or Qwen2.5-VL checkpoint."""

    writes_times = False
    """Whether the time of each grid is written in text before it."""

    def __init__(self, path: Path, *, device: str = "cpu", feature_cache: Path | None = None) -> None:
        """See `open_vlm`; nothing of this family is cached, as resolution decides what its tower computes."""
        self.path, self.config = path, load_config(path)
        self.seconds_to_positions = Rules.of(self.config).tokens_per_second

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.path)

    @cached_property
    def processor(self) -> Any:
        """The model's own image processor."""
        return load_image_processor(self.path)

    def resolve(self, sampling: VideoSampling) -> VideoSampling:
        """See `VLM`: two frames per second (GIRAFFE), at most 768; uniform resolution at 240 tokens a grid."""
        if sampling.fps == "native" or sampling.frame_mode is not None:
            raise UsageError("Qwen-VL takes frames whole, at a rate", fix="drop --frame-mode; give --fps a number")
        hybrid = sampling.resolution or Hybrid()
        check_reachable(hybrid)
        if self.writes_times and hybrid.mode != "pair":
            raise UsageError(f"--hybrid-mode {hybrid.mode}: this model reads pairs of frames", fix="drop it")
        rate = sampling.frames is None
        return replace(
            sampling,
            fps=(sampling.fps or 2.0) if rate else None,
            max_frames=(sampling.max_frames or MAX_FRAMES) if rate else None,
            hybrid=hybrid,
            hybrid_mode=hybrid.mode,
            decoder="decord" if sampling.decoder == "decord" else "pyav",
        )

    def image_facts(self) -> dict[str, Any]:
        """See `VLM`."""
        return {"image_encoding": "whole"}

    def token_rule(self, sampling: VideoSampling) -> QwenRule:
        """See `VLM`."""
        return self.rule(sampling.resolution or Hybrid())

    def rule(self, hybrid: Hybrid) -> QwenRule:
        """How many tokens an image or a video of this resolution has, from the tokenizer's and processor's files."""
        vision, file = self.config.vision_config, self.path / "preprocessor_config.json"
        pixels = read_json(file) if file.is_file() else {}
        size = pixels.get("size") if isinstance(pixels.get("size"), dict) else {}
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
        )

    def _id(self, token: str) -> int:
        found = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise InputError(f"the tokenizer has no {token}", where=self.path)
        return int(found)

    def count(self, frames: int, width: int, height: int, sampling: VideoSampling) -> dict[str, int]:
        """See `VLM`."""
        rate = sampling.fps if isinstance(sampling.fps, float | int) else 1.0
        seconds = self.seconds_to_positions
        return count_video(
            frames, width, height, self.token_rule(sampling), fps=rate, tokens_per_second=seconds
        )._asdict()

    def load(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> VisualInput:
        """See `VLM`; of a video only the resized frames are in memory."""
        sampling = self.resolve(sampling)
        read = [item if isinstance(item, Image.Image) else self._read(item, sampling) for item in items]
        shown = self.visual_input([item if isinstance(item, Image.Image) else item[0] for item in read], sampling)
        videos = [item for item in read if not isinstance(item, Image.Image)]
        if len(videos) == len(items) == 1:
            (video, facts), (path,) = videos[0], items
            assert isinstance(path, Path)
            shown.facts.update(
                video_sha256=sha256_file(path)[:16],
                frames=len(video.frames),
                high_frames=sum(video.high),
                frame_size=list(video.frames[0].size),
                corrupt_frames=facts.get("corrupt", 0),
                **({"partial": True} if facts.get("partial") else {}),
            )
        return shown

    def _read(self, path: Path, sampling: VideoSampling) -> tuple[SampledVideo, dict[str, Any]]:
        reader = read_video(path, bounded(path, sampling))
        return self.resize(reader, sampling), reader.facts

    def resize(self, frames: Iterable[Frame], sampling: VideoSampling) -> SampledVideo:
        """Frames at the sizes that the model takes."""
        timed = ((frame.pts, frame.image) for frame in frames)
        rule = self.token_rule(sampling)
        return resize_frames(timed, rule, threshold=sampling.threshold, resample=self.processor.resample)

    def visual_input(self, items: Sequence[SampledVideo | Image.Image], sampling: VideoSampling) -> VisualInput:
        """Resized videos, and images at the size that the model takes, in order."""
        rule, frames, parts = self.token_rule(sampling), list[Image.Image](), list[np.ndarray]()
        pts: list[float] = []
        tokens = 0
        grids = self.grid_table(rule, lambda numbers: [pts[n] for n in numbers])
        for item in items:
            if isinstance(item, Image.Image):
                blocks = rule.image(*item.size)
                _, down, across = blocks[0].grid
                size = across * rule.factor, down * rule.factor
                sized, times = [item.resize(size, resample=self.processor.resample)], [0.0]
            else:
                blocks, sized, times = item.blocks, item.frames, item.pts
            pts += times
            parts.append(grids.ids(range(len(frames), len(frames) + len(sized)), blocks))
            frames += sized
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
        """An empty table; `times(numbers)` is when these frames are shown, in seconds."""
        return GridTable(
            rule,
            vocabulary=int(self.config.get_text_config().vocab_size),
            tokens_per_second=self.seconds_to_positions,
            times=times,
            write=partial(self.tokenizer.encode, add_special_tokens=False) if self.writes_times else None,
        )

    def haystack(self, files: Sequence[Path], sampling: VideoSampling, *, as_images: bool) -> "QwenHaystack":
        """See `VLM`: video files, or folders of images."""
        return QwenHaystack(self, files, sampling, as_images=as_images)


class Qwen3VL(QwenVL):
    """A Qwen3-VL checkpoint: times in text, and every grid an item of its own."""

    writes_times = True


class QwenHaystack:
    """Video files or folders of images, read when the table is made, and never kept."""

    def __init__(self, vlm: QwenVL, files: Sequence[Path], sampling: VideoSampling, *, as_images: bool) -> None:
        """Of a video the first frame is decoded, and all where its packets do not tell how many there are."""
        self.natural_size = as_images and sampling.resolution is None
        if sampling.fps is None and sampling.frames is None:
            sampling = replace(sampling, fps=1.0)  # V-NIAH's
        sampling = replace(vlm.resolve(sampling), max_frames=None)
        if as_images and not self.natural_size:
            sampling = replace(sampling, hybrid_mode="image")
        hybrid = sampling.resolution or Hybrid()
        if hybrid.mode == "literal" and not hybrid.uniform:
            raise UsageError("--hybrid-mode literal merges a needle with its neighbours", fix="pair, or image")
        if sampling.fps is None:
            raise UsageError("a haystack is sampled at a rate", where="--frames", fix="give --fps")
        self.vlm, self.files, self.sampling, self.as_images = vlm, tuple(files), sampling, as_images
        self.fps = float(sampling.fps)
        self.rule = vlm.rule(hybrid)
        self.unit = 1 if as_images or hybrid.mode == "image" else self.rule.merge
        counted = [_count(file, sampling) for file in self.files]
        self.size = (counted[0].width, counted[0].height)
        """Of the source's frames, in pixels."""
        self._check_sizes(counted)
        partial_files = [str(file) for file, count in zip(self.files, counted, strict=True) if count.partial]
        total = sum(count.frames for count in counted) // self.unit * self.unit
        self.seconds = np.arange(total) / self.fps
        self.image_size = min(self.size)
        self.facts = {
            "positions": "mrope",
            "fps": self.fps,
            "hybrid": [hybrid.group, hybrid.tokens, hybrid.ratio],
            "hybrid_mode": hybrid.mode,
            "tokens_per_second": vlm.seconds_to_positions,
            "source_size": list(self.size),
            **({"change_threshold": sampling.threshold} if sampling.threshold is not None else {}),
            **({"partial": partial_files} if partial_files else {}),
            **({"as_images": True, "natural_size": self.natural_size} if as_images else {}),
        }

    def _check_sizes(self, counted: Sequence[Count]) -> None:
        sizes = {block.grid[1:] for block in self.blocks(*self.size, 2 * self.rule.merge)}
        for file, one in zip(self.files, counted, strict=True):
            if {block.grid[1:] for block in self.blocks(one.width, one.height, 2 * self.rule.merge)} != sizes:
                what = f"{one.width} x {one.height} pixels beside {self.size[0]} x {self.size[1]}"
                raise InputError(what, where=file, fix="give one shape")

    def blocks(self, width: int, height: int, count: int) -> list[Block]:
        """What so many frames of a size are for the model, groups counted from the first."""
        return self.rule.image(width, height) * count if self.natural_size else self.rule.video(width, height, count)

    def read(self) -> Iterator[Image.Image]:
        """All frames in order."""
        return chain.from_iterable(_frames(file, self.sampling) for file in self.files)

    def as_frame(self, image: Image.Image) -> Image.Image:
        """An image as a frame of the source, so that it keeps its shape as the frames keep theirs."""
        background = tuple(round(255 * mean) for mean in self.vlm.processor.image_mean)
        return ImageOps.pad(image, self.size, color=background)

    def tokens(self, frames: int, images: Sequence[Image.Image]) -> "QwenTokens":
        """See `Haystack`."""
        return QwenTokens(self, frames, [self.as_frame(image) for image in images])


class QwenTokens:
    """See `VisualTokens`."""

    def __init__(self, haystack: QwenHaystack, frames: int, inserted: Sequence[Image.Image]) -> None:
        self.haystack, self.frames, self.inserted = haystack, frames, inserted
        self.placeholder, self.frames_per_grid = haystack.rule.mark("video"), haystack.unit
        self.facts = haystack.facts
        fps = haystack.fps
        self.grids = haystack.vlm.grid_table(haystack.rule, lambda numbers: (np.arange(len(numbers)) / fps).tolist())
        self.positions = self.grids.positions

    @cached_property
    def _thumbnails(self) -> list[np.ndarray]:
        read = islice(self.haystack.read(), self.frames)
        return [thumbnail(np.asarray(image)) for image in chain(read, self.inserted)]

    def _blocks(self, order: Sequence[int]) -> list[Block]:
        threshold, rule = self.haystack.sampling.threshold, self.haystack.rule
        if threshold is None:
            return self.haystack.blocks(*self.haystack.size, len(order))
        is_high = select_high(rule.hybrid, merge=rule.merge, threshold=threshold)
        high = [is_high(place, self._thumbnails[number]) for place, number in enumerate(order)]
        return blocks_of(runs_of(high, rule), rule, *self.haystack.size)

    def ids(self, order_F: np.ndarray) -> np.ndarray:
        """See `VisualTokens`."""
        order = order_F.tolist()
        blocks = self._blocks(order)
        if not self.haystack.as_images:
            return self.grids.ids(order, blocks)
        # A needle has the size of the frame whose place it takes, as in a video.
        return np.concatenate([self.grids.ids([n], [block]) for n, block in zip(order, blocks, strict=True)])

    def table(self, model: Any) -> torch.Tensor:
        """See `VisualTokens`: the grids of all sequences so far. Frames are decoded once and not kept."""
        vlm, frames = self.haystack.vlm, self.frames
        table_RE = empty_table(model, self.grids)
        waiting: dict[int, list[Grid]] = defaultdict(list)
        for grid in self.grids.grids:
            waiting[grid.pictures[-1]].append(grid)
        held: dict[int, Image.Image] = {}
        ready: list[Grid] = []

        def take(number: int, size: tuple[int, int]) -> Image.Image:
            image = held[number] if number < frames else self.inserted[number - frames]
            return image.resize(size, resample=vlm.processor.resample)

        def encode() -> None:
            by_size = sorted(ready, key=lambda grid: grid[1:])
            encode_grids(model, vlm.processor, self.grids, table_RE, by_size, take)

        for number, image in enumerate(islice(self.haystack.read(), frames)):
            held[number] = image
            ready += waiting.pop(number, [])
            if len(held) == 16 * self.frames_per_grid:
                encode()
                held, ready = {}, []
        missing = [number for number in waiting if number < frames]
        if missing:
            last = self.haystack.files[-1]
            raise InputError(f"ends before frame {min(missing)}", where=last, fix="is the file whole?")
        ready += [grid for grids in waiting.values() for grid in grids]
        encode()
        return table_RE


def _count(file: Path, sampling: VideoSampling) -> Count:
    """Size and number of frames of a video or a folder of images."""
    if not file.is_dir():
        return count_frames(file, sampling)
    images = _listed(file)
    if not images:
        raise InputError("no image in it", where=file, fix=f"put {' or '.join(IMAGES)} there")
    width, height = image_size(images[0])
    duration = len(images) / float(sampling.fps or 1)
    return Count(frames=len(images), exact=True, width=width, height=height, duration=duration)


def _listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)


def _frames(file: Path, sampling: VideoSampling) -> Iterator[Image.Image]:
    if file.is_dir():
        yield from map(open_image, _listed(file))
    else:
        yield from (Image.fromarray(frame.image) for frame in read_video(file, sampling))
