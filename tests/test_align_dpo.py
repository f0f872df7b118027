"""Preferences: the loss is its formula on stock logits, the reference is computed once, also if the run is killed."""

import json
import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import aligning
from support.aligning import draw, metrics, talk, write
from transformers import LlavaOnevisionForConditionalGeneration

from lvctx.data.chat_encoding import TokenSequence
from lvctx.data.conversations import read_pairs
from lvctx.errors import InputError, Stopped, UsageError
from lvctx.models.image_processing import Preprocess
from lvctx.models.loading import load_model, load_tokenizer
from lvctx.models.loss import IGNORED
from lvctx.models.vlm_assembly import newline_id
from lvctx.training.batching import Forward, Sample, encode_sample, pack_samples
from lvctx.training.dpo import REFERENCE, log_probs, reference_loss
from lvctx.training.row_order import indices
from lvctx.vlm.image_tiling import ImageEncoding

PAIRS = [
    {"image": "0.png", "prompt": "<image>\nWhat color?", "chosen": "red", "rejected": "blue, I think"},
    {"prompt": "Say hi.", "chosen": "hi there", "rejected": "no"},
    {**talk("<image>Old?", "yes", "And now?", image="1.png"), "chosen": "dark blue", "rejected": "green"},
    {"images": ["2.png", "3.png"], "prompt": "<image><image>Which?", "chosen": "the first", "rejected": "neither"},
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("pairs")
    draw(here)
    return write(here / "pairs.jsonl", PAIRS, lines=True)


@pytest.fixture(scope="module")
def vlm(tiny_lm: Path, tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("start")
    data = write(here / "data.json", [talk("Say hi.", "hi")])
    aligning.align(data, here / "vlm", tiny_lm, tiny_tower, steps=1, batch=1)
    return here / "vlm"


def stock_log_prob(stock: Any, sample: Sample, sequence: TokenSequence, forward: Forward) -> torch.Tensor:
    """From full logits of the stock model in float64: the sum over what is counted."""
    ids = torch.tensor([sequence.ids])
    embeds = stock.get_input_embeddings()(ids)
    if sample.images:
        seen = []
        for image in sample.images:
            from lvctx.models.image_processing import open_image

            tiles = forward.encoding.tiles(open_image(image), alone=True, background=(0, 0, 0))
            pixels = forward.preprocess(tiles).double()
            seen.append(stock.model.get_video_features(pixels[None]).pooler_output[0])
        is_visual = (ids == stock.config.video_token_id)[..., None]
        embeds = embeds.masked_scatter(is_visual, torch.cat(seen))
    logits = stock(inputs_embeds=embeds).logits[0].log_softmax(-1)
    counted = [(i, label) for i, label in enumerate(sequence.labels) if label != IGNORED]
    return torch.stack([logits[i, label] for i, label in counted]).sum()


def test_loss_and_gradient_are_the_formula_on_stock_logits(vlm: Path, pairs: Path) -> None:
    """`-log sigmoid(beta * margin)` in float64, answers of a multi-turn pair counted once: only the last."""
    tokenizer, model = load_tokenizer(vlm), load_model(vlm)
    forward = Forward(
        model,
        encoding=ImageEncoding.of(model.config.vision_config, grid="unires", rule="code"),
        preprocess=Preprocess.from_directory(vlm),
        newline=newline_id(tokenizer),
        tower_grad=False,
        device="cpu",
    )
    samples = [
        encode_sample(i, row, tokenizer, forward.encoding, max_length=999)
        for i, row in enumerate(read_pairs(pairs, pairs.parent))
    ]
    words = [[tokenizer.decode([i for i in s.labels if i != IGNORED]) for s in sample.sequences] for sample in samples]
    assert words == [[f"{row[key]}<|im_end|>" for key in ("chosen", "rejected")] for row in PAIRS]
    with torch.no_grad():
        reference = {s.number: tuple(forward([s], log_probs)[0].tolist()) for s in samples}
        for name, parameter in model.named_parameters():  # the policy has moved away from where it started
            if "language_model" in name or "projector" in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.requires_grad_(True)
    total, count = forward(samples, partial(reference_loss, reference=reference, beta=0.3))
    total.backward()

    stock = LlavaOnevisionForConditionalGeneration.from_pretrained(vlm).double().eval()
    start = {}
    with torch.no_grad():
        for sample in samples:
            start[sample.number] = [stock_log_prob(stock, sample, s, forward) for s in sample.sequences]
    stock.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    # The newline that closes an image is the language model's own token and learns with it.
    stock.model.image_newline = None
    del stock.model._parameters["image_newline"]
    stock.model.image_newline = stock.get_input_embeddings().weight[newline_id(tokenizer)]
    expected = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        chosen, rejected = (stock_log_prob(stock, sample, s, forward) for s in sample.sequences)
        torch.testing.assert_close(
            torch.tensor(reference[sample.number], dtype=torch.float64),
            torch.stack(start[sample.number]),
            rtol=1e-5,
            atol=1e-4,
        )
        margin = (chosen - start[sample.number][0]) - (rejected - start[sample.number][1])
        expected = expected - torch.log(1 / (1 + torch.exp(-0.3 * margin)))
    expected.backward()
    assert count == len(PAIRS)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = dict(stock.named_parameters())
    for name in (
        "model.multi_modal_projector.linear_1.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
    ):
        ours = dict(model.named_parameters())[name].grad.double()
        assert (ours - theirs[name].grad).norm() / theirs[name].grad.norm() < 1e-4, name


def dpo(pairs: Path, out: Path, vlm: Path, **changed: Any) -> Any:
    options: dict[str, Any] = {"stage": "dpo", "init": str(vlm), "lr": 1e-3, "batch": 2, "steps": 4, **changed}
    return aligning.align(pairs, out, None, None, **options)


def test_it_starts_at_log_two_learns_and_leaves_the_tower(pairs: Path, vlm: Path, tmp_path: Path) -> None:
    job = dpo(pairs, tmp_path / "out", vlm, steps=5, batch=4)
    assert (job.config.beta, job.config.tower_lr) == (0.1, 0.0)
    rows = metrics(tmp_path / "out")
    assert rows[0]["tokens"] == 4, "pairs are counted"
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4), "the starting model is its own reference"
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.62
    assert [row["lr"]["lm"] / 1e-3 for row in rows[:2]] == [1.0, pytest.approx(4 / 5)], "linear"
    old, new = (load_file(d / "model.safetensors") for d in (vlm, tmp_path / "out"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert any("mlp" in name for name in changed)
    assert any("projector" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def test_the_reference_is_computed_once_and_a_stopped_run_ends_with_the_same_bytes(
    pairs: Path, vlm: Path, tmp_path: Path
) -> None:
    """Stopped among the references, then among the steps; with LoRA. One pair a micro-batch, as it is 1 token wide."""

    def stop(at: int, when: str) -> Any:
        def report(done: int, total: int, note: str) -> None:
            if note.startswith(when) and done == at:
                raise Stopped

        return report

    options: dict[str, Any] = {"lora": 4, "micro_tokens": 1}
    dpo(pairs, tmp_path / "whole", vlm, **options)
    out = tmp_path / "parts"
    with pytest.raises(Stopped):
        dpo(pairs, out, vlm, **options, on_progress=stop(2, "reference"))
    first = (out / REFERENCE).read_bytes()
    assert first.count(b"\n") == 2
    (out / REFERENCE).write_bytes(first + b'{"key": "torn')
    with pytest.raises(Stopped):
        dpo(pairs, out, vlm, **options, on_progress=stop(2, "loss"))
    assert (out / REFERENCE).read_bytes().startswith(first)
    assert (out / REFERENCE).read_bytes().count(b"\n") == 4
    counted: list[str] = []
    dpo(pairs, out, vlm, **options, on_progress=lambda done, total, note: counted.append(note))
    assert "reference" not in counted, "nothing was computed again"
    assert (out / REFERENCE).read_bytes() == (tmp_path / "whole" / REFERENCE).read_bytes()
    assert metrics(out) == metrics(tmp_path / "whole")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    keys = [json.loads(line)["key"] for line in (out / REFERENCE).read_text().splitlines()]
    assert len(set(keys)) == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "either `prompt` or `conversations`"),
        ({"prompt": "x", "chosen": "a"}, "`chosen` and `rejected` have to be non-empty text"),
        ({"prompt": "x", "chosen": " ", "rejected": "b"}, "`chosen` and `rejected` have to be non-empty text"),
        ({"prompt": "x", "chosen": "a", "rejected": "a "}, "are the same"),
        (
            {"prompt": "<image>", "chosen": "a", "rejected": "b <image>", "image": "0.png"},
            "2 <image> marks for 1 images",
        ),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "image": ["0.png", "0.png"]}, "0 <image> marks for 2 images"),
        ({"prompt": "<image>", "chosen": "a", "rejected": "b", "image": "9.png"}, "no such image"),
        ({**talk("x", "y"), "chosen": "a", "rejected": "b"}, "does not end with a human turn"),
        ({"conversations": "x", "chosen": "a", "rejected": "b"}, "no list of `conversations`"),
    ],
)
def test_a_bad_pair_is_named(pairs: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    data = write(tmp_path / "d.jsonl", [PAIRS[1], row], lines=True)
    with pytest.raises(InputError, match=message) as caught:
        read_pairs(data, pairs.parent)
    assert caught.value.where == f"{data}:2"


def test_flags_that_do_not_go_together(pairs: Path, vlm: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"starts from an aligned model; give --init"):
        aligning.align(pairs, tmp_path / "x", vlm, vlm, stage="dpo")
    with pytest.raises(UsageError, match="--beta needs --stage dpo"):
        aligning.align(pairs, tmp_path / "x", None, None, stage="full", init=str(vlm), beta=0.2)


SEQUENCES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 2)), min_size=1, max_size=40)


