"""pack-chat: counts against stock code and the paper's table, rows against exhaustive search, labels against text."""

import ast
import base64
import importlib.util
import io
import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Nano
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.refusals import refused

from lvctx.data.bin_packing import best_fit_decreasing
from lvctx.data.chat_mixture import choose_samples, describe_shortage, largest_blend
from lvctx.data.conversations import parse_conversation
from lvctx.data.pack_chat import SHARES, plan_pack_chat, run_pack_chat
from lvctx.data.pack_chat_config import PackChatConfig
from lvctx.data.packed_chat import ChatRows
from lvctx.data.row_images import chat_records
from lvctx.errors import InputError, UsageError
from lvctx.models.unires import unires_grid
from lvctx.video.frame_count import count_frames
from lvctx.video.hybrid import Hybrid, hybrid_tokens, runs
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.token_count import LlavaRule, QwenRule, pooling, smart_resize

MODES = ("pair", "image", "literal")
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
RULE = QwenRule(start=1, end=2, pads={"image": 3, "video": 4}, hybrid=Hybrid())


def save_tokenizer(lm: Path, out: Path, tokens: list[str]) -> Path:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(lm / "tokenizer.json"))
    tokenizer.add_special_tokens(tokens)
    out.mkdir()
    tokenizer.save(str(out / "tokenizer.json"))
    shutil.copy(lm / "tokenizer_config.json", out)
    return out


@pytest.fixture(scope="module")
def qwen(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pack-chat reads of a Qwen2-VL directory, over the tiny model's tokenizer."""
    out = save_tokenizer(tiny_lm, tmp_path_factory.mktemp("qwen") / "qwen", QWEN_TOKENS)
    vision = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    (out / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "vision_config": vision}))
    (out / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 12845056}))
    return out


@pytest.fixture(scope="module")
def llava(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a LlavaOnevision directory whose tower reads 336 pixels in patches of 14."""
    out = save_tokenizer(tiny_lm, tmp_path_factory.mktemp("llava") / "llava", ["<image>", "<video>"])
    vision = {"image_size": 336, "patch_size": 14}
    config = {"model_type": "llava_onevision", "image_grid": "unires", "vision_config": vision}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def media(nano: Nano, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for number, size in enumerate([(640, 480), (200, 300), (56, 56)]):
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number}.png")
    shutil.copy(nano.clips / "bikes.mp4", folder)
    (folder / "junk.mp4").write_bytes(b"junk" * 100)
    return folder


def say(length: int, number: int) -> list[dict[str, str]]:
    question = " ".join(f"{number}:{i}" for i in range(length))
    return [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {number}."}]


def sources(folder: Path) -> dict[str, list[Path]]:
    """Samples of all four kinds, short ones and some of more than 1,500 tokens."""
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"conversations": say(8 + 23 * i, i)} for i in range(20)],
        "image": [{"image": f"{i % 3}.png", "conversations": say(3, i)} for i in range(30)],
        "interleaved": [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": f"First {i}"},
                            {"type": "image", "image": "1.png"},
                            {"type": "image_url", "image_url": {"url": "2.png"}},
                            {"type": "text", "text": "and which?" * i},
                        ],
                    },
                    {"role": "assistant", "content": f"Both {i}."},
                ]
            }
            for i in range(30)
        ],
        "video": [{"video": "bikes.mp4", "conversations": say(4, i)} for i in range(60)],
    }
    for kind in ("image", "video"):
        for row in rows[kind]:
            row["conversations"][0]["value"] = "<image>\n" + row["conversations"][0]["value"]
    paths = {}
    for kind, of in rows.items():
        paths[kind] = [folder / f"{kind}.jsonl"]
        paths[kind][0].write_text("".join(json.dumps(row) + "\n" for row in of))
    return paths


def pack(out: Path, given: dict[str, list[Path]], model: Path, media: Path, **o: Any) -> ChatRows:
    options: dict[str, Any] = {
        "hybrid": "4,24,3",
        "target_length": 4096,
        "long_share": 0.15,
        "long_over": 1500,
        "shard_tokens": 1 << 13,
        **o,
    }
    run = {key: options.pop(key) for key in ("resume", "force") if key in options}
    sources = {kind: tuple(paths) for kind, paths in given.items()}
    config = PackChatConfig(out=out, model=str(model), media=media, **sources, **options)
    run_pack_chat(plan_pack_chat(config), on_progress=lambda done, total, note: None, **run)
    return ChatRows(out)


def same_files(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.iterdir())
    return names == sorted(p.name for p in b.iterdir()) and all(
        (a / n).read_bytes() == (b / n).read_bytes() for n in names
    )


# Counting


def stock_smart_resize() -> Any:
    """transformers' own function; its module cannot be imported without torchvision."""
    found = importlib.util.find_spec("transformers")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "models/qwen2_vl/image_processing_qwen2_vl.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "smart_resize")
    space: dict[str, Any] = {"math": math}
    exec(compile(ast.Module([function], []), str(path), "exec"), space)
    return space["smart_resize"]


STOCK = stock_smart_resize()


@settings(deadline=None, max_examples=300)
@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    low=st.integers(1, 200),
    high=st.sampled_from([240, 80, 768, 16384]),
)
def test_qwens_sizes_are_transformers(width: int, height: int, low: int, high: int) -> None:
    pixels = {"factor": 28, "min_pixels": min(low, high) * 784, "max_pixels": high * 784}
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(InputError, match="200 times"):
            smart_resize(width, height, **pixels)
        return
    down, across = STOCK(height, width, **pixels)
    assert smart_resize(width, height, **pixels) == (across, down)


