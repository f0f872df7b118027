"""LLaVA's first stage: an image and its caption without a chat template, one unpooled square grid per image."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import aligning
from transformers import CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.data.chat_encoding import encode_plain
from lvctx.data.conversations import read_conversations
from lvctx.errors import InputError, UsageError
from lvctx.models.loading import load_config, load_model, load_tokenizer
from lvctx.models.loss import IGNORED
from lvctx.models.vlm_assembly import VIDEO_TOKEN, assemble
from lvctx.training.align_config import AlignConfig
from lvctx.training.align_job import resolve_align
from lvctx.training.align_statistics import align_statistics, draw_statistics
from lvctx.training.batching import answer_loss, encode_sample
from lvctx.vlm.image_tiling import ImageEncoding

CAPTIONS = ("a red square.", "noise, <|im_end|> and more", "  a picture ", "blue")
ROWS = [
    aligning.talk(f"Describe the image.\n<image>\nBriefly {i}", caption, image=f"{i}.png")
    for i, caption in enumerate(CAPTIONS)
]
RELEASED: dict[str, Any] = {"template": "plain", "image_encoding": "single-unpooled"}


@pytest.mark.nano
@pytest.mark.parametrize("bos", [False, True])
def test_a_sequence_is_the_image_and_the_caption(tmp_path: Path, tiny_lm: Path, bos: bool) -> None:
    """`preprocess_plain` of LLaVA by hand: <image> + caption + newline; all but <bos> and the image is counted."""
    aligning.draw(tmp_path)
    tokenizer = load_tokenizer(tiny_lm)
    tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO_TOKEN]})
    begin = []
    if bos:
        from tokenizers.processors import TemplateProcessing

        begin = [tokenizer.bos_token_id]
        special = [(tokenizer.bos_token, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=special
        )
    video = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    for row, caption in zip(
        read_conversations(aligning.write(tmp_path / "d.json", ROWS), tmp_path), CAPTIONS, strict=True
    ):
        sequence = encode_plain(row, tokenizer, lambda image: 16)
        if "<|im_end|>" not in caption:  # ".\n" may be one token
            words = tokenizer.backend_tokenizer.encode(caption + "\n", add_special_tokens=False).ids
            assert sequence.ids == begin + [video] * 16 + words
        targets = [IGNORED] * (len(begin) + 16) + sequence.ids[len(begin) + 16 :]
        assert sequence.labels == [*targets[1:], IGNORED]
        assert sequence.places == [len(begin)]
        assert tokenizer.decode(sequence.ids[len(begin) + 16 :]) == caption + "\n"
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in sequence.ids


@pytest.mark.nano
@pytest.mark.parametrize("image", ["0.png", "1.png"])
def test_the_loss_is_that_of_stock_parts(tmp_path: Path, tiny_lm: Path, tiny_tower: Path, image: str) -> None:
    """CLIP's own processor (short side, centre crop), its second-last layer, the projector, no pool, no newline."""
    aligning.draw(tmp_path)
    tokenizer, tower = load_tokenizer(tiny_lm), CLIPVisionModel.from_pretrained(tiny_tower).eval()
    vlm = assemble(load_model(tiny_lm), tower, tokenizer, where=tiny_lm, seed=0)
    encoding = ImageEncoding.of(vlm.config.vision_config, grid="single-unpooled", rule="code")
    data = aligning.write(tmp_path / "d.json", [aligning.talk("<image>What?", "a red square.", image=image)])
    sample = encode_sample(
        0, tuple(read_conversations(data, tmp_path)), tokenizer, encoding, max_length=99, template="plain"
    )
    forward = aligning.make_forward(vlm, tokenizer, encoding, tiny_tower)
    pixels = CLIPImageProcessorPil.from_pretrained(tiny_tower)(Image.open(tmp_path / image), return_tensors="pt")
    caption = torch.tensor(tokenizer.encode("a red square.\n", add_special_tokens=False))
    with torch.no_grad():
        total, count = forward([sample], answer_loss)
        features = tower(pixels["pixel_values"], output_hidden_states=True).hidden_states[-2][0, 1:]
        embeds = torch.cat([vlm.model.multi_modal_projector(features), vlm.get_input_embeddings()(caption)])
        logits = vlm.lm_head(vlm.model.language_model(inputs_embeds=embeds[None]).last_hidden_state[0])
    expected = torch.nn.functional.cross_entropy(logits[15:-1], caption, reduction="sum")
    assert count == len(caption)
    assert len(embeds) == 16 + len(caption) == len(sample.sequences[0].ids)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.nano
