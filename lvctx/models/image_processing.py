"""Preprocessing of images for a tower: opening them safely, making them square, normalising.

Suffixes: N images; H, W pixels down and across; 3 the RGB channels; S the input side of the tower.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lvctx.artifacts.model_config import read_model_config
from lvctx.artifacts.store import read_json
from lvctx.errors import InputError, library_errors
from lvctx.video.squares import MAX_PIXELS, FrameMode, square


def open_image(path: Path) -> Image.Image:
    """An image file as RGB, upright: EXIF rotation applied, palette, CMYK, grey and 16 bit converted; first frame.

    Transparency is dropped. Raises InputError for a file that is missing, unreadable, truncated, larger than
    `MAX_PIXELS`, or whose pixels have no known range (floats, 32 bits).
    """
    with _opened(path) as image:
        try:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
        except Exception as e:
            # Pillow's decoders raise errors of many types for a broken file.
            raise _unreadable(path, e) from e


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file when upright, from its header. Raises InputError like `open_image`."""
    with _opened(path) as image:
        try:
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # EXIF orientations that swap the sides
        except Exception as e:
            raise _unreadable(path, e) from e
        if turned and image.format == "TIFF":
            # Pillow rotates these itself when it decodes them; whether `size` reflects that depends on the version.
            return open_image(path).size
        return (image.height, image.width) if turned else image.size


def _opened(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except FileNotFoundError:
        raise InputError("no such image", where=path) from None
    except Image.DecompressionBombError as e:
        raise InputError(f"more than {MAX_PIXELS:,} pixels", where=path, fix="scale the image down") from e
    except Exception as e:
        raise _unreadable(path, e) from e
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise InputError(f"more than {MAX_PIXELS:,} pixels", where=path, fix="scale the image down")
    return image


def _unreadable(path: Path, e: Exception) -> InputError:
    reason = "not an image in a format that Pillow reads" if isinstance(e, Image.UnidentifiedImageError) else str(e)
    return InputError(f"unreadable image ({reason or type(e).__name__})", where=path, fix="replace or remove it")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integers up to {values.max()}: more than 16 bits have no defined white level")
        return Image.fromarray(np.rint(values * (255 / 65535)).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("float pixels, which have no defined white level")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """A tower's preprocessing: squares of one side, scaled to 0..1, normalised per channel."""

    size: int
    """Side S in pixels: `image_size` of the tower's configuration."""
    mean: tuple[float, float, float]
    """Subtracted from each channel; `image_mean` of preprocessor_config.json."""
    std: tuple[float, float, float]
    """Each channel is divided by it; `image_std` of preprocessor_config.json."""

    @classmethod
    def from_directory(cls, path: Path) -> Self:
        """Read it from the directory of a tower, CLIP, SigLIP or VLM. Raises InputError if it is missing."""
        pixels = _read_json(path / "preprocessor_config.json")
        if not pixels:
            pixels = _read_json(path / "processor_config.json").get("image_processor") or {}
        if not isinstance(pixels, dict) or "image_mean" not in pixels or "image_std" not in pixels:
            raise InputError(
                "no preprocessor_config.json with image_mean and image_std",
                where=path,
                fix="copy it from the tower's original directory",
            )
        config = read_model_config(path)
        size = (config.get("vision_config") or config).get("image_size", 224)  # 224: the default of both families
        if not isinstance(size, int) or size < 1:
            raise InputError(f"image_size is {size!r}", where=path / "config.json")
        with library_errors("image_mean and image_std are not three numbers each", where=path):
            red, green, blue = (float(m) for m in pixels["image_mean"])
            r, g, b = (float(s) for s in pixels["image_std"])
        if not min(r, g, b) > 0:
            raise InputError(f"image_std is {pixels['image_std']}", where=path)
        return cls(size=size, mean=(red, green, blue), std=(r, g, b))

    @property
    def background(self) -> tuple[int, int, int]:
        """The mean colour as a pixel, truncated as in LLaVA: the padding of `pad`, near zero once normalised."""
        red, green, blue = (int(m * 255) for m in self.mean)
        return red, green, blue

    def square(self, image: Image.Image, mode: FrameMode) -> Image.Image:
        """An RGB image as a square of this side."""
        return square(image, self.size, mode, self.background)

    def __call__(self, images: Sequence[Image.Image] | np.ndarray) -> Tensor:
        """Float32 (N, 3, S, S) of square RGB images or of uint8 (N, S, S, 3); the values of CLIPImageProcessor."""
        if not isinstance(images, np.ndarray):
            images = np.stack([np.asarray(image) for image in images])
        assert images.dtype == np.uint8
        assert images.shape[1:] == (self.size, self.size, 3), images.shape
        pixels_N3SS = torch.tensor(images).permute(0, 3, 1, 2).float() * (1 / 255)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return ((pixels_N3SS - mean) / std).contiguous()


def crops_frames(path: Path) -> bool:
    """Whether the processor of a LlavaOnevision directory crops a video frame's centre; else it resizes both sides.

    The key `do_center_crop` of its video processor decides, or of its image processor where it has no other.
    """
    both = _read_json(path / "processor_config.json")
    for own in (
        _read_json(path / "video_preprocessor_config.json") or both.get("video_processor"),
        _read_json(path / "preprocessor_config.json") or both.get("image_processor"),
    ):
        if isinstance(own, dict) and own:
            return own.get("do_center_crop") is True
    return False


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