def test_hybrid_resolution_is_the_papers_arithmetic() -> None:
    """GIRAFFE table 4: tokens a frame of (L, m, s)."""
    for frames, triple, mean in ((512, (1, 240, 1), 240), (512, (4, 240, 3), 120), (1024, (1, 120, 1), 120)):
        group, tokens, ratio = triple
        hybrid = Hybrid(group=group, tokens=tokens, ratio=ratio, mode="image")
        assert hybrid_tokens(frames, hybrid, merge=2) == frames * mean
    # Two frames a grid: half of it, where groups are of grids; by the letter three small frames make two grids.
    assert hybrid_tokens(1024, Hybrid(group=4, tokens=240, ratio=3), merge=2) == 512 * 120
    literal = Hybrid(group=4, tokens=240, ratio=3, mode="literal")
    assert hybrid_tokens(4, literal, merge=2) == 240 + 2 * 80
    assert [r[:2] for r in runs(6, literal, merge=2)] == [(1, 1), (3, 2), (1, 1), (1, 1)]
    assert hybrid_tokens(7, Hybrid(tokens=240, mode="literal"), merge=2) == 4 * 240


@settings(deadline=None)
@given(
    frames=st.integers(1, 300),
    group=st.integers(1, 9),
    ratio=st.integers(1, 9),
    mode=st.sampled_from(MODES),
    merge=st.integers(1, 2),
)
def test_runs_hold_every_frame_once_and_change_size(frames: int, group: int, ratio: int, mode: Any, merge: int) -> None:
    hybrid = Hybrid(group=group, tokens=240, ratio=ratio, mode=mode)
    found = list(runs(frames, hybrid, merge=merge))
    assert sum(run.frames for run in found) == frames
    assert found[0].high
    assert all(a.high != b.high for a, b in itertools.pairwise(found))
    held = 1 if mode == "image" else merge
    assert all(run.grids == math.ceil(run.frames / held) for run in found)
    if merge == 1:
        assert found == list(runs(frames, Hybrid(group=group, tokens=240, ratio=ratio), merge=1))


@pytest.mark.parametrize("triple", [(0, 240, 3), (4, 2, 3), (4, 240, 0)])
def test_a_resolution_that_is_none(triple: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError):
        Hybrid(group=triple[0], tokens=triple[1], ratio=triple[2])


