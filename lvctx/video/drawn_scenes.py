"""Procedural video of any length: landscapes, skies and pebbles that a camera pans over, cut into scenes.

It is a haystack that can be distributed freely without storing it: frame i of a seed has the same pixels on every
machine. Therefore everything is integer arithmetic on a hash implemented here (SplitMix64, Steele et al. 2014), without
floating point, whose last bits differ between processors, and without a library's random generator, whose streams may
change with its version. No object with a name is drawn, so a needle's shape occurs only in the needle.

Suffixes: H, W (or S, where square) pixels down and across; 3 the RGB channels. Frames are uint8 RGB, one second apart.
"""

from collections.abc import Callable, Iterator

import numpy as np

VERSION = 1
"""Increases when the pixels of a seed change."""

_MASK = (1 << 64) - 1
_STEP, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(values: np.ndarray) -> np.ndarray:
    """The output of SplitMix64 for each state: uint64 to uint64."""
    z = values + np.uint64(_STEP)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
    return z ^ (z >> np.uint64(31))


class _Dice:
    """SplitMix64 as a stream of numbers."""

    def __init__(self, *seed: int) -> None:
        self._state = 0
        for part in seed:
            self._state = self._next() ^ part

    def _next(self) -> int:
        value = int(_mix(np.array([self._state], np.uint64))[0])
        self._state = (self._state + _STEP) & _MASK
        return value

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + (self._next() >> 11) % (high - low + 1)

    def color(self) -> np.ndarray:
        """Int32 (3,), halfway to grey, since video rarely has pure colours."""
        color_3 = [self.between(16, 239) for _ in range(3)]
        return np.array([(c + sum(color_3) // 3) // 2 for c in color_3], np.int32)


def _lattice(seed: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A hash, uint64, for every point of a grid whose coordinates are int64."""
    down = _mix(rows.astype(np.uint64) ^ np.uint64(seed & _MASK))
    return _mix(down[:, None] ^ (columns.astype(np.uint64) * np.uint64(_STEP))[None])


def _noise(seed: int, y: int, x: int, height: int, width: int, cell: int) -> np.ndarray:
    """Value noise 0..255, int32 (height, width), of the window at (y, x): smooth between points `cell` pixels apart."""

    def axis(start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = start + np.arange(count, dtype=np.int64)
        points, inside = at // cell, at % cell
        smooth = 256 * (3 * inside**2 * cell - 2 * inside**3) // cell**3
        return np.arange(points[0], points[-1] + 2), (points - points[0]), smooth.astype(np.int32)

    (rows, row_H, wy_H), (columns, column_W, wx_W) = axis(y, height), axis(x, width)
    grid = (_lattice(seed, rows, columns) & np.uint64(255)).astype(np.int32)
    across = grid[:, column_W] * (256 - wx_W) + grid[:, column_W + 1] * wx_W
    return (across[row_H] * (256 - wy_H)[:, None] + across[row_H + 1] * wy_H[:, None]) >> 16


def _fractal(seed: int, y: int, x: int, height: int, width: int, cell: int) -> np.ndarray:
    """Octaves of noise from `cell` down to 4 pixels, each half as strong as the one before: 0..255, int32."""
    total, weight, share = np.zeros((height, width), np.int32), 0, 64
    while cell >= 4:
        total += share * _noise(seed + cell, y, x, height, width, cell)
        weight, share, cell = weight + share, max(1, share // 2), cell // 2
    return total // weight


def _blend(first_3: np.ndarray, second_3: np.ndarray, share_HW: np.ndarray) -> np.ndarray:
    """Colours from `first` (share 0) to `second` (255): int32 (H, W, 3)."""
    share = share_HW[..., None]
    return (first_3 * (255 - share) + second_3 * share) // 255


Scene = Callable[[int, int], np.ndarray]
"""Second and side to int32 (S, S, 3)."""


def _sky(dice: _Dice) -> Scene:
    low, high, cloud = dice.color(), dice.color(), dice.color()
    seeds = dice.between(0, 1 << 40), dice.between(0, 1 << 40)
    vy, vx, cell = dice.between(-24, 24), dice.between(8, 64), 1 << dice.between(5, 7)

    def frame(t: int, side: int) -> np.ndarray:
        ramp = np.broadcast_to((np.arange(side, dtype=np.int32) * 255 // side)[:, None], (side, side))
        thick = _fractal(seeds[0], vy * t, vx * t, side, side, cell)
        wisps = _fractal(seeds[1], -vy * t, vx * t // 2, side, side, cell // 2)
        cover = np.clip((thick * 3 + wisps) // 4 * 4 - 384, 0, 255)
        return _blend(high, low, ramp) * (255 - cover)[..., None] // 255 + cloud * cover[..., None] // 255

    return frame


def _hills(dice: _Dice) -> Scene:
    above, below = dice.color(), dice.color()
    ridges = [(dice.between(0, 1 << 40), dice.color(), dice.between(16, 90)) for _ in range(dice.between(2, 4))]
    speed = dice.between(-20, 20) or 7

    def frame(t: int, side: int) -> np.ndarray:
        ramp = np.broadcast_to((np.arange(side, dtype=np.int32) * 255 // side)[:, None], (side, side))
        image = _blend(above, below, ramp)
        for near, (seed, color, rough) in enumerate(ridges, start=1):
            x = speed * near * near * t  # nearer hills pass faster
            shape = _fractal(seed, 0, x, 1, side, 1 << (8 - near))[0]
            top = side * (near + 1) // (len(ridges) + 3) + (shape - 128) * side // 512
            texture = _fractal(seed + 1, 0, x, side, side, 32)
            shade = 255 - rough + texture * rough // 255
            inside = np.arange(side)[:, None] >= top[None]
            image = np.where(inside[..., None], color * shade[..., None] // 255, image)
        return image

    return frame


def _pebbles(dice: _Dice) -> Scene:
    seed, cell = dice.between(0, 1 << 40), dice.between(24, 72)
    vy, vx = dice.between(-30, 30), dice.between(-30, 30) or 11
    colors = np.stack([dice.color() for _ in range(5)])

    def frame(t: int, side: int) -> np.ndarray:
        y, x = (v * t + np.arange(side, dtype=np.int64) for v in (vy, vx))
        row, column = y // cell, x // cell
        rows, columns = np.arange(row[0] - 1, row[-1] + 2), np.arange(column[0] - 1, column[-1] + 2)
        points = _lattice(seed, rows, columns)
        py = rows[:, None] * cell + ((points >> np.uint64(8)) % np.uint64(cell)).astype(np.int64)
        px = columns[None] * cell + ((points >> np.uint64(24)) % np.uint64(cell)).astype(np.int64)
        kind = (points % np.uint64(len(colors))).astype(np.int64)
        nearest = np.full((side, side), 1 << 40, np.int64)
        chosen = np.zeros((side, side), np.int64)
        for dy in range(3):
            for dx in range(3):
                at = np.ix_(row - rows[0] - 1 + dy, column - columns[0] - 1 + dx)
                distance = (y[:, None] - py[at]) ** 2 + (x[None] - px[at]) ** 2
                closer = distance < nearest
                nearest, chosen = np.where(closer, distance, nearest), np.where(closer, kind[at], chosen)
        shade = np.clip(255 - nearest * 200 // (cell * cell), 64, 255)
        return (colors[chosen] * shade[..., None] // 255).astype(np.int32)

    return frame


SCENE_KINDS = (_sky, _hills, _pebbles)


def scene(seed: int, number: int, side: int) -> Iterator[np.ndarray]:
    """The frames, uint8 (S, S, 3), of one scene: 4 to 40 seconds."""
    dice = _Dice(seed, number)
    draw = SCENE_KINDS[dice.between(0, len(SCENE_KINDS) - 1)](dice)
    grain, light, turn = dice.between(0, 1 << 40), dice.between(0, 48), dice.between(8, 32)
    for t in range(dice.between(4, 40)):
        swing = abs((t % (2 * turn)) - turn) * light // turn  # brightness rises and falls
        noise = (_lattice(grain + t, np.arange(side), np.arange(side)) & np.uint64(15)).astype(np.int32) - 8
        image = draw(t, side) * (256 - swing) // 256 + noise[..., None]
        yield np.clip(image, 0, 255).astype(np.uint8)
