"""Images of every kind become the right RGB pixels, computed here by hand, or an error of one line."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.refusals import refused

from lvctx.errors import InputError
from lvctx.models.image_processing import MAX_PIXELS, image_size, open_image

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def pixels(path: Path) -> np.ndarray:
    image = open_image(path)
    assert image.mode == "RGB"
    assert image_size(path) == image.size
    return np.asarray(image)


def png(path: Path, width: int, height: int, depth: int, kind: int, *chunks: tuple[bytes, bytes]) -> Path:
    """A PNG of these chunks after its header."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    whole = b"\x89PNG\r\n\x1a\n"
    for name, data in (header, *chunks, (b"IEND", b"")):
        whole += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(whole)
    return path


def image_data(rows: np.ndarray) -> tuple[bytes, bytes]:
    """Rows of bytes, unfiltered."""
    return b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))


def test_cmyk(tmp_path: Path) -> None:
    """Ink and black multiply: (255 - C)(255 - K) / 255. Photoshop's JPEGs hold it inverted, which is undone."""
    cmyk = RNG.integers(0, 256, (6, 9, 4), dtype=np.uint8)
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "a.tiff")
    light = 255 - cmyk.astype(float)
    expected = light[..., :3] * light[..., 3:] / 255
    assert np.abs(pixels(tmp_path / "a.tiff") - expected).max() <= 1
    flat = np.full((16, 16, 4), (200, 30, 90, 40), np.uint8)
    Image.fromarray(flat, "CMYK").save(tmp_path / "b.jpg", quality=100)
    assert b"Adobe" in (tmp_path / "b.jpg").read_bytes()
    found = pixels(tmp_path / "b.jpg").astype(int)
    assert np.abs(found - np.array([55, 225, 165]) * 215 / 255).max() <= 3


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])])
def test_palette(transparency: int | bytes | None, tmp_path: Path) -> None:
    """An index is a colour, also where it is transparent."""
    palette = np.array([[250, 1, 2], [3, 240, 4], [5, 6, 230]], np.uint8)
    index = RNG.integers(0, 3, (6, 9), dtype=np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    assert (pixels(tmp_path / "a.png") == palette[index]).all()


def test_alpha_is_left_out(tmp_path: Path) -> None:
    alpha = RNG.integers(0, 256, (6, 9, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([COLORS, alpha], 2)).save(tmp_path / "rgba.png")
    assert (pixels(tmp_path / "rgba.png") == COLORS).all()
    grey = COLORS[..., :1]
    Image.fromarray(np.concatenate([grey, alpha], 2), "LA").save(tmp_path / "la.png")
    assert (pixels(tmp_path / "la.png") == grey).all()
    Image.fromarray(grey[..., 0] > 128).save(tmp_path / "1.png")
    assert (pixels(tmp_path / "1.png") == np.where(grey > 128, 255, 0)).all()


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm", "big-endian.tiff"])
def test_16_bit_grey_is_scaled(name: str, tmp_path: Path) -> None:
    values = np.append(RNG.integers(0, 65536, 46), [0, 65535, 128, 257 * 7 + 128, 32767, 256, 65407, 1]).reshape(6, 9)
    image = Image.fromarray(values.astype(np.uint16))
    if name.startswith("big"):
        image = Image.frombytes("I;16B", (9, 6), values.astype(">u2").tobytes())
    image.save(tmp_path / name)
    assert (pixels(tmp_path / name) == np.rint(values / 257)[..., None]).all()


def test_16_bit_colour_keeps_the_high_byte(tmp_path: Path) -> None:
    values = RNG.integers(0, 65536, (6, 9, 3))
    file = png(tmp_path / "a.png", 9, 6, 16, 2, image_data(values.astype(">u2").reshape(6, -1)))
    assert (pixels(file) == values >> 8).all()


def test_pixels_without_a_known_range_are_refused(tmp_path: Path) -> None:
    """Floats may go from 0 to 1 or to 255, and 32-bit integers to anything: a guess would be black or white."""
    Image.fromarray(RNG.random((6, 9)).astype(np.float32)).save(tmp_path / "f.tiff")
    Image.fromarray(np.full((6, 9), 70_000, np.int32)).save(tmp_path / "i.tiff")
    for name, word in (("f.tiff", "float"), ("i.tiff", "70000")):
        with pytest.raises(InputError, match=word) as e:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(e.value)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tiff"])
def test_of_an_animation_the_first_frame_is_used(name: str, tmp_path: Path) -> None:
    first, *rest = (Image.fromarray(RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)) for _ in range(3))
    more = {"lossless": True} if name.endswith("webp") else {"disposal": 2} if name.endswith("gif") else {}
    first.save(tmp_path / name, save_all=True, append_images=rest, **more)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 3
    assert (pixels(tmp_path / name) == np.asarray(first)).all()


UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: lambda a: np.rot90(a, 1),
    9: lambda a: a,
}
"""EXIF 2.3, tag 0x0112: what is done to the stored pixels; 9 is no orientation."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_exif_rotation(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(COLORS).save(tmp_path / f"a.{suffix}", exif=exif, **more)
    assert (pixels(tmp_path / f"a.{suffix}") == UPRIGHT[orientation](COLORS)).all()


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*\xff\xff\xff\xff"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_is_ignored(exif: bytes, tmp_path: Path) -> None:
    Image.fromarray(COLORS).save(tmp_path / "plain.jpg", quality=100)
    Image.fromarray(COLORS).save(tmp_path / "broken.jpg", quality=100, exif=b"Exif\0\0" + exif)
    assert (pixels(tmp_path / "broken.jpg") == pixels(tmp_path / "plain.jpg")).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_truncated_files_are_one_line_wherever_they_end(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "whole"
    Image.fromarray(np.repeat(np.repeat(COLORS, 5, 0), 5, 1)).save(file, kind)
    raw = file.read_bytes()
    cut = tmp_path / "cut"
    for end in range(0, len(raw) * 9 // 10, max(1, len(raw) // 25)):
        cut.write_bytes(raw[:end])
        with pytest.raises(InputError) as e:
            open_image(cut)
        assert str(e.value).startswith(f"{cut}: unreadable image ("), end
        assert "\n" not in str(e.value)


def test_bombs_are_refused_by_their_header(tmp_path: Path) -> None:
    side = 60_000
    huge = png(tmp_path / "huge.png", side, side, 8, 2, (b"IDAT", zlib.compress(bytes(1000))))
    above = png(tmp_path / "above.png", MAX_PIXELS + 1, 1, 1, 0, (b"IDAT", zlib.compress(bytes(1000))))
    for bomb in (huge, above):
        for look in (open_image, image_size):
            with pytest.raises(InputError, match=f"{MAX_PIXELS:,}"):
                look(bomb)
    text = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9))
    noted = png(tmp_path / "noted.png", 9, 6, 8, 2, text, image_data(COLORS.reshape(6, -1)))
    with refused(InputError, "noted.png"):
        open_image(noted)