def test_qwens_grids() -> None:
    assert RULE.image(640, 480)[0].grid == (1, 17, 23)  # 476 x 644 pixels
    (video,) = RULE.video(1280, 720, 9)
    assert (video.frames, video.grid[0]) == (9, 5)
    assert video.tokens <= 5 * 240
    assert 28 * 28 * 240 * 0.85 < video.grid[1] * video.grid[2] * 784 <= 28 * 28 * 240
    (small,) = RULE.video(56, 56, 2)
    assert small.grid == (1, 2, 2)  # not enlarged to 128 tokens
    layout = RULE.layout([video, small])
    assert layout.ids == [1, *[4] * video.tokens, 2, 1, *[4] * 4, 2]
    assert [layout.ids[at - 1 : at + 1] for at in layout.at] == [[1, 4], [1, 4]]
    images = QwenRule(start=1, end=2, pads={"image": 3, "video": 4}, hybrid=Hybrid(group=2, ratio=3, mode="image"))
    assert [b.kind for b in images.video(640, 480, 5)] == ["image"] * 5


def test_llavas_grids() -> None:
    rule = LlavaRule(placeholder=7, tile=336, side=24, hybrid=Hybrid(tokens=144))
    for size in ((640, 480), (336, 336), (4032, 3024)):
        columns, rows = unires_grid(*size, tile=336)
        assert rule.layout(rule.image(*size)).ids == [7] * (columns * rows * 144 + 1)
    few = LlavaRule(placeholder=7, tile=336, side=24, max_grids=5, hybrid=Hybrid(tokens=144))
    assert few.image(4032, 4032)[0].grid == (4, 12, 12)
    hybrid = LlavaRule(placeholder=7, tile=336, side=24, hybrid=Hybrid(group=4, tokens=144, ratio=3))
    assert [b.grid for b in hybrid.video(640, 480, 5)] == [(1, 12, 12), (3, 6, 8), (1, 12, 12)]
    assert len(hybrid.layout(hybrid.video(640, 480, 5)).ids) == 2 * 144 + 3 * 48 + 1
    odd = LlavaRule(placeholder=7, tile=384, side=27, hybrid=Hybrid(tokens=196))  # SigLIP so400m-patch14-384
    assert [b.grid for b in odd.video(640, 480, 3)] == [(3, 14, 14)]
    assert pooling(24, 3) == (4, 3)
    assert pooling(24, 4) == (4, 4)
    with pytest.raises(UsageError, match="cannot be pooled to 7"):
        pooling(24, 7)


@pytest.mark.nano
@pytest.mark.parametrize("fps", [2, 1, 3.7])
def test_frames_counted_are_frames_read(nano: Nano, fps: float) -> None:
    for clip in ("bikes.mp4", "bigbuckbunny.mp4"):
        count = count_frames(nano.clips / clip, VideoSampling(fps=fps))
        seen = [frame.image.shape for frame in read_video(nano.clips / clip, VideoSampling(fps=fps))]
        assert count.frames == len(seen)
        assert set(seen) == {(count.height, count.width, 3)}


# Choosing and packing


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """By trying everything."""

    def fits(rest: list[int], rooms: list[int]) -> bool:
        if not rest:
            return True
        for i, room in enumerate(rooms):
            if rest[0] <= room and room not in rooms[:i]:
                rooms[i] -= rest[0]
                if fits(rest[1:], rooms):
                    return True
                rooms[i] += rest[0]
        return False

    ordered = sorted(lengths, reverse=True)
    return next(n for n in itertools.count(1) if fits(ordered, [capacity] * n))


