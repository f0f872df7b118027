"""Photos for the nano recipe's images: stills as they are, clips as single frames in no order."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from lvctx.models.image_processing import open_image
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling

SIDE = 300
"""Short side they are reduced to, pixels."""
PER_CLIP = 16
"""Frames taken of a clip, evenly spaced: neighbouring frames differ too little to add training signal."""


@cache
def load_photos(sources: tuple[Path, ...]) -> list[np.ndarray]:
    """Photos of files and folders of images and .mp4 clips, in the order of their names: uint8 (H, W, 3)."""
    files = [f for source in sources for f in (sorted(source.iterdir()) if source.is_dir() else [source])]
    photos: list[Image.Image] = []
    for file in files:
        if file.suffix == ".mp4":
            photos += [Image.fromarray(f.image) for f in read_video(file, VideoSampling(fps=None, frames=PER_CLIP))]
        else:
            photos.append(open_image(file))
    out = []
    for photo in photos:
        scale = SIDE / min(photo.size)
        out.append(np.asarray(photo.resize((round(photo.width * scale), round(photo.height * scale)))))
    return out
