"""Needles for Qwen-VL: a cell scores like a stock forward over its video, and common prefixes are computed once."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import mrope_models
from support.id_positions import Rules, positions_of_ids
from support.mrope_models import Prompt, forward, opinionated
from test_niah import run
from test_prefix import assert_same, plain, tree_size

from lvctx.artifacts.jsonl_log import read_jsonl
from lvctx.eval.niah.image_needles import ImageNeedle, NeedleSet
from lvctx.eval.niah.video_task import VideoNeedleTask
from lvctx.inference.prefix_scorer import PrefixScorer, walk_order
from lvctx.models.vlm_assembly import chat_ids
from lvctx.rope.mrope_positions import Text, positions, tokens_per_second
from lvctx.video.hybrid import Hybrid
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.qwen_frames import pixels, resize_frames
from lvctx.vlm.qwen_vl import QwenVL

BICUBIC = 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("qwen")
    return {kind: mrope_models.save(kind, here / kind) for kind in ("qwen2_vl", "qwen2_5_vl")}


@pytest.fixture(scope="module")
def hay(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """A folder of 13 pictures: the odd last one is no whole grid."""
    here = tmp_path_factory.mktemp("hay")
    rng = np.random.default_rng(0)
    shots = [rng.integers(0, 256, (90, 150, 3), dtype=np.uint8) for _ in range(13)]
    for i, shot in enumerate(shots):
        Image.fromarray(shot).save(here / f"{i:03}.png")
    return here, shots


def fails(code: int, done: Any, words: str) -> None:
    assert done.exit_code == code, done.stderr
    assert words in done.stderr


HYBRIDS = {
    "uniform": Hybrid(tokens=8),
    "pairs": Hybrid(group=2, tokens=24, ratio=4),
    "images": Hybrid(group=3, tokens=24, ratio=4, mode="image"),
}


@pytest.mark.parametrize(
    ("nested", "kind", "name"),
    [
        (True, "qwen2_vl", "uniform"),
        (False, "qwen2_vl", "images"),
        (False, "qwen2_5_vl", "uniform"),
        (True, "qwen2_5_vl", "pairs"),
    ],
)
def test_grid_equals_plain_forwards(
    nested: bool, kind: str, name: str, saved: dict[str, Path], hay: tuple[Path, list[np.ndarray]]
) -> None:
    """Reference: pixels of the whole video, with the needle among them, through the stock forward."""
    folder, shots = hay
    tokenizer, model, hybrid = mrope_models.tokenizer(), opinionated(kind), HYBRIDS[name]
    sampling = VideoSampling(fps=0.75, hybrid=hybrid, hybrid_mode=hybrid.mode)
    haystack = QwenVL(saved[kind]).haystack([folder], sampling, as_images=False)
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (90, 150, 3), dtype=np.uint8) for _ in range(3)]
    needles = [
        ImageNeedle(image=Image.fromarray(p), question=f"What {i}?", answer="ab", subject="")
        for i, p in enumerate(pictures)
    ]
    unit = 1 if name == "images" else 2
    count = len(haystack.seconds)
    assert count == 13 // unit * unit
    tokens = haystack.tokens(count, [needle.image for needle in needles])
    chosen = NeedleSet(needles=needles[:2], distractors=needles[2:])
    test = VideoNeedleTask(tokenizer, chosen, tokens, seconds=haystack.seconds, nested=nested, loop=True)
    cells = test.cells([4, 10, 14], [0, 0.5, 1], 2)
    sequences = [test.sequence(cell)[0] for cell in cells]
    table = tokens.table(model)
    walker = PrefixScorer(copy.deepcopy(model), table, chunk=29, positions=tokens.positions)
    alone = PrefixScorer(copy.deepcopy(model), table, reuse=False, positions=tokens.positions)
    per_second = tokens_per_second(model.config)
    probabilities = set()
    for cell in [cells[i] for i in walk_order(sequences)]:
        ids, answer = test.sequence(cell)
        assert cell.position % unit == 0
        with_needle = [shots[i % count] for i in range(cell.length)]
        spread = 4 if nested else cell.length
        other = int(float(test._distractor_fractions[0]) * spread) // unit * unit
        for at, number in sorted([(cell.position, cell.trial), (other, 2)], key=lambda p: p[0], reverse=True):
            with_needle[at:at] = [pictures[number]] * unit
        seen = resize_frames([(i / 0.75, shot) for i, shot in enumerate(with_needle)], haystack.rule, resample=BICUBIC)
        before, after = chat_ids(tokenizer, cell.question, mark="<|video_pad|>")
        plain_ids = [*before, *haystack.rule.layout(seen.blocks).ids, *after, *tokenizer.encode(cell.answer)]
        found, _ = positions([Text(len(before) + 1), seen.part(per_second), Text(len(after) + 1 + answer)])
        assert torch.equal(tokens.positions(ids, 0)[:, 0], found)
        for cut in range(1, len(ids), 7):  # whatever comes later moves nothing
            assert torch.equal(tokens.positions(ids[:cut], 0)[:, 0], found[:, :cut])
        prompt = Prompt(ids=plain_ids, positions=found, pixels=pixels(seen, haystack.vlm.processor))
        with torch.inference_mode():
            stock = plain(forward(model, prompt).logits[0], np.array(plain_ids), answer)
        probabilities.add(round(stock.log_prob, 3))
        assert_same(walker.score(ids, answer), stock)
        assert_same(alone.score(ids, answer), stock)
    assert len(probabilities) > len(cells) // 2
    assert walker.tokens_run == tree_size(sequences)
    assert walker.tokens_run < 0.75 * alone.tokens_run


@pytest.mark.parametrize("natural", [True, False])
def test_separate_images_equal_a_plain_forward(
    natural: bool, saved: dict[str, Path], hay: tuple[Path, list[np.ndarray]]
) -> None:
    """The other way: stock prompt of an image after the other, each through the model's own processor."""
    folder, shots = hay
    tokenizer, model = mrope_models.tokenizer(), opinionated("qwen2_vl")
    hybrid = None if natural else Hybrid(tokens=8)
    haystack = QwenVL(saved["qwen2_vl"]).haystack([folder], VideoSampling(hybrid=hybrid), as_images=True)
    assert len(haystack.seconds) == 13  # an odd last one is a picture like the others
    picture = np.random.default_rng(1).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    needle = ImageNeedle(image=Image.fromarray(picture), question="What?", answer="ab", subject="")
    visual = haystack.tokens(13, [needle.image])
    chosen = NeedleSet(needles=[needle], distractors=[])
    test = VideoNeedleTask(tokenizer, chosen, visual, seconds=haystack.seconds, nested=True)
    laid_out = [(cell, *test.sequence(cell)) for cell in test.cells([3, 7], [0, 0.5, 1], 1)]
    walker = PrefixScorer(copy.deepcopy(model), visual.table(model), chunk=29, positions=visual.positions)
    size = (140, 84) if natural else (84, 56)  # by hand: 150 x 90 to multiples of 28; the largest of at most 8 tokens
    tokens = size[0] * size[1] // 28**2
    for cell, ids, answer in laid_out:
        shown = [Image.fromarray(shot) for shot in shots[: cell.length]]
        shown.insert(cell.position, needle.image)
        own = haystack.vlm.processor(
            images=[image.resize(size, resample=BICUBIC) for image in shown], do_resize=False, return_tensors="pt"
        )
        before, after = chat_ids(tokenizer, cell.question, mark="<|video_pad|>")
        start, pad, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
        whole = [*before, *([start, *[pad] * tokens, end] * len(shown)), *after, *tokenizer.encode(cell.answer)]
        found, _ = positions_of_ids(whole, Rules.of(model.config), images=own["image_grid_thw"].tolist())
        assert torch.equal(visual.positions(ids, 0)[:, 0], found)
        with torch.inference_mode():
            logits = forward(model, Prompt(ids=whole, positions=found, pixels=dict(own))).logits[0]
        assert_same(walker.score(ids, answer), plain(logits, np.array(whole), answer))


