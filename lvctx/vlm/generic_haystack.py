"""A haystack for any class of models whose frames do not depend on each other: videos with images inserted among them.

Frames are one video where the model's processor takes videos, otherwise, or with `as_images`, each is an image. A
frame's time is its number in the sequence over the rate. All frames have one size, so each has as many rows of the
table, and what a class writes once for a video (a newline, say) has the last rows.

Shapes: F frames, N tokens, R rows of the table, E width of the language model.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lvctx.errors import InputError, UsageError
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.base import sequential_positions
from lvctx.vlm.haystack_files import count_haystack_frames, read_haystack_images
from lvctx.vlm.stock_prompt import Clip, VisualItem
from lvctx.vlm.visual_features import visual_features

if TYPE_CHECKING:
    from lvctx.vlm.generic import GenericVLM

FRAME_BATCH = 8
"""Frames that go through the processor and the vision tower at once."""
EQUAL = 0.02
"""Largest relative difference between the features of a frame alone and among others that rounding can cause."""


class GenericHaystack:
    """Video files or folders of images, read when the table is made, and never kept."""

    def __init__(self, vlm: "GenericVLM", files: Sequence[Path], sampling: VideoSampling, *, as_images: bool) -> None:
        """Of a video the first frame is decoded, and all where its packets do not give their number."""
        if sampling.frames is not None or sampling.max_frames is not None or sampling.frames_from is not None:
            raise UsageError(
                "a haystack is sampled at a rate", where="--frames, --max-frames, --frames-from", fix="give --fps"
            )
        sampling = vlm.resolve(sampling)
        if sampling.fps == "native":
            raise UsageError("a haystack is sampled at a rate", where="--fps native", fix="give a number")
        self.vlm, self.files, self.sampling = vlm, tuple(files), sampling
        self.as_images = as_images or not vlm.processor.takes_video
        self.fps = float(sampling.fps or 1)
        counts = [count_haystack_frames(file, sampling) for file in self.files]
        self.size = (counts[0].width, counts[0].height)
        """Of the source's frames, in pixels."""
        for file, count in zip(self.files, counts, strict=True):
            if (count.width, count.height) != self.size:
                what = f"{count.width} x {count.height} pixels beside {self.size[0]} x {self.size[1]}"
                raise InputError(what, where=file, fix="give one size")
        video_processor = getattr(vlm.processor.processor, "video_processor", None)
        self.unit = 1 if self.as_images else int(getattr(video_processor, "temporal_patch_size", 1))
        """Frames that the processor merges."""
        self.seconds = np.arange(sum(count.frames for count in counts) // self.unit * self.unit) / self.fps
        self.image_size = min(self.size)
        partial_files = [str(file) for file, count in zip(self.files, counts, strict=True) if count.partial]
        self.facts = {
            "processor": type(vlm.processor.processor).__name__,
            "fps": self.fps,
            "source_size": list(self.size),
            "as_images": self.as_images,
            **({} if vlm.shares_prefixes else {"reuse": "none"}),
            **({"partial": partial_files} if partial_files else {}),
        }

    def read(self) -> Iterator[Image.Image]:
        """All frames in order."""
        meter = self.vlm.meter
        return chain.from_iterable(read_haystack_images(file, self.sampling, meter) for file in self.files)

    def tokens(self, frames: int, images: Sequence[Image.Image]) -> "GenericTokens":
        """See `Haystack`; images are padded to the shape of the frames."""
        mean = getattr(self.vlm.processor.processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        background = tuple(round(255 * value) for value in mean)
        return GenericTokens(self, frames, [ImageOps.pad(image, self.size, color=background) for image in images])


class GenericTokens:
    """See `VisualTokens`. The table has the frames, the inserted images, and what a video has once."""

    positions = staticmethod(sequential_positions)

    def __init__(self, haystack: GenericHaystack, frames: int, inserted: Sequence[Image.Image]) -> None:
        self.haystack, self.frames, self.inserted = haystack, frames, inserted
        self.processor = haystack.vlm.processor
        self._blank = Image.new("RGB", haystack.size)
        self.frames_per_grid = haystack.unit
        first = self._blanks(self.frames_per_grid)
        self.placeholder = self.processor.marker(first[0])
        self.per_grid, self.once = self._measure()
        chat = self.processor.chat([""], first)
        self.tail = haystack.vlm.tail(chat, first, self._texts(self.frames_per_grid)[-1])
        self.facts = {**haystack.facts, "tokens_per_grid": self.per_grid, "prompt_begins": chat.head}
        self._layout = lru_cache(maxsize=64)(self._layout_ids)

    def _blanks(self, frames: int) -> list[VisualItem]:
        return self.media([self._blank] * frames)

    def media(self, frames: Sequence[Image.Image | np.ndarray]) -> list[VisualItem]:
        """Frames as the processor takes them: one video, or images."""
        if self.haystack.as_images:
            return [one if isinstance(one, Image.Image) else Image.fromarray(one) for one in frames]
        return [Clip(frames=frames, times=(np.arange(len(frames)) / self.haystack.fps).tolist())]

    def _texts(self, frames: int) -> list[str]:
        """The placeholders of so many frames in a prompt: a text for each image, or one for the video."""
        media = self._blanks(frames)
        return [self.processor.video_text(one) if isinstance(one, Clip) else self._image_text for one in media]

    @cached_property
    def _image_text(self) -> str:
        # Two: some processors cut an image into tiles where it is the only one.
        return self.processor.expand([self._blank, self._blank]).texts[0]

    def _measure(self) -> tuple[int, int]:
        """Rows of a grid, and rows that a video has once, whatever its frames."""
        if self.haystack.as_images:
            return self.processor.count(self._image_text), 0
        unit = self.frames_per_grid
        texts = [self._texts(frames)[0] for frames in (unit, 2 * unit, 3 * unit)]
        if len({self.processor.trailing(text) for text in texts}) > 1:
            what = "what it writes after a video depends on its frames"
            raise InputError(what, where=self.haystack.vlm.path, fix="--as-images")
        counts = [self.processor.count(text) for text in texts]
        rows = counts[1] - counts[0]
        once = counts[0] - rows
        if rows < 1 or once < 0 or counts[2] != once + 3 * rows:
            what = "how many tokens a frame has depends on how many frames there are"
            raise InputError(what, where=self.haystack.vlm.path, fix="--as-images")
        return rows, once

    def _layout_ids(self, frames: int) -> np.ndarray:
        """Ids (N,) of a prompt of so many frames, its placeholders numbered -1, -2, ..."""
        if self.haystack.vlm.shares_prefixes:
            ids_N = self.processor.block_ids(self.processor.chat([""], self._blanks(frames)), self._texts(frames))
        else:  # what a class writes may depend on the whole prompt
            ids_N = self.processor.prompt(self._blanks(frames)).ids.copy()
        is_visual_N = self.processor.is_placeholder(ids_N)
        assert int(is_visual_N.sum()) == frames // self.frames_per_grid * self.per_grid + self.once
        ids_N[is_visual_N] = -1 - np.arange(is_visual_N.sum())
        return ids_N

    def ids(self, order_F: np.ndarray) -> np.ndarray:
        """See `VisualTokens`; a grid's rows are those of its first frame."""
        first_G, haystack_grids = order_F[:: self.frames_per_grid], self.frames // self.frames_per_grid
        inserted_G = haystack_grids + first_G - self.frames
        grids_G = np.where(first_G < self.frames, first_G // self.frames_per_grid, inserted_G)
        rows = (grids_G[:, None] * self.per_grid + np.arange(self.per_grid)).ravel()
        last = (haystack_grids + len(self.inserted)) * self.per_grid
        rows = np.concatenate([rows, last + np.arange(self.once)])
        ids_N = self._layout(len(order_F)).copy()
        is_visual_N = ids_N < 0
        ids_N[is_visual_N] = self.haystack.vlm.vocabulary + rows[-1 - ids_N[is_visual_N]]
        return ids_N

    def order(self, ids_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The frames (F,) of a sequence that begins with `ids`, and its ids after them."""
        visual = np.flatnonzero(ids_L >= self.haystack.vlm.vocabulary)
        rows = ids_L[visual] - self.haystack.vlm.vocabulary
        haystack_grids = self.frames // self.frames_per_grid
        grids = rows[: len(rows) - self.once : self.per_grid] // self.per_grid
        starts = np.where(grids < haystack_grids, grids * self.frames_per_grid, grids - haystack_grids + self.frames)
        steps = np.where(grids < haystack_grids, 1, 0)[:, None] * np.arange(self.frames_per_grid)
        return (starts[:, None] + steps).ravel(), ids_L[visual[-1] + 1 :]

    @torch.inference_mode()
    def table(self, model: Any) -> Tensor:
        """See `VisualTokens`. Frames are decoded and encoded in batches, and not kept."""
        rows, once = list[Tensor](), list[Tensor]()
        frames = 0
        images = self.images()
        while batch := list(islice(images, FRAME_BATCH)):
            features = self._encode(model, batch)
            count = len(batch) * self.per_grid
            if not frames and not self.haystack.as_images:
                self._check_independent(model, batch[0], features)
            rows.append(features[:count])
            once, frames = [features[count:]], frames + len(batch)
        return torch.cat([*rows, *once])

    def images(self) -> Iterator[Image.Image]:
        """The frames by their numbers: the haystack's, then the inserted images."""
        frames = 0
        for image in islice(self.haystack.read(), self.frames):
            frames += 1
            yield image
        if frames < self.frames:
            raise InputError(f"ends before frame {frames}", where=self.haystack.files[-1], fix="is the file whole?")
        yield from self.inserted

    def _encode(self, model: Any, frames: Sequence[Image.Image]) -> Tensor:
        """Rows of these frames, and those that a video has once."""
        if self.frames_per_grid > 1:
            what = "its video processor merges frames, and no features of merged frames are shared"
            raise InputError(what, where=self.haystack.vlm.path, fix="--as-images")
        media = self.media(frames)
        if self.haystack.as_images and len(media) == 1:
            media *= 2
        features = visual_features(model, self.processor.expand(media).inputs, self.processor.placeholder_ids)
        return features[: len(frames) * self.per_grid + self.once]

    def _check_independent(self, model: Any, frame: Image.Image, features: Tensor) -> None:
        """Raise InputError where a frame's features depend on the frames beside it: equal frames would not be equal."""
        alone, among = self._encode(model, [frame])[: self.per_grid].float(), features[: self.per_grid].float()
        if float((alone - among).norm()) > EQUAL * float(among.norm()):
            what = "its features of a frame depend on the frames beside it"
            raise InputError(what, where=self.haystack.vlm.path, fix="--as-images")
