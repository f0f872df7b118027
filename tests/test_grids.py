"""UniRes by both rules, squares and images: the paper's and the released code's numbers, and any size at all."""

import contextlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lvctx.errors import InputError
from lvctx.models.image_processing import MAX_PIXELS, Preprocess, image_size, open_image, square
from lvctx.models.unires import MAX_GRIDS, unires_grid, unires_tiles

SIDES = st.integers(1, 20_000)


@pytest.mark.parametrize(
    ("size", "code", "paper"),
    [
        # `code`: what the released code answers. `paper`: (a // 336) x (b // 336), by hand.
        ((336, 336), (1, 2), (1, 1)),
        ((640, 480), (2, 2), (1, 1)),
        ((768, 768), (3, 3), (2, 2)),
        ((1920, 1080), (6, 4), (5, 3)),
        ((4032, 3024), (8, 6), (8, 6)),
        ((7 * 336, 7 * 336), (7, 7), (7, 7)),
        ((1, 1), (1, 2), (1, 1)),
    ],
)
def test_known_grids(size: tuple[int, int], code: tuple[int, int], paper: tuple[int, int]) -> None:
    assert unires_grid(*size, tile=336) == code
    assert unires_grid(*size, tile=336, rule="paper") == paper


@given(SIDES, SIDES, st.sampled_from([96, 224, 336]), st.integers(2, 60))
@settings(max_examples=50, deadline=None)
def test_code_keeps_most_then_wastes_least(width: int, height: int, tile: int, most: int) -> None:
    columns, rows = unires_grid(width, height, tile=tile, max_grids=most)
    assert 1 < columns * rows <= most

    def kept(w: int, h: int) -> Fraction:
        scale = min(Fraction(w * tile, width), Fraction(h * tile, height))
        return min(scale * scale * width * height, Fraction(width * height))

    # In exact arithmetic nothing keeps more than what truncating both sides to pixels can hide.
    slack = tile * (columns + rows) + width + height
    for w in range(1, most + 1):
        for h in range(1, most // w + 1):
            if w * h > 1:
                assert kept(w, h) <= kept(columns, rows) + slack


@given(SIDES, SIDES, st.integers(1, 60))
@settings(deadline=None)
def test_paper_divides_and_shrinks_only_what_is_too_large(width: int, height: int, most: int) -> None:
    columns, rows = unires_grid(width, height, tile=336, rule="paper", max_grids=most)
    plain = max(1, width // 336), max(1, height // 336)
    assert 1 <= columns * rows <= most
    assert columns <= plain[0]
    assert rows <= plain[1]
    if plain[0] * plain[1] <= most:
        assert (columns, rows) == plain


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["code", "paper"]))
@settings(max_examples=30, deadline=None)
def test_tiles_are_the_image(width: int, height: int, rule: str) -> None:
    image = Image.new("RGB", (width, height), (200, 100, 50))
    tiles = unires_tiles(image, 48, rule)  # type: ignore[arg-type]
    columns, rows = unires_grid(width, height, tile=48, rule=rule)  # type: ignore[arg-type]
    assert len(tiles) == columns * rows
    assert all(t.size == (48, 48) and t.mode == "RGB" for t in tiles)
    whole = np.concatenate(
        [np.concatenate([np.asarray(t) for t in tiles[r * columns :][:columns]], 1) for r in range(rows)]
    )
    filled = (whole == (200, 100, 50)).all(-1)
    assert (filled | (whole == 0).all(-1)).all(), "the picture or black, nothing else"
    down, across = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
    for here, full in ((down, rows * 48), (across, columns * 48)):
        assert abs((full - 1 - here[-1]) - here[0]) <= 1, "centred"
    assert len(down) == rows * 48 or len(across) == columns * 48, "as large as fits"


def test_tiles_are_row_major() -> None:
    image = Image.new("RGB", (96, 48))
    for i, x in enumerate((0, 48)):
        image.paste((0, 100 * (i + 1), 0), (x, 0, x + 48, 48))
    assert [t.getpixel((24, 24)) for t in unires_tiles(image, 48)] == [(0, 100, 0), (0, 200, 0)]
    assert [t.getpixel((24, 24)) for t in unires_tiles(image.rotate(-90, expand=True), 48)] == [
        (0, 100, 0),
        (0, 200, 0),
    ]


