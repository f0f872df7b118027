"""M-RoPE position ids: by hand, and as stock transformers where stock is right."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import mrope_models
from support.id_positions import Rules, positions_of_ids

from lvctx.rope.mrope_positions import Grids, Text, VideoGrids, positions

IMAGE, VIDEO, START, END = 1, 2, 3, 4
QWEN2 = Rules(image=IMAGE, video=VIDEO, merge=2, tokens_per_second=None, split=False)
QWEN25 = Rules(image=IMAGE, video=VIDEO, merge=2, tokens_per_second=2, split=False)
QWEN3 = Rules(image=IMAGE, video=VIDEO, merge=2, tokens_per_second=None, split=True)


def test_an_image_between_words_by_hand() -> None:
    """Two words, an image of 2 x 3 tokens, two words."""
    ids, after = positions_of_ids([9, START, *[IMAGE] * 6, END, 9], QWEN2, images=[(1, 4, 6)])
    assert ids.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],  # time stands still
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],  # rows 2, 3
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],  # columns 2, 3, 4; text goes on after the largest, 4
    ]
    assert after == 7


def test_a_long_video_by_hand_text_follows_its_time() -> None:
    """Eight grids of 2 x 2 tokens after three words: times 3 to 10, so text goes on at 11, not at 3 + 2 = 5."""
    ids, after = positions_of_ids([9, 9, START, *[VIDEO] * 32, END, 9], QWEN2, videos=[(8, 4, 4)])
    time, height, width = ids.tolist()
    assert time == [0, 1, 2] + [t for t in range(3, 11) for _ in range(4)] + [11, 12]
    assert height == [0, 1, 2] + [3, 3, 4, 4] * 8 + [11, 12]
    assert width == [0, 1, 2] + [3, 4, 3, 4] * 8 + [11, 12]
    assert after == 13


def test_seconds_of_qwen25_by_hand() -> None:
    """Grids 2 seconds apart at 2 positions a second: 0, 4, 8; then 0.75 seconds apart: 0, 1.5 -> 1, 3."""
    ids, after = positions_of_ids(
        [*[VIDEO] * 3, 9, *[VIDEO] * 3], QWEN25, videos=[(3, 2, 2), (3, 2, 2)], seconds_per_grid=[2.0, 0.75]
    )
    assert ids[0].tolist() == [0, 4, 8, 9, 10, 11, 13]
    assert ids[1].tolist() == ids[2].tolist() == [0, 0, 0, 9, 10, 10, 10]
    assert after == 14


def test_qwen3_makes_every_grid_an_item_by_hand() -> None:
    """Two grids of 1 x 2 tokens, a word of time before each."""
    ids, after = positions_of_ids([9, *[VIDEO] * 2, 9, *[VIDEO] * 2, 9], QWEN3, videos=[(2, 2, 4)])
    assert ids.tolist() == [[0, 1, 1, 3, 4, 4, 6], [0, 1, 1, 3, 4, 4, 6], [0, 1, 2, 3, 4, 5, 6]]
    assert after == 7


def test_a_video_of_two_sizes_by_hand_time_continues() -> None:
    """A grid of 2 x 2, then two of 1 x 1: times 1, 2, 3; the two delimiters between stand at 1 and 2."""
    grids = VideoGrids(runs=(Grids(1, 2, 2), Grids(2, 1, 1)), times=(0, 1, 2))
    ids, after = positions([Text(1), grids, Text(1)])
    assert ids.tolist() == [
        [0, 1, 1, 1, 1, 1, 2, 2, 3, 4],
        [0, 1, 1, 2, 2, 1, 2, 1, 1, 4],
        [0, 1, 2, 1, 2, 1, 2, 1, 1, 4],
    ]
    assert after == 5


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 7, allow_nan=False), st.integers(0, 5))
def test_what_follows_is_after_everything(count: int, height: int, width: int, step: float, words: int) -> None:
    ids, after = positions([Text(words), Grids(count, height, width, step), Text(2)])
    assert ids.shape == (3, words + count * height * width + 2)
    assert int(ids[:, :-2].max()) == int(ids[0, -2]) - 1
    assert after == int(ids.max()) + 1


def test_one_run_is_the_plain_video() -> None:
    grids = VideoGrids(runs=(Grids(5, 2, 3),), times=tuple(range(5)))
    assert torch.equal(positions([Text(2), grids])[0], positions([Text(2), Grids(5, 2, 3)])[0])


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_like_stock_on_text_and_images_and_short_videos(kind: str) -> None:
    """Where a video has no more grids than rows or columns, stock has the next text right in every version."""
    model = mrope_models.skeleton(kind)
    config = model.config
    rules = Rules.of(config)
    images, videos = [(1, 4, 6), (1, 8, 4)], [(2, 8, 8)]
    grid = [config.vision_start_token_id, *[config.video_token_id] * 16, config.vision_end_token_id]
    video = [*grid, 7, 7] * 2 if rules.split else [grid[0], *grid[1:-1] * 2, grid[-1]]
    ids = [5, 6, *[rules.image] * 6, 7, *[rules.image] * 8, 8, *video, 9, 9]
    types = torch.tensor([[1 if i == rules.image else 2 if i == rules.video else 0 for i in ids]])
    seconds = {"second_per_grid_ts": torch.tensor([1.0])} if kind == "qwen2_5_vl" else {}
    stock, delta = model.get_rope_index(
        input_ids=torch.tensor([ids]),
        mm_token_type_ids=types,
        image_grid_thw=torch.tensor(images),
        video_grid_thw=torch.tensor(videos),
        **seconds,
    )
    ours, after = positions_of_ids(ids, rules, images=images, videos=videos, seconds_per_grid=[1.0])
    assert torch.equal(ours, stock[:, 0])
    assert after == len(ids) + int(delta)
