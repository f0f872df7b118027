"""Needles of a video test: drawn or given images, with questions that only they answer.

The question about a drawn needle, "What color is the {shape}?", has one answer as long as no other image has that
shape. A distractor is therefore another shape in another color, drawn the same way: a model that only notices a drawn
image answers with the distractor's color and is wrong. Distractors share no shape or color with any needle, and since
this divides the ten colors, guessing is right once in seven instead of once in ten.
"""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvctx.data.records import read_records
from lvctx.errors import InputError
from lvctx.models.image_processing import open_image
from lvctx.video.drawn_images import COLORS, SHAPES, draw_image

FIND = "Find the image with the {shape}. What color is the {shape}?"
"""The question about a drawn needle; only the image contains the answer."""
DISTRACTOR_SHAPES, DISTRACTOR_COLORS = 4, 3
"""Numbers of shapes and colors reserved for distractors."""


@dataclass(frozen=True, kw_only=True)
class ImageNeedle:
    """An image that is not in the haystack, and a question that only it answers."""

    image: Image.Image
    question: str
    answer: str
    subject: str
    """A description of the image that does not contain the answer."""

    @property
    def digest(self) -> str:
        """Sixteen hex digits of its pixels."""
        return hashlib.sha256(f"{self.image.size}".encode() + self.image.tobytes()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class NeedleSet:
    """Needles and distractors."""

    needles: list[ImageNeedle]
    distractors: list[ImageNeedle]
    chance: float | None = None
    """Accuracy of guessing; None if it is not known."""


def drawn_needles(count: int, *, size: int, seed: int, distractors: int = 0) -> NeedleSet:
    """`count` seeded images of one colored shape, and `distractors` of other shapes in other colors."""
    shapes, colors = list(SHAPES), list(COLORS)
    reserved: tuple[list[str], list[str]] = ([], [])
    if distractors:
        shuffled = np.random.default_rng([seed, 1 << 20])
        shapes, colors = ([str(name) for name in shuffled.permutation(names)] for names in (shapes, colors))
        reserved = shapes[:DISTRACTOR_SHAPES], colors[:DISTRACTOR_COLORS]
        shapes, colors = shapes[DISTRACTOR_SHAPES:], colors[DISTRACTOR_COLORS:]
    needles = [_drawn([seed, trial], size, shapes, colors) for trial in range(count)]
    distractor_images = [_drawn([seed, 1 << 20, i], size, *reserved) for i in range(distractors)]
    return NeedleSet(needles=needles, distractors=distractor_images, chance=chance_of(distractors))


def _drawn(seed: list[int], size: int, shapes: list[str], colors: list[str]) -> ImageNeedle:
    rng = np.random.default_rng(seed)
    shape, color = shapes[int(rng.integers(len(shapes)))], colors[int(rng.integers(len(colors)))]
    image = draw_image(rng, size=size, shape=shape, color=color)
    subject = f"the image with the {shape}"
    return ImageNeedle(image=image, question=FIND.format(shape=shape), answer=color, subject=subject)


def chance_of(distractors: int) -> float:
    """Accuracy of guessing for drawn needles."""
    return 1 / (len(COLORS) - (DISTRACTOR_COLORS if distractors else 0))


def read_needles(source: Path) -> NeedleSet:
    """Needles and distractors: a list of `{"image", "question", "answer"}`, and the images.

    The source is a folder with the images and one .jsonl file, such a file or table, or the split `test` of a dataset,
    on the hub (LongVA's V-NIAH) or saved; LongVA's dataset.json has the keys `path` and `prompt`, and its images are in
    `images` beside it. A row with `"distractor": true` is a distractor and needs only its image. Raises InputError
    naming the row for malformed JSON, a missing key, an unreadable image or an empty answer.
    """
    needles: tuple[list[ImageNeedle], list[ImageNeedle]] = ([], [])
    listing = _listing(source)
    for record in read_records(listing, split="test"):
        where, row = record.where, record.fields()
        cell, is_distractor = row.get("image", row.get("path")), row.get("distractor") is True
        question, answer = (str(value or "") for value in (row.get("question", row.get("prompt")), row.get("answer")))
        if cell is None or (not is_distractor and not (question and "answer" in row)):
            raise _bad_row(where)
        if not answer.strip() and not is_distractor:
            raise InputError("an empty answer", where=where, fix="correct the line")
        # The block of frames ends with the newline that LongVA's questions begin with.
        question = question.removeprefix("\n")
        subject = f'the image that answers the question "{question}"'
        image = _needle_image(cell, listing.parent, where)
        needles[is_distractor].append(
            ImageNeedle(image=image, question=question, answer=answer.strip(), subject=subject)
        )
    if not needles[False]:
        raise InputError("no needle", where=source)
    return NeedleSet(needles=needles[False], distractors=needles[True])


def _bad_row(where: str) -> InputError:
    return InputError("not an object with image, question and answer", where=where, fix="correct the line")


def _listing(source: Path) -> Path:
    """The file, folder or id of the records."""
    if not source.is_dir() or (source / "state.json").is_file() or (source / "dataset_dict.json").is_file():
        return source
    lists = sorted(source.glob("*.jsonl")) or sorted(source.glob("dataset.json"))
    if len(lists) != 1:
        raise InputError(f"{len(lists)} .jsonl files", where=source, fix="a needle folder has one, and its images")
    return lists[0]


def _needle_image(cell: Any, folder: Path, where: str) -> Image.Image:
    """The image of a cell: a path, or its bytes as datasets stores them."""
    content = cell.get("bytes") if isinstance(cell, dict) else None
    if isinstance(content, bytes):
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            try:
                return open_image(Path(file.name))
            except InputError as e:
                raise InputError(e.what, where=where, fix=e.fix) from e
    name = cell.get("path") if isinstance(cell, dict) else cell
    if not isinstance(name, str):
        raise _bad_row(where)
    released = folder / "images" / name
    return open_image(released if released.is_file() else folder / name)