def test_generation_continues_after_the_videos_time(saved: dict[str, Path], hay: tuple[Path, list[np.ndarray]]) -> None:
    """Twelve grids of 2 x 4 tokens: generated tokens follow the last of them, as in `vqa`."""
    model = opinionated("qwen2_5_vl")
    tokenizer = mrope_models.tokenizer()
    sampling = VideoSampling(fps=1, hybrid=Hybrid(tokens=8))
    haystack = QwenVL(saved["qwen2_5_vl"]).haystack([hay[0]] * 2, sampling, as_images=False)
    needle = ImageNeedle(image=Image.new("RGB", (90, 90), (9, 9, 200)), question="What?", answer="a", subject="")
    tokens = haystack.tokens(26, [needle.image])
    test = VideoNeedleTask(tokenizer, NeedleSet(needles=[needle], distractors=[]), tokens, seconds=haystack.seconds)
    ids, _ = test.sequence(test.cells([26], [0.5], 1)[0])
    scorer = PrefixScorer(copy.deepcopy(model), tokens.table(model), positions=tokens.positions)
    generated = scorer.score(ids, 1, generate=4).generated
    assert generated is not None
    for i in range(4):
        again = np.array([*ids[:-1], *generated[: i + 1]])
        assert scorer.score(again, 1).forced
    text = [int(p) for p in tokens.positions(ids, 0)[0, 0, -4:]]
    assert text == list(range(text[0], text[0] + 4))
    video_positions = tokens.positions(ids, 0)[0, 0, ids >= tokens.grids.vocabulary]
    assert (
        int(video_positions.max() - video_positions.min()) == 13 * 2 * 2
    )  # the last of 14 grids of two frames a second apart, 2 a second


