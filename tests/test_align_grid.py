"""Images as UniRes, AnyRes or one grid: tokens by hand, and the saved model read by stock transformers.

Shapes: L tokens, E language-model width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import aligning
from support.aligning import draw, make_forward, talk, write
from support.refusals import refused
from torch import Tensor
from transformers import CLIPVisionModel, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from typer.testing import CliRunner

from lvctx.artifacts.manifest import read_manifest
from lvctx.cli.app import app
from lvctx.data.conversations import read_conversations
from lvctx.errors import InputError
from lvctx.models.image_processing import Preprocess, open_image
from lvctx.models.loading import load_config, load_model, load_tokenizer
from lvctx.models.vlm_assembly import (
    ImageGrid,
    assemble,
    embed_frames,
    frame_features,
    image_grid,
    newline_embedding,
    save_vlm,
)
from lvctx.training.align_statistics import align_statistics
from lvctx.training.batching import Sample, encode_sample
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.image_tiling import ImageEncoding
from lvctx.vlm.registry import open_vlm

GRIDS: tuple[ImageGrid, ...] = ("unires", "anyres", "single")


@pytest.fixture(scope="module")
def vlms(tiny_lm: Path, tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[ImageGrid, Path]:
    """A saved VLM for every grid, the last two written over a tokenizer that spoke of another."""
    out = tmp_path_factory.mktemp("vlms")
    tokenizer = load_tokenizer(tiny_lm)
    vlm = assemble(
        load_model(tiny_lm), CLIPVisionModel.from_pretrained(tiny_tower).eval(), tokenizer, where=tiny_lm, seed=0
    )
    for grid in GRIDS:
        ImageEncoding.of(vlm.config.vision_config, grid=grid, rule="code").write_to(vlm.config)
        save_vlm(vlm, tokenizer, tiny_tower, out / grid)
    return {grid: out / grid for grid in GRIDS}


@pytest.mark.parametrize(
    ("grid", "tokens"),
    [
        # The tower has 4 x 4 features a tile of 48 pixels. Wide: 2 x 1 tiles; square: 2 x 2; two wide ones together.
        ("unires", {"wide": 2 * 4 + 1, "square": 4 * 4 + 1, "two": 2 * (2 * 4 + 1)}),
        ("anyres", {"wide": 16 + 4 * (8 + 1), "square": 16 + 8 * (8 + 1), "two": 2 * (16 + 1)}),
        ("single", {"wide": 4 + 1, "square": 4 + 1, "two": 2 * (4 + 1)}),
    ],
)
def test_tokens_are_those_written_by_hand_and_those_embedded(
    vlms: dict[ImageGrid, Path], tmp_path: Path, grid: ImageGrid, tokens: dict[str, int]
) -> None:
    draw(tmp_path)
    shown = {"wide": ["1.png"], "square": ["0.png"], "two": ["1.png", "3.png"]}
    rows = [talk("<image>" * len(images) + "What?", "red", image=images) for images in shown.values()]
    data = write(tmp_path / "data.json", rows)
    tokenizer, model = load_tokenizer(vlms[grid]), load_model(vlms[grid])
    encoding = ImageEncoding.of(model.config.vision_config, grid=grid, rule="code")
    forward = make_forward(model, tokenizer, encoding, vlms[grid])
    for name, row in zip(shown, read_conversations(data, tmp_path), strict=True):
        sample = encode_sample(0, (row,), tokenizer, encoding, max_length=999)
        assert sample.sequences[0].ids.count(model.config.video_token_id) == tokens[name]
        with torch.no_grad():  # masked_scatter would leave what does not fit: the blocks themselves are counted
            blocks = forward.blocks(sample)
        assert sum(len(block) for block in blocks) == tokens[name]


def test_no_image_has_more_grids_than_asked_for(vlms: dict[ImageGrid, Path], tmp_path: Path) -> None:
    """A picture of 8 x 8 tiles: 64 grids where they are allowed, else as near 49 or 5 as a grid of its aspect comes."""
    Image.new("RGB", (8 * 48, 8 * 48), "red").save(tmp_path / "large.png")
    data = write(tmp_path / "data.json", [talk("<image>What?", "red", image="large.png")])
    tokenizer, model = load_tokenizer(vlms["unires"]), load_model(vlms["unires"])
    for most, grids in {64: 64, 49: 49, 5: 4}.items():
        encoding = ImageEncoding.of(model.config.vision_config, grid="unires", rule="code", max_grids=most)
        assert encoding.tokens(tmp_path / "large.png", alone=True) == 4 * grids + 1
        sample = encode_sample(0, tuple(read_conversations(data, tmp_path)), tokenizer, encoding, max_length=999)
        with torch.no_grad():
            (block,) = make_forward(model, tokenizer, encoding, vlms["unires"]).blocks(sample)
        assert len(block) == 4 * grids + 1


def test_the_rule_of_unires_stays_with_the_model(tiny_lm: Path, tiny_tower: Path, tmp_path: Path) -> None:
    """Through the next stage, which is not told it again, a longer context, and export: config.json holds it."""
    draw(tmp_path)
    data = write(tmp_path / "data.json", [talk("<image>What?", "red", image="1.png")])
    unires: Any = {"unires_rule": "paper", "max_grids": 64}
    aligning.align(data, tmp_path / "a", tiny_lm, tiny_tower, **unires, steps=1, batch=1)
    plan = aligning.align(data, tmp_path / "b", None, None, init=str(tmp_path / "a"), steps=1, batch=1)
    assert (plan.config.unires_rule, plan.config.max_grids) == ("paper", 64)
    for command in (
        f"extend-lm --model {tmp_path}/b --rope-theta 2e4 --steps 0 -o {tmp_path}/c -q",
        f"export {tmp_path}/c --to hf -o {tmp_path}/d",
    ):
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code == 0, done.output
    told = ImageEncoding.from_config(load_config(tmp_path / "d"))
    assert (told.rule, told.max_grids) == ("paper", 64)
    aligned, extended = (read_manifest(tmp_path / name)["longest_sample"] for name in "bc")
    assert aligned == extended > 0


@pytest.mark.parametrize("windowed", [False, True])
def test_samples_of_a_micro_batch_do_not_see_each_other(
    vlms: dict[ImageGrid, Path], tmp_path: Path, windowed: bool
) -> None:
    """Hidden states and gradients of four samples in one row are those of each alone, also beside a sliding window."""
    draw(tmp_path)
    rows: list[Any] = [talk("<image>What?", "red", image="1.png"), talk("Hi.", "Hello there, how are you?")]
    rows += [talk("<image><image>Which?", "the first", image=["0.png", "3.png"]), talk("What is two and two?", "4")]
    tokenizer, model = load_tokenizer(vlms["unires"]), load_model(vlms["unires"], dtype=torch.float32)
    encoding = ImageEncoding.of(model.config.vision_config, grid="unires", rule="code")
    read = read_conversations(write(tmp_path / "data.json", rows), tmp_path)
    samples = [encode_sample(n, (row,), tokenizer, encoding, max_length=999) for n, row in enumerate(read)]
    if windowed:  # far beyond the samples: what it lets through is all, but our attention does not serve it
        model.model.language_model.config.sliding_window = 4096
    forward = make_forward(model, tokenizer, encoding, vlms["unires"])
    assert forward.ours is not windowed

    def run(micro: list[Sample]) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        hidden_TE = forward(micro, lambda hidden, *_: hidden)
        hidden_TE.square().sum().backward()
        return hidden_TE.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    together_TE, gradients = run(samples)
    alone = [run([sample]) for sample in samples]
    torch.testing.assert_close(together_TE, torch.cat([hidden for hidden, _ in alone]), rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        truth = sum(found.get(name, torch.zeros(())) for _, found in alone)
        assert (gradient - truth).norm() <= 1e-4 * truth.norm() + 1e-6, name


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("images", [["0.png"], ["1.png"], ["0.png", "1.png", "3.png"]], ids=len)
def test_training_sees_what_stock_transformers_sees_on_the_saved_model(
    vlms: dict[ImageGrid, Path], tmp_path: Path, grid: ImageGrid, images: list[str]
) -> None:
    """The stock chat template, the stock image processor's pixels and the stock model: logit for logit."""
    draw(tmp_path)
    row = talk("<image>\n" * len(images) + "What?", "red", image=images)
    (conversation,) = read_conversations(write(tmp_path / "data.json", [row]), tmp_path)
    tokenizer, model = load_tokenizer(vlms[grid]), load_model(vlms[grid])
    encoding = ImageEncoding.of(model.config.vision_config, grid=image_grid(model.config), rule="code")
    sample = encode_sample(0, (conversation,), tokenizer, encoding, max_length=999)
    with torch.no_grad():
        hidden_LE = make_forward(model, tokenizer, encoding, vlms[grid])([sample], lambda hidden, *_: hidden)
        ours = model.lm_head(hidden_LE)

    stock = LlavaOnevisionForConditionalGeneration.from_pretrained(vlms[grid]).eval()
    kind = "image" if grid == "anyres" else "video"
    content = [{"type": kind} for _ in images] + [{"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    alone = len(images) == 1
    for image in images:
        text = text.replace(f"<{kind}>", "◇" * encoding.tokens(tmp_path / image, alone=alone), 1)
    pieces = text.replace("◇", f"<{kind}>")
    ids = torch.tensor([tokenizer.encode(pieces, add_special_tokens=False)])
    pictures = [open_image(tmp_path / image) for image in images]
    preprocess = Preprocess.from_directory(vlms[grid])
    tiles = [preprocess(encoding.tiles(p, alone=alone, background=preprocess.background)) for p in pictures]
    with torch.no_grad():
        if grid == "anyres":
            given = {"pixel_values": torch.stack(tiles), "image_sizes": torch.tensor([p.size[::-1] for p in pictures])}
            theirs = stock(input_ids=ids, **given, batch_num_images=torch.tensor([len(images)])).logits[0]
            processor = LlavaOnevisionImageProcessorPil.from_pretrained(vlms[grid])
            pixels = processor([pictures], return_tensors="np")["pixel_values"]
            assert pixels.shape == given["pixel_values"].shape
            assert np.abs(pixels - given["pixel_values"].numpy()).max() < 2 / 255 / 0.26, "two levels of 255"
        else:
            # Several videos of unlike lengths do not stack: each is embedded by the stock model on its own.
            seen = [stock.model.get_video_features(t[None]).pooler_output for t in tiles]
            embeds = stock.get_input_embeddings()(ids)
            is_visual = (ids == stock.config.video_token_id)[..., None]
            embeds = embeds.masked_scatter(is_visual, torch.cat([s.flatten(0, 1) for s in seen]))
            theirs = stock(inputs_embeds=embeds).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_frame_of_a_video_is_one_pooled_grid_under_anyres_too(vlms: dict[ImageGrid, Path]) -> None:
    model = load_model(vlms["anyres"])
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = torch.cat([embed_frames(model, frame_features(model, pixels)), newline_embedding(model)])
        theirs = model.model.get_video_features(pixels[None]).pooler_output[0]
    assert len(ours) == 3 * 4 + 1
    assert torch.equal(ours, theirs)


def test_the_encoding_is_stored_and_the_next_stage_continues_with_it(
    vlms: dict[ImageGrid, Path], tmp_path: Path, tiny_lm: Path, tiny_tower: Path
) -> None:
    draw(tmp_path)
    data = write(tmp_path / "data.json", [talk("<image>What?", "red", image=f"{i}.png") for i in range(4)])
    assert {grid: image_grid(load_config(path)) for grid, path in vlms.items()} == {g: g for g in GRIDS}
    first = aligning.align(data, tmp_path / "first", tiny_lm, tiny_tower, image_encoding="anyres", steps=1)
    assert align_statistics(first, lambda *_: None).visual_tokens == 2 * (16 + 4 * 9) + 2 * (16 + 8 * 9)
    full: dict[str, Any] = {"stage": "full", "init": str(tmp_path / "first"), "steps": 1, "lora": 4}
    second = aligning.align(data, tmp_path / "second", None, None, **full)
    assert second.config.image_encoding == "anyres"
    assert image_grid(load_config(tmp_path / "second")) == "anyres"
    back = aligning.align(data, tmp_path / "back", None, None, **full, image_encoding="single")
    assert align_statistics(back, lambda *_: None).visual_tokens == 4 * 5
    assert image_grid(load_config(tmp_path / "back")) == "single"
    single = aligning.align(data, tmp_path / "single", tiny_lm, tiny_tower, image_encoding="single", steps=1)
    assert single.config.image_encoding == "single"
    first_longest, back_longest, single_longest = (aligning_longest(tmp_path / n) for n in ("first", "back", "single"))
    assert first_longest - single_longest == 16 + 8 * 9 - 5
    assert back_longest == first_longest, "the model it starts from was trained on it"


def aligning_longest(path: Path) -> int:
    from lvctx.artifacts.manifest import read_manifest

    return int(read_manifest(path)["longest_sample"])


def test_other_words_and_rows_that_cannot_be_packed_are_one_line(vlms: dict[ImageGrid, Path]) -> None:
    config = load_config(vlms["single"])
    config.image_grid = "tiles"
    with pytest.raises(InputError, match=r"image_grid 'tiles'; write one of unires, anyres, single"):
        image_grid(config)
    with refused(InputError, "anyres"):
        open_vlm(vlms["anyres"]).token_rule(VideoSampling())
    assert open_vlm(vlms["unires"]).token_rule(VideoSampling()).mark("image") == "<video>"


def test_one_grid_is_padded_to_a_square(tmp_path: Path, tiny_tower: Path) -> None:
    preprocess = Preprocess.from_directory(tiny_tower)
    encoding = ImageEncoding(grid="single", rule="code", tile=48, side=4)
    (tile,) = encoding.tiles(Image.new("RGB", (96, 48), (9, 9, 9)), alone=True, background=preprocess.background)
    assert [tile.getpixel((24, y)) for y in (0, 24)] == [preprocess.background, (9, 9, 9)]