def test_strips_cost_no_memory() -> None:
    for size in ((20_000, 1), (1, 20_000), (20_000, 100)):
        strip = Image.new("RGB", size)
        assert 1 <= len(unires_tiles(strip, 336)) <= MAX_GRIDS
        assert 1 <= len(unires_tiles(strip, 336, "paper")) <= MAX_GRIDS
        for mode in ("crop", "pad", "squash"):
            assert square(strip, 336, mode, (1, 2, 3)).size == (336, 336)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 161, 3), dtype=np.uint8))


def test_crop_and_values_are_those_of_transformers() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    ours = Preprocess(size=48, mean=tuple(theirs.image_mean), std=tuple(theirs.image_std))
    for image in (NOISE, NOISE.rotate(90, expand=True), NOISE.resize((48, 48)), NOISE.resize((48, 50))):
        expected = theirs(image, return_tensors="pt")["pixel_values"]
        assert (ours([ours.square(image, "crop")]) - expected).abs().max() < 1e-6


def test_pad_and_squash_keep_everything() -> None:
    grey = (122, 116, 104)  # CLIP's mean colour, truncated
    clip = Preprocess(size=48, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
    assert clip.background == grey
    white = Image.new("RGB", (96, 48), (255, 255, 255))
    padded = np.asarray(clip.square(white, "pad"))
    assert (padded[:10] == grey).all()
    assert (padded[-10:] == grey).all()
    assert (padded[16:32] == 255).all()
    assert (np.asarray(clip.square(white, "squash")) == 255).all()


def test_missing_preprocessing_is_reported_with_its_path(tiny_tower: Path, tmp_path: Path) -> None:
    assert Preprocess.from_directory(tiny_tower).size == 48
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        Preprocess.from_directory(tmp_path)


RED = np.zeros((6, 9, 3), np.uint8)
RED[..., 0] = 255


def test_every_kind_of_image_becomes_upright_rgb(tmp_path: Path) -> None:
    red = Image.fromarray(RED)
    red.convert("P").save(tmp_path / "palette.png")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    red.convert("RGBA").save(tmp_path / "alpha.png")
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (9, 6), "blue")])
    red.save(tmp_path / "moving.webp", save_all=True, append_images=[Image.new("RGB", (9, 6))], lossless=True)
    for file in tmp_path.iterdir():
        image = open_image(file)
        assert (image.mode, image.size) == ("RGB", (9, 6)), file
        assert np.abs(np.asarray(image).astype(int) - RED).max() <= 3, file
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 0x8080, np.uint16)).save(deep)
    assert open_image(deep).getpixel((0, 0)) == (128, 128, 128), "scaled, not clipped"


def test_exif_rotation(tmp_path: Path) -> None:
    file = tmp_path / "turned.png"
    image = Image.new("RGB", (9, 6))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture has to be turned clockwise
    image.save(file, exif=exif)
    assert image_size(file) == open_image(file).size == (6, 9)
    assert open_image(file).getpixel((5, 0)) == (255, 255, 255)


def test_bad_images_are_one_line(tmp_path: Path) -> None:
    text, cut, bomb = tmp_path / "text.png", tmp_path / "cut.jpg", tmp_path / "bomb.png"
    text.write_text("not an image")
    NOISE.save(cut, quality=90)
    cut.write_bytes(cut.read_bytes()[:700])
    Image.new("1", (20_000, 20_000)).save(bomb)
    for file, word in (
        (text, "not an image"),
        (cut, "truncated"),
        (bomb, f"{MAX_PIXELS:,}"),
        (tmp_path / "no", "no such"),
    ):
        with pytest.raises(InputError, match=word) as e:
            open_image(file)
        assert str(file) in str(e.value)
        assert "\n" not in str(e.value)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_images_never_escape(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = tmp_path_factory.mktemp("damaged") / "x"
    NOISE.save(file, data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])))
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 20))):
        raw[data.draw(st.integers(0, min(len(raw) - 1, 400)))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    with contextlib.suppress(InputError):
        assert open_image(file).mode == "RGB"