@settings(deadline=None)
@given(data=st.data(), capacity=st.integers(1, 60))
def test_rows_lose_nothing_cut_nothing_and_are_few(data: st.DataObject, capacity: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=9))
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert max(sums) <= capacity
    assert all(a + b > capacity for a, b in itertools.combinations(sums, 2))
    assert len(rows) <= 11 / 9 * fewest_rows(lengths, capacity) + 6 / 9


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_best_fit_is_the_fit_that_is_best(lengths: list[int]) -> None:
    """The same rooms as a packer that looks at every row; and at least as full as half, or one row."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(50 - length)
    rows = best_fit_decreasing(lengths, 50)
    assert sorted(50 - sum(lengths[i] for i in row) for row in rows) == sorted(rooms)
    assert len(rows) == 1 or sum(lengths) > 50 * len(rows) / 2


@settings(deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 100), min_size=1, max_size=30), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    long_share=st.none() | st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]) | st.floats(0, 1),
    long_over=st.integers(0, 100),
    seed=st.integers(0, 2**64),
)
def test_long_samples_have_their_share_and_kinds_at_most_theirs(
    lengths: list[list[int]], weights: list[int], long_share: float | None, long_over: int, seed: int
) -> None:
    of = {f"k{i}": np.array(x) for i, x in enumerate(lengths)}
    shares = {k: weights[i] / sum(weights[: len(of)]) for i, k in enumerate(of)}
    rule: dict[str, Any] = {"long_share": long_share, "long_over": long_over}
    wanted = [(1.0, lambda x: x > 0)]
    if long_share is not None:
        wanted += [(long_share, lambda x: x > long_over), (1 - long_share, lambda x: x <= long_over)]

    def fits(tokens: float) -> bool:
        """Whether the shares can be met with samples that may be cut."""
        return all(
            sum(min(s * tokens, x[has(x)].sum()) for x, s in zip(of.values(), shares.values(), strict=True))
            >= part * tokens - 1e-9 * tokens
            for part, has in wanted
        )

    if not fits(1e-3):
        with pytest.raises(InputError, match="at most"):
            largest_blend(of, shares, **rule)
        return
    tokens = largest_blend(of, shares, **rule)
    assert not fits(tokens + 2)
    taken = choose_samples(of, shares, tokens=tokens, seed=seed, **rule)
    for kind, numbers in taken.items():
        assert len(set(numbers.tolist())) == len(numbers)
        assert int(of[kind][numbers].sum()) <= shares[kind] * tokens + 1
    if long_share is not None:
        long, short = (sum(int(x[taken[k]][has(x[taken[k]])].sum()) for k, x in of.items()) for _, has in wanted[1:])
        assert long >= long_share * (long + short) - 1
        # Short samples lack less than one of each kind.
        lacking = long * (1 - long_share) / long_share - short if long_share > 1e-6 else 0
        assert lacking <= sum(max(x[x <= long_over], default=0) for x in of.values())


@pytest.mark.parametrize("long_share", [0.0, 0.2, 0.4, 0.6, 0.8])
def test_the_long_share_is_exact_as_in_figure_3(long_share: float) -> None:
    """Whatever the samples have, more than enough long ones included; each kind keeps its share."""
    rng = np.random.default_rng(0)
    of = {"a": rng.integers(1, 100, 9000), "b": rng.integers(1, 60, 12_000)}
    shares = {"a": 0.5, "b": 0.5}
    rule: dict[str, Any] = {"long_over": 50, "tokens": 90_000, "seed": 5, "long_share": long_share}
    taken = choose_samples(of, shares, **rule)
    chosen = np.concatenate([of[k][taken[k]] for k in of])
    assert chosen[chosen > 50].sum() / chosen.sum() == pytest.approx(long_share, abs=0.001)
    for kind in of:
        assert of[kind][taken[kind]].sum() == pytest.approx(45_000, rel=0.01)
    assert choose_samples(of, shares, **rule)["a"].tolist() == taken["a"].tolist()


def test_kinds_that_cannot_fill_the_long_share_are_named() -> None:
    of = {"text": np.full(9, 100), "image": np.full(9, 10), "video": np.array([10, 100])}
    shares = {"text": 0.4, "image": 0.4, "video": 0.2}
    with pytest.raises(InputError, match=r"no sample of image is that long, so at most 60%"):
        largest_blend(of, shares, long_share=0.8, long_over=50)
    with pytest.raises(InputError, match=r"no sample of text is that short, so at most 60%"):
        largest_blend(of, shares, long_share=0.2, long_over=50)
    rule: dict[str, Any] = {"tokens": 200, "long_over": 50}
    assert describe_shortage(of, shares, long_share=0.4, **rule) == "text, video lack 30 tokens in short samples"
    assert describe_shortage(of, shares, long_share=None, **rule | {"tokens": 300}) == "image is 30 tokens short"


def test_any_long_share_is_that_of_the_samples() -> None:
    rng = np.random.default_rng(0)
    of = {"a": rng.integers(1, 100, 3000), "b": rng.integers(1, 100, 6000)}
    plain = choose_samples(of, {"a": 0.3, "b": 0.7}, long_share=None, long_over=50, tokens=150_000, seed=5)
    for kind, share in (("a", 0.3), ("b", 0.7)):
        assert of[kind][plain[kind]].sum() == pytest.approx(share * 150_000, abs=100)
        own = of[kind][of[kind] > 50].sum() / of[kind].sum()
        chosen = of[kind][plain[kind]]
        assert chosen[chosen > 50].sum() / chosen.sum() == pytest.approx(own, abs=0.01)


# The command


@pytest.mark.nano
def test_nothing_is_lost_or_cut_and_the_shares_are_reported(qwen: Path, media: Path, tmp_path: Path) -> None:
    rows = pack(tmp_path / "out", sources(tmp_path), qwen, media)
    manifest = rows.manifest
    assert len(manifest["shard_rows"]) > 1
    assert len(rows) == sum(manifest["shard_rows"]) > 1
    kinds: Counter[str] = Counter()
    long = total = 0
    seen = []
    for i in range(len(rows)):
        ids, labels, starts, samples = rows.row(i), rows.labels(i), rows.sample_starts(i), rows.samples(i)
        assert len(ids) == len(labels) <= 4096
        assert [s["start"] for s in samples] == starts.tolist()
        assert np.cumsum([0, *(s["tokens"] for s in samples)]).tolist() == [*starts.tolist(), len(ids)]
        for s in samples:
            seen.append(s["source"])
            kinds[s["kind"]] += s["tokens"]
            long += s["tokens"] * (s["tokens"] > 1500)
            assert labels[s["start"] + s["tokens"] - 1] == -100  # nothing is learned across samples
        total += len(ids)
    left = [json.loads(line) for line in (tmp_path / "out" / "left-out.jsonl").read_text().splitlines()]
    everything = [
        f"{tmp_path}/{k}.jsonl:{i + 1}" for k, n in zip(SHARES, (20, 30, 30, 60), strict=True) for i in range(n)
    ]
    assert sorted(seen + [row["source"] for row in left]) == sorted(everything)
    assert total == manifest["tokens"]
    assert manifest["fill"] == total / (len(rows) * 4096) > 0.5
    assert manifest["long"]["share_achieved"] == pytest.approx(long / total)
    assert long / total >= 0.15
    for kind, share in SHARES.items():
        assert manifest["sources"][kind]["share_requested"] == share
        assert manifest["sources"][kind]["share_achieved"] == pytest.approx(kinds[kind] / total)
        assert kinds[kind] / total == pytest.approx(share, abs=0.1)


@pytest.mark.nano
@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_ids_are_the_texts_and_labels_the_assistants_words(
    family: str, media: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Against the string that a processor would expand: the template written out, placeholders repeated."""
    from transformers import AutoTokenizer

    model = request.getfixturevalue(family)
    tokenizer = AutoTokenizer.from_pretrained(model)
    row = {
        "image": ["0.png", "1.png"],
        "video": "bikes.mp4",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A wall."},
            {"from": "human", "value": "And\n<video>\nor <image>?"},
            {"from": "gpt", "value": "A street, you said: <|im_start|>assistant"},
        ],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    given = {"interleaved": [tmp_path / "a.jsonl"]}
    hybrid = "4,24,3" if family == "qwen" else None
    rows = pack(tmp_path / "out", given, model, media, long_share=None, target_length=9000, hybrid=hybrid)
    frames = len(list(read_video(media / "bikes.mp4", VideoSampling(fps=2))))
    if family == "qwen":

        def item(kind: str, tokens: int) -> str:
            return f"<|vision_start|>{f'<|{kind}_pad|>' * tokens}<|vision_end|>"

        def tokens(w: int, h: int, most: int, least: int) -> int:
            return math.prod(STOCK(h, w, 28, least * 784, most * 784)) // 784

        blocks = [item("image", tokens(640, 480, 16384, 4)), item("image", tokens(200, 300, 16384, 4))]
        shape = next(read_video(media / "bikes.mp4", VideoSampling(fps=2))).image.shape
        high, low = (tokens(shape[1], shape[0], most, 4) for most in (24, 8))
        grids, parts = math.ceil(frames / 2), []
        for first in range(0, grids, 4):
            rest = min(3, grids - first - 1)
            parts += [item("video", high)] + ([item("video", low * rest)] if rest else [])
        blocks.insert(1, "".join(parts))
    else:
        sizes = [math.prod(unires_grid(w, h, tile=336)) for w, h in ((640, 480), (200, 300))]
        blocks = ["<video>" * (144 * n + 1) for n in (sizes[0], frames, sizes[1])]
    turns = [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{blocks[0]}What is it?<|im_end|>\n<|im_start|>assistant\n",
        "A wall.<|im_end|>",
        f"\n<|im_start|>user\nAnd{blocks[1]}or {blocks[2]}?<|im_end|>\n<|im_start|>assistant\n",
        "A street, you said: <|im_start|>assistant<|im_end|>",
        "\n",
    ]
    pieces = [tokenizer(turn, add_special_tokens=False)["input_ids"] for turn in turns]
    # A control token that a turn writes is text.
    said, end = "A street, you said: <|im_start|>assistant", tokenizer.convert_tokens_to_ids("<|im_end|>")
    pieces[3] = [*tokenizer(said, add_special_tokens=False, split_special_tokens=True)["input_ids"], end]
    whole = [token for piece in pieces for token in piece]
    assert rows.row(0).tolist() == whole
    spoken = [i % 2 == 1 for i, piece in enumerate(pieces) for _ in piece]
    expected = [token if said else -100 for token, said in zip(whole[1:], spoken[1:], strict=True)] + [-100]
    assert rows.labels(0).tolist() == expected
    (sample,) = rows.samples(0)
    assert [m["path"] for m in sample["media"]] == ["0.png", "bikes.mp4", "1.png"]
    assert sample["media"][1]["frames"] == frames
    pads = {tokenizer.convert_tokens_to_ids(t) for t in ("<|image_pad|>", "<|video_pad|>", "<video>")}
    held = np.isin(rows.row(0), list(pads))
    for shown in sample["media"]:
        assert sum(math.prod(block[2:]) for block in shown["blocks"]) == shown["tokens"]
        for at, _, *grid in shown["blocks"]:
            assert held[at : at + math.prod(grid)].all()
            held[at : at + math.prod(grid)] = False
    assert held.sum() == (0 if family == "qwen" else 3)  # the closing "\n" of each


