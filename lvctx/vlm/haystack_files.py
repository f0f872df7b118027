"""The files of a haystack: videos, or folders of images that are its frames."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

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
    """A folder's frames in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)


def read_haystack_images(file: Path, sampling: VideoSampling) -> Iterator[Image.Image]:
    """RGB frames in order."""
    if file.is_dir():
        yield from map(open_image, list_images(file))
    else:
        yield from (Image.fromarray(frame.image) for frame in read_video(file, sampling))
