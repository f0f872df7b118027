"""Seeded drawings of one coloured shape on a cluttered background, and grids of them.

They replace photographs where none can be distributed: as training images of the nano recipe, as images in the tests,
and as needles of V-NIAH (an image that occurs in no video, with a question that only this image answers). The same
state of a `numpy.random.Generator` gives the same drawing. Every name in `SHAPES` and `COLORS` is a single token after
a space in SmolLM2's tokenizer; with ten colours, chance accuracy is 1 in 10.

Suffixes: H, W pixels down and across; 3 the RGB channels; N vertices of a polygon. Images are uint8 RGB.
"""

from collections.abc import Mapping, Sequence
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from lvctx.video.photo_crops import crop_photo

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 25, 30),
    "green": (25, 155, 50),
    "blue": (30, 70, 225),
    "yellow": (245, 225, 25),
    "orange": (250, 130, 10),
    "purple": (125, 35, 170),
    "pink": (250, 130, 190),
    "brown": (120, 65, 25),
    "white": (248, 248, 248),
    "black": (12, 12, 12),
}
"""Name -> RGB. They differ enough that the lighting of `paint` never makes one look like another."""

SUPERSAMPLE = 2
"""Masks are drawn this many times larger and averaged down, because PIL draws polygons with hard edges."""

Outline = Sequence[tuple[float, float]]


def _arc(radius: float, n: int = 40, x: float = 0.0, y: float = 0.0) -> Outline:
    return [(x + radius * cos(2 * pi * i / n), y + radius * sin(2 * pi * i / n)) for i in range(n)]


def _star(points: int, inner: float) -> Outline:
    radius = [1.0, inner] * points
    return [(r * sin(pi * i / points), -r * cos(pi * i / points)) for i, r in enumerate(radius)]


def _heart(n: int = 48) -> Outline:
    turns = [2 * pi * i / n for i in range(n)]
    return [(sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 16 - 0.1) for t in turns]


def _moon(n: int = 32) -> Outline:
    # The outer arc runs from horn to horn on the left, the inner one returns on a circle pushed to the right.
    outer = [(cos(a), sin(a)) for a in np.linspace(0.28 * pi, 1.72 * pi, n)]
    horn_x, horn_y = outer[0]
    centre = 0.72
    radius = ((horn_x - centre) ** 2 + horn_y**2) ** 0.5
    start = float(np.arctan2(horn_y, horn_x - centre))
    inner = [(centre + radius * cos(a), radius * sin(a)) for a in np.linspace(2 * pi - start, start, n)]
    return [(x + 0.3, y) for x, y in [*outer, *inner]]