@pytest.mark.nano
def test_the_same_bytes_again_and_others_for_another_seed(qwen: Path, media: Path, tmp_path: Path) -> None:
    given = sources(tmp_path)
    pack(tmp_path / "a", given, qwen, media)
    pack(tmp_path / "b", given, qwen, media)
    pack(tmp_path / "c", given, qwen, media, seed=1)
    assert same_files(tmp_path / "a", tmp_path / "b")
    assert not same_files(tmp_path / "a", tmp_path / "c")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()}
    pack(tmp_path / "a", given, qwen, media)
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()}
    with pytest.raises(InputError, match=r"another run's output.*target_length: 4096 -> 2048"):
        pack(tmp_path / "a", given, qwen, media, target_length=2048)
    # What a killed run leaves: some shards and torn files, no manifest.
    (tmp_path / "b" / "MANIFEST.json").unlink()
    (tmp_path / "b" / ".shard-00000.safetensors.partial").write_bytes(b"torn")
    (tmp_path / "b" / "shard-00009.safetensors").write_bytes(b"old")
    with refused(InputError, "b"):
        ChatRows(tmp_path / "b")
    pack(tmp_path / "b", given, qwen, media)
    assert same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.nano
def test_what_cannot_be_met_is_reported(qwen: Path, media: Path, tmp_path: Path) -> None:
    given = sources(tmp_path)
    with pytest.raises(
        InputError, match=r"no sample of image, interleaved, video is that long, so at most 20% are possible"
    ):
        pack(tmp_path / "out", given, qwen, media, long_share=0.3, long_over=1100)
    with pytest.raises(InputError, match=r"100,000,000 tokens cannot be met \(text is \d.* short.*--tokens \d+ is"):
        pack(tmp_path / "out", given, qwen, media, tokens=100_000_000)
    with pytest.raises(UsageError, match="has a share for video, but --video is not given"):
        pack(tmp_path / "out", {"text": given["text"]}, qwen, media, mix={"text": 1, "video": 1})
    with pytest.raises(UsageError, match="--video is not in --mix"):
        pack(tmp_path / "out", given, qwen, media, mix={"text": 1, "image": 1, "interleaved": 1})
    with refused(InputError, "none.jsonl"):
        pack(tmp_path / "out", {"text": [tmp_path / "none.jsonl"]}, qwen, media)
    short = pack(tmp_path / "short", given, qwen, media, target_length=900, long_share=None)
    assert short.manifest["too_long"]
    assert all(name.startswith(f"{tmp_path}/text.jsonl:") for name in short.manifest["too_long"])
    assert short.manifest["sources"]["text"]["too_long"] == len(short.manifest["too_long"])
    with pytest.raises(InputError, match="no sample of text, image, interleaved, video can be packed"):
        pack(tmp_path / "none", given, qwen, media, target_length=16)


