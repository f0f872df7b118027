"""The frames of a training's videos: video files, or folders of frames as LLaVA-Hound publishes them."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvctx.errors import InputError
from lvctx.models.image_processing import open_image
from lvctx.video.frame_count import count_frames
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.haystack_files import list_images


@lru_cache(maxsize=1 << 16)
def video_frame_count(path: Path, sampling: VideoSampling) -> int:
    """Number of frames that `video_frames` gives. Raises InputError for a video that cannot be read."""
    return len(_chosen(path, sampling)) if path.is_dir() else count_frames(path, sampling).frames


def video_frames(path: Path, sampling: VideoSampling) -> list[Image.Image]:
    """RGB frames in order. Raises InputError for a video that cannot be read, or that lacks some of its frames."""
    if path.is_dir():
        return [open_image(file) for file in _chosen(path, sampling)]
    frames = [Image.fromarray(frame.image) for frame in read_video(path, sampling)]
    expected = video_frame_count(path, sampling)
    if len(frames) != expected:
        raise InputError(f"{len(frames)} of {expected} frames can be decoded", where=path, fix="convert the video")
    return frames


def packed_video(path: Path, item: Mapping[str, Any]) -> tuple[list[Image.Image], list[float]]:
    """RGB frames of a packed row's video as it was sampled then, and their times in seconds.

    `item` is what `pack-chat` stored about it (`data.packed_chat`). Raises InputError for another number of frames.
    """
    rate: dict[str, Any] = {"fps": item["fps"]} if item["fps"] else {"frames": item.get("spread", item["frames"])}
    reader = read_video(path, VideoSampling(**rate, allow_partial=item.get("partial", False)))
    frames = list(reader)
    if len(frames) != item["frames"]:
        what = f"{len(frames)} frames instead of {item['frames']} when it was packed"
        damaged = reader.facts["corrupt"]
        fix = f"{damaged} are damaged: convert the video, then pack-chat" if damaged else "run pack-chat again"
        raise InputError(what, where=path, fix=fix)
    return [Image.fromarray(frame.image) for frame in frames], [frame.pts for frame in frames]


def _chosen(folder: Path, sampling: VideoSampling) -> list[Path]:
    """The files of a folder's frames, in the order of their names: `linspace` as in LongVA's code, or all if fewer."""
    files = list_images(folder)
    if not files:
        raise InputError("no frame in it", where=folder, fix="check --images, or remove the row")
    if sampling.frames is None:
        raise InputError("a folder of frames has no frame rate", where=folder, fix="give --frames instead of --fps")
    numbers = np.linspace(0, len(files) - 1, min(sampling.frames, len(files)), dtype=int)
    return [files[number] for number in numbers]
