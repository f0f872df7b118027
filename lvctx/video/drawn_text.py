"""Text drawn into an image with the font of Pillow, so that no font file is needed."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 0.3
"""Margin of the plate behind a text, as a share of the height of a line."""


def paint_text(rng: np.random.Generator, image_HW3: np.ndarray, text: str, *, width: float = 0.8) -> None:
    """Write `text` on a plate into the uint8 image (H, W, 3), in place; it may have several lines.

    The text is a share `width` of the image's width, at most half of its height, and black on white or white on black.
    Its position is drawn from `rng`.
    """
    image = Image.fromarray(image_HW3)
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = pen.multiline_textbbox((0, 0), text, font=ImageFont.load_default(100), align="center")
    scale = min(width * image.width / (right - left), 0.5 * image.height / (bottom - top))
    font = ImageFont.load_default(100 * scale)
    margin = MARGIN * (bottom - top) * scale / (text.count("\n") + 1)
    wide, high = (right - left) * scale + 2 * margin, (bottom - top) * scale + 2 * margin
    x, y = rng.uniform(0, max(0.0, image.width - wide)), rng.uniform(0, max(0.0, image.height - high))
    ink, plate = ("black", "white") if rng.random() < 0.5 else ("white", "black")
    pen.rectangle((x, y, x + wide, y + high), fill=plate)
    at = (x + margin - left * scale, y + margin - top * scale)
    pen.multiline_text(at, text, font=font, fill=ink, align="center")
    image_HW3[:] = np.asarray(image)