TURN = '{"from": "human", "value": "<image>\\nHm?"}, {"from": "gpt", "value": "Yes."}'


@pytest.mark.nano
@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"conversations": [', r"a.jsonl:2: malformed JSON"),
        ("[1]", r"a.jsonl:2: not a JSON object"),
        ('{"image": "none.png", "conversations": [TURN]}', r"a.jsonl:2: .*none.png: no such image"),
        ('{"video": "none.mp4", "conversations": [TURN]}', r"a.jsonl:2: .*none.mp4: no such video"),
        ('{"video": "junk.mp4", "conversations": [TURN]}', r"a.jsonl:2: .*junk.mp4"),
        ('{"image": ["0.png", "1.png"], "conversations": [TURN]}', r"a.jsonl:2: 1 <image> marks for 2 images"),
        ('{"image": 7, "conversations": [TURN]}', r"a.jsonl:2: `image` is neither"),
        ('{"conversations": [{"from": "robot", "value": "Hm"}]}', r"a.jsonl:2: a turn from 'robot'"),
        ('{"conversations": ["Hm"]}', r"a.jsonl:2: a turn from 'Hm'"),
        ('{"conversations": [{"from": "human", "value": 3}]}', r"a.jsonl:2: a turn's content is 3"),
        ('{"conversations": [{"from": "human", "value": "Hm"}]}', r"a.jsonl:2: no answer"),
        ('{"conversations": [{"from": "gpt", "value": "Hm"}]}', r"a.jsonl:2: no answer to train on"),
    ],
)
def test_bad_rows_stop_or_are_left_out_and_named(line: str, what: str, qwen: Path, media: Path, tmp_path: Path) -> None:
    good = json.dumps({"image": "2.png", "conversations": [json.loads(f"[{TURN}]")][0]})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line.replace('TURN', TURN)}\n\n{good}\n")
    given = {"image": [tmp_path / "a.jsonl"]}
    with pytest.raises(InputError, match=what):
        pack(tmp_path / "out", given, qwen, media, long_share=None)
    rows = pack(tmp_path / "out", given, qwen, media, long_share=None, skip_malformed=True)
    assert [s["source"] for s in rows.samples(0)] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:4"] or [
        s["source"] for s in rows.samples(0)
    ] == [f"{tmp_path}/a.jsonl:4", f"{tmp_path}/a.jsonl:1"]
    assert rows.manifest["sources"]["image"]["malformed"] == 1
    left = json.loads((tmp_path / "out" / "left-out.jsonl").read_text())
    assert left["source"] == f"{tmp_path}/a.jsonl:2"