@pytest.mark.nano
def test_the_command(saved: dict[str, Path], nano: Any, tmp_path: Path) -> None:
    flags = ("niah", "video", "--model", saved["qwen2_vl"], "--haystack", nano.clips / "bikes.mp4", "--lengths", "4,8")
    flags += ("--depths", "0,0.5,1", "--trials", 2, "--fps", 1, "--scoring", "both")
    walked = run(*flags, "--hybrid", "2,24,4", "-o", tmp_path / "a")
    assert walked.exit_code == 0, walked.stderr
    rows = [json.loads(line) for line in walked.stdout.splitlines()]
    assert len(rows) == 12
    assert rows[0]["visual"]["positions"] == "mrope"
    assert rows[0]["visual"]["hybrid"] == [2, 24, 4]
    assert all(row["last_position"] < row["tokens"] for row in rows)
    alone = run(*flags, "--hybrid", "2,24,4", "--no-reuse", "-o", tmp_path / "b")
    verdicts = [
        {r["key"]: (r["teacher_forced"], r["generated"], r["rank"]) for r in read_jsonl(tmp_path / d / "results.jsonl")}
        for d in "ab"
    ]
    assert verdicts[0] == verdicts[1], alone.stderr
    fails(3, run(*flags, "--hybrid", "1,24,1", "-o", tmp_path / "a"), "another run (other prompt)")
    fails(2, run(*flags, "--hybrid", "2,24,4", "--hybrid-mode", "literal", "-o", tmp_path / "c"), "literal")
    for bound in ("--max-frames", "--frames"):
        own = [flag for flag in flags if flag not in ("--fps", 1)]
        fails(2, run(*own, bound, 4, "-o", tmp_path / "c"), "sampled at a rate")
    fails(2, run(*flags, "--lengths", "5", "-o", tmp_path / "c"), "multiples of 2")
    fails(3, run(*flags, "--lengths", "400", "-o", tmp_path / "c"), "--loop")
    facts = json.loads(run(*flags, "--dry-run", "-o", tmp_path / "d").stdout)
    assert facts["last_position"] < facts["longest_tokens"]


def test_images_of_two_shapes_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    for name, size in (("a", (150, 90)), ("b", (90, 150))):
        (tmp_path / name).mkdir()
        Image.new("RGB", size).save(tmp_path / name / "0.png")
    flags = ("niah", "video", "--model", saved["qwen2_vl"], "--lengths", 2, "-o", tmp_path / "o")
    folders = itertools.chain.from_iterable(("--haystack", tmp_path / name) for name in "ab")
    fails(3, run(*flags, *folders), "90 x 150 pixels beside 150 x 90")
