"""Random crops of photos with changed lighting, as backgrounds of drawn images."""

import numpy as np
from PIL import Image


def crop_photo(rng: np.random.Generator, photo_HW3: np.ndarray, *, size: int) -> np.ndarray:
    """A random square of a photo (30-100 % of its short side) with changed lighting: uint8 (size, size, 3).

    Mirrored half the time, brightness and saturation varied, and one time in three with its channels swapped.
    """
    height, width = photo_HW3.shape[:2]
    side = int(min(height, width) * rng.uniform(0.3, 1.0))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    square = Image.fromarray(photo_HW3[top : top + side, left : left + side])
    square_HW3 = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    if rng.random() < 0.5:
        square_HW3 = square_HW3[:, ::-1]
    if rng.random() < 1 / 3:
        square_HW3 = square_HW3[..., rng.permutation(3)]
    grey_HW1 = square_HW3.mean(-1, keepdims=True)
    square_HW3 = grey_HW1 + (square_HW3 - grey_HW1) * rng.uniform(0.3, 2.0)
    gain_3 = rng.uniform(0.6, 1.3) * rng.uniform(0.9, 1.1, 3)
    return np.clip(square_HW3 * gain_3, 0, 255).astype(np.uint8)