@given(SEQUENCES, st.integers(1, 12), st.integers(1, 1000), st.integers(0, 3))
def test_packing_loses_and_repeats_nothing_in_an_epoch(
    lengths: list[tuple[int, int]], batch: int, micro_tokens: int, seed: int
) -> None:
    """And every micro-batch fits, or is one sample alone."""
    samples = [
        Sample(
            number=i,
            where=str(i),
            files=(),
            sequences=tuple(TokenSequence(ids=[0] * max(1, n - k), labels=[]) for k in range(count)),
        )
        for i, (n, count) in enumerate(lengths)
    ]
    seen: list[int] = []
    for step in range(math.ceil(len(samples) / batch)):
        chosen = indices(step, batch=batch, samples=len(samples), seed=seed)
        groups = pack_samples([samples[i] for i in chosen], micro_tokens)
        assert sorted(s.number for group in groups for s in group) == sorted(chosen)
        sizes = [sum(s.tokens for s in group) for group in groups]
        assert all(len(group) == 1 or size <= micro_tokens for group, size in zip(groups, sizes, strict=True))
        assert all(a + b > micro_tokens for a, b in pairwise(sizes)), "two neighbours would have fitted into one"
        seen += chosen
    assert sorted(seen[: len(samples)]) == list(range(len(samples)))