def test_the_next_stage_chooses_its_own_encoding(tmp_path: Path, tiny_lm: Path, tiny_tower: Path) -> None:
    aligning.draw(tmp_path)
    data = aligning.write(tmp_path / "d.json", ROWS)
    first = aligning.align(data, tmp_path / "a", tiny_lm, tiny_tower, steps=1, **RELEASED)
    assert align_statistics(first, lambda *_: None).visual_tokens == 4 * 16
    assert load_config(tmp_path / "a").image_grid == "single-unpooled"
    options: dict[str, Any] = {"data": data, "images": tmp_path, "out": tmp_path / "b", "init": str(tmp_path / "a")}
    second = resolve_align(AlignConfig(**options, stage="full", image_encoding="unires"))
    assert align_statistics(second, lambda *_: None).visual_tokens == 2 * (16 + 1) + 2 * (8 + 1)
    with pytest.raises(UsageError):
        resolve_align(AlignConfig(**options, stage="dpo", template="plain"))


@pytest.mark.nano
@pytest.mark.parametrize(
    "row",
    [
        aligning.talk("What?", "red"),
        aligning.talk("<image>What?", "red", "And?", "blue", image="0.png"),
        aligning.talk("<image><image>What?", "red", image=["0.png", "1.png"]),
    ],
)
def test_other_rows_have_no_plain_form(tmp_path: Path, tiny_lm: Path, tiny_tower: Path, row: dict[str, Any]) -> None:
    aligning.draw(tmp_path)
    data = aligning.write(tmp_path / "d.json", [*ROWS, row])
    with pytest.raises(InputError) as caught:
        aligning.align(data, tmp_path / "a", tiny_lm, tiny_tower, **RELEASED)
    assert caught.value.where == f"{data}[4]"


@pytest.mark.nano
def test_statistics_of_the_data_are_drawn(tmp_path: Path, tiny_lm: Path, tiny_tower: Path) -> None:
    """Widths, heights and lengths by hand; the plot is the same bytes each time."""
    aligning.draw(tmp_path)
    data = aligning.write(tmp_path / "d.json", ROWS)
    command = [
        "align",
        "--lm",
        str(tiny_lm),
        "--tower",
        str(tiny_tower),
        "--data",
        str(data),
        "--images",
        str(tmp_path),
    ]
    command += ["--image-encoding", "single-unpooled", "--template", "plain", "-o", str(tmp_path / "x")]
    done = CliRunner().invoke(app, [*command, "--dry-run", "--plot", str(tmp_path / "a.svg")])
    assert done.exit_code == 0, done.output
    statistics = align_statistics(
        resolve_align(
            AlignConfig(data=data, images=tmp_path, out=tmp_path, lm=str(tiny_lm), tower=str(tiny_tower), **RELEASED)
        ),
        lambda *_: None,
    )
    draw_statistics(statistics, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    tokenizer = load_tokenizer(tiny_lm)
    words = [len(tokenizer(caption + "\n", split_special_tokens=True).input_ids) for caption in CAPTIONS]
    assert statistics.lengths == [16 + n for n in words]
    assert statistics.sizes == list(aligning.SIZES)
    row = json.loads(done.stdout)
    assert (row["tokens"], row["visual_tokens"], row["counted_tokens"]) == (sum(words) + 64, 64, sum(words))
    assert CliRunner().invoke(app, [*command, "--plot", str(tmp_path / "a.svg")]).exit_code == 2
    assert CliRunner().invoke(app, [*command, "--dry-run", "--plot", str(tmp_path / "a.txt")]).exit_code == 2
