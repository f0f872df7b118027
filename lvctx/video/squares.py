"""Make images square. It is a separate module so that decoder processes start without torch."""

from typing import Literal

from PIL import Image, ImageOps

FrameMode = Literal["crop", "pad", "squash"]
"""How a frame is made square. `crop`: short side resized, centre cropped (LongVA on VQA and Video-MME). `pad`:
centred on a square of the mean colour (LongVA on V-NIAH). `squash`: both sides resized, aspect ignored."""

MAX_PIXELS = 178_956_970
"""Largest image that is opened: Pillow's own limit for a decompression bomb (half a gigabyte as RGB)."""

STRIP = 64
"""Aspect ratio beyond which an image is treated as a strip."""


def square(image: Image.Image, side: int, mode: FrameMode, background: tuple[int, int, int]) -> Image.Image:
    """An RGB image as a square of `side` pixels, bicubic; `background` is the padding of `pad` (see `Preprocess`)."""
    width, height = image.size
    shortest, longest = min(width, height), max(width, height)
    if mode == "pad" and longest * longest > MAX_PIXELS:
        # The canvas would be larger than the limit, so the image is fitted first, which changes less than a level.
        image = ImageOps.contain(image, (side, side), Image.Resampling.BICUBIC)
        (width, height), longest = image.size, side
    if mode == "crop" and longest > STRIP * shortest:
        # Only the middle of a strip is kept anyway: crop it first, since resizing would make it huge.
        left, top = max(0, width - STRIP * shortest) // 2, max(0, height - STRIP * shortest) // 2
        image = image.crop((left, top, width - left, height - top))
        width, height = image.size
    if mode == "pad" and width != height:
        canvas = Image.new("RGB", (longest, longest), background)
        canvas.paste(image, ((longest - width) // 2, (longest - height) // 2))
        image = canvas
    if mode != "crop":
        return image.resize((side, side), Image.Resampling.BICUBIC)
    resized = int(side * width / shortest), int(side * height / shortest)
    left, top = (resized[0] - side) // 2, (resized[1] - side) // 2
    return image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
