"""Hybrid resolution: in every group of L frames the first has m visual tokens, the others m/s (GIRAFFE section 3.5).

A group then has m (1 + (L-1)/s) tokens: (4, 240, 3) is 120 per frame on average. L = 1 or s = 1 is uniform resolution.

Qwen2-VL merges two frames into one grid, which requires equal sizes; the paper does not discuss this. Three modes:

- `pair`: a group is L grids, i.e. 2L frames: one grid of m tokens and L-1 of m/s.
- `image`: every frame is a separate image, so a grid holds one frame: the paper's arithmetic, twice the tokens.
- `literal`: a group is L frames; a run of frames of one size is merged in pairs, an odd one with itself.

Consecutive frames of one size are a run, and a run is one item for the model. If a grid holds one frame
(towers of LLaVA models) the modes are the same.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from lvctx.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

HybridMode = Literal["pair", "image", "literal"]
THUMB = 32
"""Side in pixels of the grey thumbnails that adaptive selection compares."""


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """The (L, m, s) of the paper and how frames are merged."""

    group: int = 1
    """L: frames per group (grids in mode `pair`). Paper: 4."""
    tokens: int = 240
    """m: tokens of a grid of high resolution. Paper: 240."""
    ratio: int = 1
    """s: factor by which the others have fewer. Paper: 3."""
    mode: HybridMode = "pair"
    """See above."""

    def __post_init__(self) -> None:
        """Raises UsageError for an invalid resolution."""
        if min(self.group, self.tokens, self.ratio) < 1:
            raise UsageError("L, m and s are at least 1", where=f"{self.group},{self.tokens},{self.ratio}")
        if self.ratio > self.tokens:
            raise UsageError("s is larger than m: no token is left", where=f"{self.group},{self.tokens},{self.ratio}")

    @classmethod
    def parse(cls, text: str) -> "Hybrid":
        """`L,M,S` as on the command line. Raises UsageError for other text."""
        try:
            group, tokens, ratio = map(int, text.split(","))
        except ValueError:
            raise UsageError(f"--hybrid {text!r} is not L,M,S", fix="write 4,240,3") from None
        return cls(group=group, tokens=tokens, ratio=ratio)

    @property
    def uniform(self) -> bool:
        """Whether all frames have one size."""
        return self.group == 1 or self.ratio == 1

    @property
    def low_tokens(self) -> int:
        """Tokens of a grid of low resolution: m/s, rounded down."""
        return self.tokens // self.ratio


class Run(NamedTuple):
    """Consecutive frames of one size."""

    frames: int
    grids: int
    high: bool


def runs(frames: int, hybrid: Hybrid, *, merge: int) -> Iterator[Run]:
    """The runs of `frames` frames for a model that merges `merge` of them into a grid: 2 for Qwen2-VL, else 1."""
    assert frames > 0
    if hybrid.mode == "image":
        merge = 1
    if hybrid.uniform:
        yield Run(frames, math.ceil(frames / merge), True)
        return
    first = merge if hybrid.mode == "pair" else 1
    high = True
    while frames:
        count = min(frames, first if high else first * (hybrid.group - 1))
        yield Run(count, math.ceil(count / merge), high)
        frames, high = frames - count, not high


def hybrid_tokens(frames: int, hybrid: Hybrid, *, merge: int) -> int:
    """Visual tokens of a video whose grids fill their budgets exactly."""
    return sum(
        run.grids * (hybrid.tokens if run.high else hybrid.low_tokens) for run in runs(frames, hybrid, merge=merge)
    )


def select_high(
    hybrid: Hybrid, *, merge: int, threshold: float | None = None
) -> Callable[[int, "np.ndarray | None"], bool]:
    """Which frames are of high resolution: a function of a frame's number and thumbnail or image, called in order.

    Without `threshold`, these are the first frame of each group (the first `merge` in mode `pair`, where they share a
    grid). With it, a frame whose grey thumbnail differs from that of the last high one by at least that much: mean
    absolute difference, 0 to 1. The other frames of a pair follow its first. Images are (H, W, 3).
    """
    unit = merge if hybrid.mode == "pair" else 1
    last: np.ndarray | None = None
    high = True

    def is_high(number: int, image: "np.ndarray | None") -> bool:
        nonlocal last, high
        if hybrid.uniform:
            return True
        if threshold is None:
            return number // unit % hybrid.group == 0
        assert image is not None
        if number % unit == 0:
            thumb = thumbnail(image) if image.ndim == 3 else image
            high = last is None or float(abs(thumb - last).mean()) >= threshold
            last = thumb if high else last
        return high

    return is_high


def thumbnail(image_HW3: "np.ndarray") -> "np.ndarray":
    """A small grey image of a frame, float32 (THUMB, THUMB), 0 to 1."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.fromarray(image_HW3).convert("L").resize((THUMB, THUMB)), np.float32) / 255
