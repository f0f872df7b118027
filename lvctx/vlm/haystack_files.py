"""The files of a haystack: videos, or folders of images that are its frames."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from PIL import Image

from lvctx.cost import CostMeter
from lvctx.errors import InputError
from lvctx.models.image_processing import image_size, open_image
from lvctx.video.frame_count import Count, count_frames
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling

IMAGES = (".png", ".jpg", ".jpeg")
"""Suffixes of a folder's frames, read in order of names; `lvctx niah haystack` writes such folders."""


def count_haystack_frames(file: Path, sampling: VideoSampling) -> Count:
    """Size and number of frames of a video or a folder of images. Raises InputError for an empty folder."""
    if not file.is_dir():
        return count_frames(file, sampling)
    images = list_images(file)
    if not images:
        raise InputError("no image in it", where=file, fix=f"put {' or '.join(IMAGES)} there")
    width, height = image_size(images[0])
    duration = len(images) / float(sampling.fps or 1)
    return Count(frames=len(images), exact=True, width=width, height=height, duration=duration)


def list_images(folder: Path) -> list[Path]:
    """The images of a folder of frames, in order."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)


def read_haystack_images(file: Path, sampling: VideoSampling, meter: CostMeter) -> Iterator[Image.Image]:
    """RGB frames in order."""
    if not file.is_dir():
        yield from (Image.fromarray(frame.image) for frame in meter.decoding(read_video(file, sampling)))
        return
    for path in list_images(file):
        with meter.phase("decode"):
            image = open_image(path)
        meter.add(frames_decoded=1)
        yield image


class FrameFile:
    """RGB images in a temporary file without a name, in TMPDIR: three bytes a pixel, of which none stay in memory."""

    def __init__(self, images: Iterable[Image.Image]) -> None:
        self._places: list[tuple[int, tuple[int, int, int]]] = []
        with TemporaryFile() as file:
            for image in images:
                self._places.append((file.tell(), (image.height, image.width, 3)))
                file.write(image.convert("RGB").tobytes())
            file.flush()
            self._bytes = np.memmap(file, dtype=np.uint8, mode="r")

    def __getitem__(self, number: int) -> np.ndarray:
        """An image (height, width, 3), read when its values are used."""
        start, shape = self._places[number]
        image: np.ndarray = self._bytes[start : start + shape[0] * shape[1] * 3].reshape(shape)
        return image
