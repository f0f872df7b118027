"""A haystack for Qwen-VL: video files or folders of images, with images inserted among their frames.

An inserted image is a separate grid of the video: if two frames are merged, it is repeated for both, and groups of
hybrid resolution include it. A frame's time is its index in that sequence divided by the rate. As images, every frame
has delimiters around it, and positions advance by its height or width (Visual Haystacks; GIRAFFE section 3.1), so
positions grow much faster than in a video.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

from lvctx.errors import InputError, UsageError
from lvctx.video.frame_count import Count
from lvctx.video.hybrid import Hybrid, select_high, thumbnail
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.grid_table import TokenGrid, empty_table, encode_grids
from lvctx.vlm.haystack_files import count_haystack_frames, read_haystack_images
from lvctx.vlm.qwen_frames import blocks_of, runs_of
from lvctx.vlm.token_count import Block

if TYPE_CHECKING:
    from lvctx.vlm.qwen_vl import QwenVL


class QwenHaystack:
    """Video files or folders of images, read when the table is built, and not kept in memory."""

    def __init__(self, vlm: "QwenVL", files: Sequence[Path], sampling: VideoSampling, *, as_images: bool) -> None:
        """The first frame of a video is decoded, or all frames if packets do not give their number."""
        self.natural_size = as_images and sampling.resolution is None
        if sampling.frames is not None or sampling.max_frames is not None or sampling.frames_from is not None:
            raise UsageError(
                "a haystack has to be sampled at a rate",
                where="--frames, --max-frames, --frames-from",
                fix="give --fps",
            )
        if sampling.fps is None:
            sampling = replace(sampling, fps=1.0)  # V-NIAH's
        sampling = replace(vlm.resolve(sampling), max_frames=None)
        if as_images and not self.natural_size:
            sampling = replace(sampling, hybrid_mode="image")
        hybrid = sampling.resolution or Hybrid()
        if hybrid.mode == "literal" and not hybrid.uniform:
            raise UsageError("--hybrid-mode literal merges a needle with its neighbours", fix="pair, or image")
        self.vlm, self.files, self.sampling, self.as_images = vlm, tuple(files), sampling, as_images
        assert sampling.fps is not None
        assert sampling.fps != "native"  # refused above
        self.fps = float(sampling.fps)
        self.rule = vlm.rule(hybrid)
        self.unit = 1 if as_images or hybrid.mode == "image" else self.rule.merge
        counts = [count_haystack_frames(file, sampling) for file in self.files]
        self.size = (counts[0].width, counts[0].height)
        """Size of the source's frames in pixels."""
        self._check_sizes(counts)
        partial_files = [str(file) for file, count in zip(self.files, counts, strict=True) if count.partial]
        total = sum(count.frames for count in counts) // self.unit * self.unit
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

    def _check_sizes(self, counts: Sequence[Count]) -> None:
        sizes = {block.grid[1:] for block in self.blocks(*self.size, 2 * self.rule.merge)}
        for file, count in zip(self.files, counts, strict=True):
            if {block.grid[1:] for block in self.blocks(count.width, count.height, 2 * self.rule.merge)} != sizes:
                what = f"{count.width} x {count.height} pixels beside {self.size[0]} x {self.size[1]}"
                raise InputError(what, where=file, fix="give frames of one shape")

    def blocks(self, width: int, height: int, count: int) -> list[Block]:
        """The model's items for this number of frames of a size, with groups counted from the first."""
        return self.rule.image(width, height) * count if self.natural_size else self.rule.video(width, height, count)

    def read(self) -> Iterator[Image.Image]:
        """All frames in order."""
        meter = self.vlm.meter
        return chain.from_iterable(read_haystack_images(file, self.sampling, meter) for file in self.files)

    def as_frame(self, image: Image.Image) -> Image.Image:
        """The image as a frame of the source's size, with its aspect ratio kept."""
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
        frames = islice(self.haystack.read(), self.frames)
        return [thumbnail(np.asarray(image)) for image in chain(frames, self.inserted)]

    def _blocks(self, order: Sequence[int]) -> list[Block]:
        threshold, rule = self.haystack.sampling.threshold, self.haystack.rule
        if threshold is None:
            return self.haystack.blocks(*self.haystack.size, len(order))
        is_high = select_high(rule.hybrid, merge=rule.merge, threshold=threshold)
        high = [is_high(position, self._thumbnails[number]) for position, number in enumerate(order)]
        return blocks_of(runs_of(high, rule), rule, *self.haystack.size)

    def ids(self, order_F: np.ndarray) -> np.ndarray:
        """See `VisualTokens`."""
        order = order_F.tolist()
        blocks = self._blocks(order)
        if not self.haystack.as_images:
            return self.grids.ids(order, blocks)
        # A needle has the size of the frame at its position, as in a video.
        return np.concatenate([self.grids.ids([n], [block]) for n, block in zip(order, blocks, strict=True)])

    def table(self, model: Any) -> torch.Tensor:
        """See `VisualTokens`: the grids of all sequences so far. Frames are decoded once and are not kept."""
        vlm, frames = self.haystack.vlm, self.frames
        table_RE = empty_table(model, self.grids)
        pending: dict[int, list[TokenGrid]] = defaultdict(list)
        for grid in self.grids.grids:
            pending[grid.frames[-1]].append(grid)
        decoded: dict[int, Image.Image] = {}
        ready: list[TokenGrid] = []

        def get_frame(number: int, size: tuple[int, int]) -> Image.Image:
            image = decoded[number] if number < frames else self.inserted[number - frames]
            return image.resize(size, resample=vlm.processor.resample)

        def encode() -> None:
            by_size = sorted(ready, key=lambda grid: grid[1:])
            encode_grids(model, vlm.processor, self.grids, table_RE, by_size, get_frame)

        for number, image in enumerate(islice(self.haystack.read(), frames)):
            decoded[number] = image
            ready += pending.pop(number, [])
            if len(decoded) == 16 * self.frames_per_grid:
                encode()
                decoded, ready = {}, []
        missing = [number for number in pending if number < frames]
        if missing:
            last = self.haystack.files[-1]
            raise InputError(f"ends before frame {min(missing)}", where=last, fix="check that the file is complete")
        ready += [grid for grids in pending.values() for grid in grids]
        encode()
        return table_RE
