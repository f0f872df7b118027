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
from lvctx.vlm.haystack_files import count_source, source_frames
from lvctx.vlm.stock_processor import Clip, Media
from lvctx.vlm.visual_features import visual_features

if TYPE_CHECKING:
    from lvctx.vlm.generic import GenericVLM

FRAME_BATCH = 8
"""Frames that go through the processor and the vision tower at once."""
EQUAL = 0.02
"""Largest relative difference between the features of a frame alone and among others, by rounding alone."""


class GenericHaystack:
    """Video files or folders of images, read when the table is made, and never kept."""

    def __init__(self, vlm: "GenericVLM", files: Sequence[Path], sampling: VideoSampling, *, as_images: bool) -> None:
        """Of a video the first frame is decoded, and all where its packets do not give their number."""
        if sampling.frames is not None or sampling.max_frames is not None:
            raise UsageError("a haystack is sampled at a rate", where="--frames, --max-frames", fix="give --fps")
        sampling = vlm.resolve(sampling)
        if sampling.fps == "native":
            raise UsageError("a haystack is sampled at a rate", where="--fps native", fix="give a number")
        self.vlm, self.files, self.sampling = vlm, tuple(files), sampling
        self.as_images = as_images or not vlm.processor.takes_video
        self.fps = float(sampling.fps or 1)
        counts = [count_source(file, sampling) for file in self.files]
        self.size = (counts[0].width, counts[0].height)
        """Of the source's frames, in pixels."""
        for file, count in zip(self.files, counts, strict=True):
            if (count.width, count.height) != self.size:
                what = f"{count.width} x {count.height} pixels beside {self.size[0]} x {self.size[1]}"
                raise InputError(what, where=file, fix="give one size")
        self.seconds = np.arange(sum(count.frames for count in counts)) / self.fps
        self.image_size = min(self.size)
        partial_files = [str(file) for file, count in zip(self.files, counts, strict=True) if count.partial]
        self.facts = {
            "processor": type(vlm.processor.processor).__name__,
            "fps": self.fps,
            "source_size": list(self.size),
            "as_images": self.as_images,
            **({"partial": partial_files} if partial_files else {}),
        }

    def read(self) -> Iterator[Image.Image]:
        """All frames in order."""
        return chain.from_iterable(source_frames(file, self.sampling) for file in self.files)

    def tokens(self, frames: int, images: Sequence[Image.Image]) -> "GenericTokens":
        """See `Haystack`; images are padded to the shape of the frames."""
        mean = getattr(self.vlm.processor.processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        background = tuple(round(255 * value) for value in mean)
        return GenericTokens(self, frames, [ImageOps.pad(image, self.size, color=background) for image in images])


class GenericTokens:
    """See `VisualTokens`. The table has the frames, the inserted images, and what a video has once."""

    frames_per_grid = 1
    positions = staticmethod(sequential_positions)

    def __init__(self, haystack: GenericHaystack, frames: int, inserted: Sequence[Image.Image]) -> None:
        self.haystack, self.frames, self.inserted = haystack, frames, inserted
        self.processor = haystack.vlm.processor
        self._blank = Image.new("RGB", haystack.size)
        media = self._media(1)
        self.placeholder = self.processor.marker(media[0])
        chat = self.processor.chat([""], media)
        self.tail = haystack.vlm.tail(chat, media, self._texts(1)[-1])
        self.facts = {**haystack.facts, "tokens_per_frame": self.per_frame, "prompt_begins": chat.head}
        self._layout = lru_cache(maxsize=64)(self._layout_ids)

    def _media(self, frames: int) -> list[Media]:
        if self.haystack.as_images:
            return [self._blank] * frames
        return [Clip(frames=[self._blank] * frames, times=(np.arange(frames) / self.haystack.fps).tolist())]

    def _texts(self, frames: int) -> list[str]:
        """What stands for so many frames in a prompt: a text for each image, or one for the video."""
        if self.haystack.as_images:
            # Two: some processors cut an image into tiles where it is the only one.
            return self._two_images[:1] * frames
        return [self.processor.video_text(self._media(frames)[0])]

    @cached_property
    def _two_images(self) -> list[str]:
        return self.processor.expand([self._blank, self._blank]).texts

    @cached_property
    def per_frame(self) -> int:
        """Rows of a frame."""
        if self.haystack.as_images:
            return self.processor.count(self._two_images[0])
        rows = self.processor.count(self._texts(3)[0]) - self.processor.count(self._texts(2)[0])
        if rows < 1 or self.processor.count(self._texts(2)[0]) < 2 * rows:
            raise InputError("its video processor merges frames", where=self.haystack.vlm.path, fix="--as-images")
        return rows

    @cached_property
    def once(self) -> int:
        """Rows that a video has once, whatever its frames."""
        return 0 if self.haystack.as_images else self.processor.count(self._texts(2)[0]) - 2 * self.per_frame

    def _layout_ids(self, frames: int) -> np.ndarray:
        """Ids (N,) of a prompt of so many frames, its placeholders numbered -1, -2, ..."""
        ids_N = self.processor.block_ids(self.processor.chat([""], self._media(frames)), self._texts(frames))
        is_visual_N = self.processor.is_placeholder(ids_N)
        assert int(is_visual_N.sum()) == frames * self.per_frame + self.once
        ids_N[is_visual_N] = -1 - np.arange(is_visual_N.sum())
        return ids_N

    def ids(self, order_F: np.ndarray) -> np.ndarray:
        """See `VisualTokens`."""
        rows = (order_F[:, None] * self.per_frame + np.arange(self.per_frame)).ravel()
        last = (self.frames + len(self.inserted)) * self.per_frame
        rows = np.concatenate([rows, last + np.arange(self.once)])
        ids_N = self._layout(len(order_F)).copy()
        is_visual_N = ids_N < 0
        ids_N[is_visual_N] = self.haystack.vlm.vocabulary + rows[-1 - ids_N[is_visual_N]]
        return ids_N

    @torch.inference_mode()
    def table(self, model: Any) -> Tensor:
        """See `VisualTokens`. Frames are decoded and encoded in batches, and not kept."""
        rows, once = list[Tensor](), list[Tensor]()
        frames = 0
        images = chain(islice(self.haystack.read(), self.frames), self.inserted)
        while batch := list(islice(images, FRAME_BATCH)):
            features = self._encode(model, batch)
            count = len(batch) * self.per_frame
            if not frames and not self.haystack.as_images:
                self._check_independent(model, batch[0], features)
            rows.append(features[:count])
            once, frames = [features[count:]], frames + len(batch)
        if frames < self.frames + len(self.inserted):
            raise InputError("ends before its last frame", where=self.haystack.files[-1], fix="is the file whole?")
        return torch.cat([*rows, *once])

    def _encode(self, model: Any, frames: Sequence[Image.Image]) -> Tensor:
        """Rows of these frames, and those that a video has once."""
        media: list[Media] = list(frames)
        if not self.haystack.as_images:
            media = [Clip(frames=frames, times=np.arange(float(len(frames))).tolist())]
        elif len(media) == 1:
            media *= 2
        features = visual_features(model, self.processor.expand(media).inputs, self.processor.placeholder_ids)
        return features[: len(frames) * self.per_frame + self.once]

    def _check_independent(self, model: Any, frame: Image.Image, features: Tensor) -> None:
        """Raise InputError where a frame's features depend on the frames beside it: equal frames would not be equal."""
        alone, among = self._encode(model, [frame])[: self.per_frame].float(), features[: self.per_frame].float()
        if float((alone - among).norm()) > EQUAL * float(among.norm()):
            what = "its features of a frame depend on the frames beside it"
            raise InputError(what, where=self.haystack.vlm.path, fix="--as-images")
