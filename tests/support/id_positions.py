"""Position ids of M-RoPE from token ids and the grids of their placeholders, as stock transformers takes them.

The package computes positions from the parts of a prompt instead, so this is a second way to them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lvctx.rope.mrope_positions import Grids, SequencePart, Text, positions, tokens_per_second


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The position settings of a Qwen-VL configuration."""

    image: int
    """Id of the image placeholder."""
    video: int
    """Id of the video placeholder."""
    merge: int
    """Patches along a side that become one token: 2."""
    tokens_per_second: float | None
    """Qwen2.5-VL: positions per second of video. None: grids are 1 apart."""
    split: bool
    """Qwen3-VL: each grid of a video is a separate item, preceded by its time as text."""

    @classmethod
    def of(cls, config: Any) -> "Rules":
        """The rules of a transformers configuration of Qwen2-VL, Qwen2.5-VL or Qwen3-VL."""
        vision = config.vision_config
        return cls(
            image=config.image_token_id,
            video=config.video_token_id,
            merge=vision.spatial_merge_size,
            tokens_per_second=tokens_per_second(config),
            split=config.model_type.startswith("qwen3_vl"),
        )


def positions_of_ids(
    ids: Sequence[int],
    rules: Rules,
    *,
    images: Sequence[Sequence[int]] = (),
    videos: Sequence[Sequence[int]] = (),
    seconds_per_grid: Sequence[float] = (),
) -> tuple[Tensor, int]:
    """Position ids (3, S) of token ids with placeholders, and the position of the token after them.

    `images` and `videos` are rows of `image_grid_thw` and `video_grid_thw`, that is (grids, patches down, patches
    across); `seconds_per_grid` is one number per video (default 1), used by Qwen2.5-VL only.
    """
    return positions(_parts(list(ids), rules, images, videos, seconds_per_grid))


def _parts(
    ids: list[int],
    rules: Rules,
    images: Sequence[Sequence[int]],
    videos: Sequence[Sequence[int]],
    seconds_per_grid: Sequence[float],
) -> Iterator[SequencePart]:
    waiting = {rules.image: _image_grids(images, rules), rules.video: _video_grids(videos, rules, seconds_per_grid)}
    at = text = 0
    while at < len(ids):
        if ids[at] not in waiting:
            text, at = text + 1, at + 1
            continue
        grids = next(waiting[ids[at]], None)
        assert grids is not None
        size = grids.time * grids.height * grids.width
        assert ids[at : at + size] == [ids[at]] * size
        yield Text(text)
        yield grids
        text, at = 0, at + size
    yield Text(text)
    assert all(next(left, None) is None for left in waiting.values())


def _image_grids(images: Sequence[Sequence[int]], rules: Rules) -> Iterator[Grids]:
    for count, down, across in images:
        yield Grids(int(count), int(down) // rules.merge, int(across) // rules.merge)


def _video_grids(videos: Sequence[Sequence[int]], rules: Rules, seconds: Sequence[float]) -> Iterator[Grids]:
    for i, (count, down, across) in enumerate(videos):
        height, width = int(down) // rules.merge, int(across) // rules.merge
        if rules.split:
            yield from [Grids(1, height, width)] * int(count)
        else:
            step = rules.tokens_per_second * (seconds[i] if i < len(seconds) else 1.0) if rules.tokens_per_second else 1
            yield Grids(int(count), height, width, step)