@pytest.mark.nano
def test_empty_files_lists_and_models_that_cannot_see(qwen: Path, tiny_lm: Path, media: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with refused(InputError, "empty.jsonl"):
        pack(tmp_path / "out", {"image": [tmp_path / "empty.jsonl"]}, qwen, media)
    rows = [{"image": "2.png", "conversations": json.loads(f"[{TURN}]")}] * 3
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    packed = pack(tmp_path / "out", {"image": [tmp_path / "list.json"]}, qwen, media, long_share=None)
    assert sorted(s["source"][-3:] for s in packed.samples(0)) == ["[0]", "[1]", "[2]"]
    with refused(InputError, "list.json[0]"):
        pack(tmp_path / "blind", {"image": [tmp_path / "list.json"]}, tiny_lm, media, long_share=None, hybrid=None)
    with refused(InputError, "list.json[0]"):
        pack(tmp_path / "text", {"text": [tmp_path / "list.json"]}, qwen, media, long_share=None)
    (tmp_path / "cut.json").write_text('[{"image"')
    with refused(InputError, "cut.json:1"):
        pack(tmp_path / "cut", {"image": [tmp_path / "cut.json"]}, qwen, media)


def asked_and_answered(path: Path, media: Path) -> list[list[tuple[str, Any]]]:
    """Role and content of each turn of each row; an image as its file's bytes."""
    conversations = [parse_conversation(record) for record in chat_records(path, media)]
    return [
        [
            (turn.role, [p if isinstance(p, str) else (media / p.path).read_bytes() for p in turn.content])
            for turn in conversation.turns
        ]
        for conversation in conversations
    ]


def test_longalpacas_rows(tmp_path: Path) -> None:
    rows = [
        {"file": "book.txt", "instruction": "Below is a book.\n<image>\nNow why?", "input": "", "output": "Because."},
        {"file": None, "instruction": "Sum up.", "input": "A long text.", "output": "Text."},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert asked_and_answered(tmp_path / "a.json", tmp_path) == [
        [("user", ["Below is a book.\n<image>\nNow why?"]), ("assistant", ["Because."])],
        [("user", ["Sum up.\nA long text."]), ("assistant", ["Text."])],
    ]


def test_m3its_rows(tmp_path: Path) -> None:
    """Images are in the rows as base64; they come before the question."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [io.BytesIO(), io.BytesIO()]
    for number, image in enumerate(images):
        Image.new("RGB", (9, 7), (number, 0, 0)).save(image, "PNG")
    encoded = [base64.b64encode(image.getvalue()).decode() for image in images]
    rows: list[dict[str, Any]] = [
        {"instruction": "Look.", "inputs": "What is it?", "image_base64_str": encoded, "outputs": "Black."},
        {"instruction": "Describe it.", "inputs": "", "image_base64_str": encoded[:1], "outputs": "A wall."},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.parquet", "a.json"):
        assert asked_and_answered(tmp_path / name, tmp_path / "media") == [
            [("user", [*(i.getvalue() for i in images), "Look.\nWhat is it?"]), ("assistant", ["Black."])],
            [("user", [images[0].getvalue(), "Describe it."]), ("assistant", ["A wall."])],
        ]
    assert len(list((tmp_path / "media").iterdir())) == 2


@pytest.mark.parametrize(
    "change", [{"image_base64_str": ["~"]}, {"image_base64_str": 3}, {"outputs": 3}, {"inputs": [1]}, {"outputs": None}]
)
def test_bad_rows_with_an_instruction_are_named(change: dict[str, Any], tmp_path: Path) -> None:
    row = {"instruction": "Look.", "inputs": "What?", "image_base64_str": [], "outputs": "Black.", **change}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with refused(InputError, "a.jsonl:1"):
        asked_and_answered(tmp_path / "a.jsonl", tmp_path)


@pytest.mark.nano
def test_samples_with_a_short_video_are_left_out(qwen: Path, media: Path, tmp_path: Path) -> None:
    seconds = count_frames(media / "bikes.mp4", VideoSampling(fps=2)).duration
    rows = [{"video": "bikes.mp4", "conversations": [{"from": "human", "value": "<video>?"}, say(1, 0)[1]]}]
    rows.append({"conversations": say(3, 1)})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"video": [tmp_path / "a.jsonl"]}
    fewer = pack(tmp_path / "fewer", given, qwen, media, long_share=None, min_video_seconds=seconds + 0.01)
    assert (fewer.manifest["samples"], fewer.manifest["sources"]["video"]["short_video"]) == (1, 1)
    assert fewer.manifest["sources"]["video"]["samples"] == 2
    (left,) = map(json.loads, (tmp_path / "fewer" / "left-out.jsonl").read_text().splitlines())
    assert (left["source"], left["why"]) == (f"{tmp_path}/a.jsonl:1", "short video")