# Each shape is one or two polygons in [-1, 1]², y down; the second is a hole.
_OUTLINES: dict[str, list[Outline]] = {
    "circle": [_arc(0.9)],
    "square": [[(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]],
    "triangle": [[(0.0, -0.95), (0.98, 0.75), (-0.98, 0.75)]],
    "star": [_star(5, 0.42)],
    "heart": [_heart()],
    "cross": [
        [
            (-0.3, -0.95),
            (0.3, -0.95),
            (0.3, -0.3),
            (0.95, -0.3),
            (0.95, 0.3),
            (0.3, 0.3),
            (0.3, 0.95),
            (-0.3, 0.95),
            (-0.3, 0.3),
            (-0.95, 0.3),
            (-0.95, -0.3),
            (-0.3, -0.3),
        ],
    ],
    "moon": [_moon()],
    "arrow": [
        [(-1.0, -0.26), (0.1, -0.26), (0.1, -0.8), (1.0, 0.0), (0.1, 0.8), (0.1, 0.26), (-1.0, 0.26)],
    ],
    "diamond": [[(0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0)]],
    "ring": [_arc(0.95), _arc(0.52)],
    "house": [
        [(0.0, -1.0), (1.0, -0.1), (0.75, -0.1), (0.75, 0.9), (-0.75, 0.9), (-0.75, -0.1), (-1.0, -0.1)],
        [(-0.22, 0.9), (-0.22, 0.25), (0.22, 0.25), (0.22, 0.9)],
    ],
    "tree": [
        [
            (0.0, -1.0),
            (0.5, -0.35),
            (0.3, -0.35),
            (0.85, 0.45),
            (0.17, 0.45),
            (0.17, 1.0),
            (-0.17, 1.0),
            (-0.17, 0.45),
            (-0.85, 0.45),
            (-0.3, -0.35),
            (-0.5, -0.35),
        ],
    ],
}

SHAPES: tuple[str, ...] = tuple(_OUTLINES)
"""Names of the shapes that can be drawn."""


def _clouds(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Noise with the decreasing spectrum of photographs: octaves of coarse grids, each enlarged smoothly."""
    total_HW3 = np.zeros((height, width, 3), np.float32)
    decay = rng.uniform(0.4, 0.75)
    tint = rng.uniform(0.0, 1.0)  # 0: the octaves differ in brightness only
    side = max(width, height)
    cells, weight = 2, 1.0
    while cells <= side // 2:
        shape = (max(2, cells * height // side), max(2, cells * width // side))
        grey = rng.integers(0, 256, (*shape, 1))
        color = rng.integers(0, 256, (*shape, 3))
        coarse = Image.fromarray((grey * (1 - tint) + color * tint).astype(np.uint8))
        total_HW3 += weight * (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 127)
        cells, weight = cells * 2, weight * decay
    return total_HW3 * rng.uniform(0.3, 1.0)


def _gradient(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR), np.float32) - 127


def _stripes(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Stripes at any angle, or with a second wave across them a soft checkerboard."""
    angle, period = rng.uniform(0, pi), rng.uniform(6, 60)
    y_H1, x_1W = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]
    wave_HW = np.sin((x_1W * cos(angle) + y_H1 * sin(angle)) * (2 * pi / period))
    if rng.random() < 0.4:
        wave_HW = wave_HW * np.sin((y_H1 * cos(angle) - x_1W * sin(angle)) * (2 * pi / period))
    wave_HW = np.clip(wave_HW * rng.uniform(1, 6), -1, 1)
    return wave_HW[..., None] * rng.uniform(-90, 90, 3).astype(np.float32)


def _clutter(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Dead-leaves image: overlapping irregular patches of many sizes, occlusions without objects."""
    image = Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    palette = rng.integers(0, 256, (6, 3))
    side = max(width, height)
    for _ in range(int(rng.integers(6, 40))):
        n = int(rng.integers(3, 9))
        radius = side * rng.uniform(0.04, 0.5) ** 1.6
        turn_N = np.sort(rng.uniform(0, 2 * pi, n))
        radius_N = radius * rng.uniform(0.5, 1.4, n)
        centre = rng.uniform(0, 1, 2) * (width, height)
        points_N2 = centre + np.stack([np.cos(turn_N), np.sin(turn_N)], 1) * radius_N[:, None]
        color = np.clip(palette[rng.integers(6)] + rng.integers(-30, 31, 3), 0, 255)
        pen.polygon([(float(x), float(y)) for x, y in points_N2], fill=tuple(color.tolist()))
    blur = rng.uniform(0, 4)
    if blur > 0.7:
        image = image.filter(ImageFilter.BoxBlur(blur))
    return np.asarray(image, np.float32) - 127


def background(rng: np.random.Generator, *, width: int, height: int) -> np.ndarray:
    """An image without a shape: uint8 (height, width, 3), sizes in pixels."""
    layers = (_clouds, _gradient, _stripes, _clutter)
    image_HW3 = np.zeros((height, width, 3), np.float32)
    for index in rng.choice(4, size=int(rng.integers(1, 4)), replace=False, p=[0.36, 0.2, 0.12, 0.32]):
        image_HW3 += layers[index](rng, width, height) * rng.uniform(0.4, 1.0)
    # Videos are rarely as saturated as independent channels: shift towards grey, then choose contrast and exposure.
    grey_HW1 = image_HW3.mean(axis=2, keepdims=True)
    image_HW3 = grey_HW1 + (image_HW3 - grey_HW1) * rng.uniform(0.1, 1.0)
    image_HW3 = image_HW3 * rng.uniform(0.3, 1.1) + rng.uniform(40, 215) + rng.uniform(-25, 25, 3)
    return np.clip(image_HW3, 0, 255).astype(np.uint8)


def _bars(rng: np.random.Generator, image_HW3: np.ndarray) -> np.ndarray:
    """Letterbox the background with bars of its mean colour, like a wide frame padded to a square."""
    height, width = image_HW3.shape[:2]
    bar = int(rng.uniform(0.1, 0.3) * height)
    barred_HW3 = np.empty_like(image_HW3)
    barred_HW3[:] = image_HW3.reshape(-1, 3).mean(0).astype(np.uint8)
    squeezed = Image.fromarray(image_HW3).resize((width, height - 2 * bar), Image.Resampling.BILINEAR)
    barred_HW3[bar : height - bar] = np.asarray(squeezed)
    return barred_HW3


def paint(rng: np.random.Generator, image_HW3: np.ndarray, *, shape: str, color: str) -> np.ndarray:
    """Paint a shape into the uint8 image in place; return the coverage per pixel, float32 (H, W) in 0..1.

    Position, size (36-90 % of the shorter side), rotation (±20°), aspect, shade and lighting are drawn from `rng`.
    """
    height, width = image_HW3.shape[:2]
    side = min(height, width)
    half = side * rng.uniform(0.18, 0.45)
    margin = half * 1.05
    x = rng.uniform(margin, width - margin) if width > 2 * margin else width / 2
    y = rng.uniform(margin, height - margin) if height > 2 * margin else height / 2
    angle = rng.uniform(-pi / 9, pi / 9)
    half_size_2 = half * rng.uniform(0.88, 1.0, 2)
    turn = np.array([[cos(angle), -sin(angle)], [sin(angle), cos(angle)]])
    mask = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE), 0)
    pen = ImageDraw.Draw(mask)
    for hole, ring in enumerate(_OUTLINES[shape]):
        points_N2 = ((np.asarray(ring) * half_size_2) @ turn.T + (x, y)) * SUPERSAMPLE
        pen.polygon([(float(px), float(py)) for px, py in points_N2], fill=0 if hole else 255)
    cover_HW = np.asarray(mask.reduce(SUPERSAMPLE), np.float32) / 255
    color_3 = np.asarray(COLORS[color], np.float32) + rng.uniform(-14, 14, 3).astype(np.float32)
    # A shape of about the colour of its surroundings would be invisible; it is visible on their negative.
    top, left = max(0, int(y - half)), max(0, int(x - half))
    around_3 = image_HW3[top : int(y + half) + 1, left : int(x + half) + 1].reshape(-1, 3).mean(0)
    if np.abs(around_3 - color_3).sum() < 150:
        np.subtract(255, image_HW3, out=image_HW3)
    # Light falls from one side and fades by at most a sixth, so brown and orange remain distinct.
    ramp_H1 = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * float(rng.uniform(-0.08, 0.08))
    ramp_1W = np.linspace(-1, 1, width, dtype=np.float32)[None] * float(rng.uniform(-0.08, 0.08))
    inside_HW3 = np.clip(color_3 * (1 + ramp_H1 + ramp_1W)[..., None], 0, 255)
    image_HW3[:] = image_HW3 + (inside_HW3 - image_HW3) * cover_HW[..., None]
    return cover_HW


def _decoy(rng: np.random.Generator) -> Outline:
    """The outline of an object that is not in `SHAPES`: a bar, a wavy blob, or an irregular polygon."""
    kind = rng.integers(3)
    if kind == 0:
        thin = rng.uniform(0.08, 0.35)
        return [(-1.0, -thin), (1.0, -thin), (1.0, thin), (-1.0, thin)]
    turn_N = np.linspace(0, 2 * pi, 48, endpoint=False) if kind == 1 else np.sort(rng.uniform(0, 2 * pi, 7))
    radius_N = np.ones(len(turn_N)) if kind == 1 else rng.uniform(0.3, 1.0, len(turn_N))
    for waves in (2, 3, 5) if kind == 1 else ():
        radius_N = radius_N + rng.uniform(0.15, 0.4) / (waves - 1) * np.cos(waves * turn_N + rng.uniform(0, 2 * pi))
    return [(float(r * cos(t)), float(r * sin(t))) for r, t in zip(radius_N / radius_N.max(), turn_N, strict=True)]


def _scatter(rng: np.random.Generator, image_HW3: np.ndarray) -> None:
    """Paint one to four coloured decoys into the image, in place, so that colour alone does not indicate a shape."""
    height, width = image_HW3.shape[:2]
    image = Image.fromarray(image_HW3)
    for _ in range(int(rng.integers(1, 5))):
        color_3 = np.array(list(COLORS.values())[int(rng.integers(len(COLORS)))]) + rng.integers(-30, 31, 3)
        angle, radius = rng.uniform(0, 2 * pi), min(height, width) * rng.uniform(0.08, 0.45)
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        turn = np.array([[cos(angle), -sin(angle)], [sin(angle), cos(angle)]]) * radius
        mask = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE), 0)
        points_N2 = (np.asarray(_decoy(rng)) @ turn.T + (x, y)) * SUPERSAMPLE
        ImageDraw.Draw(mask).polygon([(float(px), float(py)) for px, py in points_N2], fill=255)
        cover = mask.reduce(SUPERSAMPLE)
        if rng.random() < 0.3:
            cover = cover.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
        image.paste(tuple(np.clip(color_3, 0, 255).tolist()), (0, 0, width, height), cover)
    image_HW3[:] = np.asarray(image)


Photos = Sequence[np.ndarray]
"""Photos used as backgrounds, uint8 (H, W, 3) of any size; may be empty."""


def _canvas(rng: np.random.Generator, size: int, photos: Photos = ()) -> np.ndarray:
    """A background or, more often, a crop of a photo if there are `photos`; one in three of the crops has decoys."""
    if photos and rng.random() < 0.6:
        image_HW3 = crop_photo(rng, photos[int(rng.integers(len(photos)))], size=size)
    else:
        image_HW3 = background(rng, width=size, height=size)
        image_HW3 = _bars(rng, image_HW3) if rng.random() < 0.2 else image_HW3
    if photos and rng.random() < 1 / 3:
        _scatter(rng, image_HW3)
    return image_HW3


def draw_image_with_mask(
    rng: np.random.Generator, *, size: int, shape: str, color: str, photos: Photos = ()
) -> tuple[Image.Image, np.ndarray]:
    """`draw_image` together with the coverage of each pixel by the shape, float32 (size, size) in 0..1."""
    image_HW3 = _canvas(rng, size, photos)
    mask_HW = paint(rng, image_HW3, shape=shape, color=color)
    return Image.fromarray(image_HW3), mask_HW


def draw_image(rng: np.random.Generator, *, size: int, shape: str, color: str, photos: Photos = ()) -> Image.Image:
    """A square image, `size` pixels a side, of one `color` `shape` on a generated background or a photo's crop."""
    return draw_image_with_mask(rng, size=size, shape=shape, color=color, photos=photos)[0]


def draw_blank(rng: np.random.Generator, *, size: int, photos: Photos = ()) -> Image.Image:
    """A square image, `size` pixels a side, without a shape."""
    return Image.fromarray(_canvas(rng, size, photos))


def draw_grids(
    rng: np.random.Generator,
    *,
    size: int,
    cols: int,
    rows: int,
    cells: Mapping[int, tuple[str, str]],
    photos: Photos = (),
) -> Image.Image:
    """One large image of cols x rows square cells; `cells` maps a cell (row-major) to its (shape, color).

    Cut into tiles of `size` pixels, it resembles that many frames of a video. With `photos`, two images in three
    consist of crops of them. Of the rest, some have one scene (a background over all cells, or one cell repeated with
    small shifts of brightness), and in some every cell is a separate scene.
    """
    kind = 1.0 if photos and rng.random() < 2 / 3 else rng.random()
    one_photo = rng.random() < 0.5
    full_HW3 = np.empty((rows * size, cols * size, 3), np.uint8)
    if kind < 0.4:
        full_HW3[:] = background(rng, width=cols * size, height=rows * size)
    scene_HW3 = _canvas(rng, size)
    near = int(rng.integers(len(photos))) if photos else 0
    for cell in range(cols * rows):
        top, left = divmod(cell, cols)
        part_HW3 = full_HW3[top * size : (top + 1) * size, left * size : (left + 1) * size]
        if kind == 1.0:
            chosen = (near + int(rng.integers(-8, 9))) % len(photos) if one_photo else int(rng.integers(len(photos)))
            part_HW3[:] = crop_photo(rng, photos[chosen], size=size)
            if rng.random() < 0.15:
                _scatter(rng, part_HW3)
        elif kind >= 0.75:
            part_HW3[:] = _canvas(rng, size)
        elif kind >= 0.4:
            part_HW3[:] = np.clip(scene_HW3 + rng.uniform(-12, 12), 0, 255)
        if cell in cells:
            shape, color = cells[cell]
            if rng.random() < 0.5:  # a needle's background differs from its haystack
                part_HW3[:] = _canvas(rng, size)
            paint(rng, part_HW3, shape=shape, color=color)
    return Image.fromarray(full_HW3)
