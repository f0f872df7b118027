"""Given needles: our own list, or one as published for V-NIAH, V-NIAH-D, V-RULER or VideoChat-Flash.

A list is JSON, JSON lines or Parquet in the folder of its images, such a file by itself, or the split `test` of a
dataset, on the hub or saved. It has an image, a question and an answer in every row; LongVA and VideoRoPE call the
first two `path` and `prompt`, and their questions begin with the newline that ends the block of frames. A row of ours
with `"distractor": true` is a distractor and needs only its image. In V-NIAH-D every needle has a distractor of its
own: `interrupt_path` in its row, or the same row of the list whose name ends in `_interrupt`. Rows with several
images are about all of them: VideoChat-Flash's (multi-hop; `images`, `question1`, `answer1`, `question2`, `answer2`, so
two questions a row) and V-RULER's (counting, ordering; `path` is a list. Multi-key multi-value: `path` is a Python list
as text, and its images are near the cell's depth).
"""

import ast
import io
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from lvctx.data.records import Record, read_records
from lvctx.errors import InputError, library_errors
from lvctx.eval.niah.image_needles import ImageNeedle, NeedleSet, Placing, SpreadNeedles, chance_of_options
from lvctx.models.image_processing import open_image

LISTS = (".jsonl", ".json", ".parquet")
INTERRUPT = "_interrupt"


def read_needles(source: Path) -> NeedleSet:
    """The needles and distractors of a folder, a list, or a dataset.

    Raises InputError naming the row for malformed JSON, a missing key, an unreadable image or an empty answer.
    """
    own, interrupts = _lists(source)
    folder = own.parent
    needles: list[ImageNeedle] = []
    distractors: list[ImageNeedle] = []
    paired: list[ImageNeedle] = []
    spread: list[SpreadNeedles] = []
    for record in read_records(own, split="test"):
        row = _row(record)
        paths, placing = _several(row)
        if paths is not None:
            numbers = tuple(range(len(needles), len(needles) + len(paths)))
            spread += _spread(record, row, numbers, placing)
            answer = spread[-1].answer
            needles += [_needle(folder, record, {"path": path, "prompt": "", "answer": answer}) for path in paths]
            continue
        if row.get("distractor") is True:
            distractors.append(_needle(folder, record, row, distractor=True))
            continue
        needles.append(_needle(folder, record, row))
        if "interrupt_path" in row:
            paired.append(_needle(folder, record, {"path": row["interrupt_path"]}, distractor=True))
    for record in read_records(interrupts) if interrupts else ():
        paired.append(_needle(folder, record, _row(record), distractor=True))
    if paired and (len(paired) != len(needles) or distractors):
        what = f"{len(paired)} distractors that belong to a needle, of {len(needles)} needles"
        raise InputError(what, where=source, fix="give one to every needle, and no others")
    # Rows without an image share their numbers with no others.
    alone = bool(distractors or paired) or len(needles) != sum(len(images) for images in {s.images for s in spread})
    if spread and (alone or len({s.placing for s in spread}) > 1):
        raise InputError(
            "some rows have one image and others several, or they are of different sets",
            where=source,
            fix="give a list of one kind",
        )
    if not needles:
        raise InputError("no needle", where=source)
    asked = [(one.question, one.answer) for one in spread or needles]
    return NeedleSet(
        needles=needles,
        distractors=paired or distractors,
        paired=bool(paired),
        spread=spread,
        chance=chance_of_options(asked),
    )


def _lists(source: Path) -> tuple[Path, Path | None]:
    """The list of needles, and that of their distractors if it is another one."""
    if not source.is_dir() or (source / "state.json").is_file() or (source / "dataset_dict.json").is_file():
        return source, None
    lists = sorted(file for file in source.glob("*") if file.suffix.lower() in LISTS)
    own = [file for file in lists if not file.stem.endswith(INTERRUPT)]
    if len(own) != 1 or len(lists) > 2:
        what = f"{len(lists)} lists ({', '.join(LISTS)})"
        raise InputError(what, where=source, fix="a needle folder has one, and its images")
    return own[0], next((file for file in lists if file not in own), None)


def _row(record: Record) -> Mapping[str, Any]:
    return record.fields()


def _several(row: Mapping[str, Any]) -> tuple[list[Any] | None, Placing]:
    """The images of a row that has several, and where they are in the video."""
    if isinstance(images := row.get("images"), list):
        return images, "ends"
    if isinstance(path := row.get("path"), str) and path.startswith("["):
        with suppress(ValueError, SyntaxError):
            if isinstance(paths := ast.literal_eval(path), list):
                return paths, "window"
    return path if isinstance(path, list) else None, "even"


def _spread(record: Record, row: Mapping[str, Any], images: tuple[int, ...], placing: Placing) -> list[SpreadNeedles]:
    """The questions of a row with several images."""
    hops = (("question1", "answer1", "caption"), ("question2", "answer2", "qa"))
    names = hops if placing == "ends" else (("prompt", "answer", ""),)
    found = []
    for question, answer, part in names:
        asked, right = row.get(question), row.get(answer)
        if not (isinstance(asked, str) and isinstance(right, str) and right.strip()):
            raise InputError(f"no {question} or {answer}", where=record.where, fix="correct the row")
        text = asked.removeprefix("\n")
        found.append(SpreadNeedles(images=images, question=text, answer=right.strip(), placing=placing, part=part))
    return found


def _needle(folder: Path, record: Record, row: Mapping[str, Any], *, distractor: bool = False) -> ImageNeedle:
    image = row.get("image", row.get("path"))
    question, answer = ("", "") if distractor else (row.get("question", row.get("prompt")), row.get("answer"))
    if image is None or question is None or answer is None or isinstance(answer, dict | list):
        raise InputError("not an object with image, question and answer", where=record.where, fix="correct the row")
    if not str(answer).strip() and not distractor:
        raise InputError("an empty answer", where=record.where, fix="correct the row")
    question = str(question).removeprefix("\n")
    return ImageNeedle(
        image=_image(folder, image, record.where),
        question=question,
        answer=str(answer).strip(),
        subject=f'the image that answers the question "{question.strip()}"',
    )


def _image(folder: Path, image: Any, where: str) -> Image.Image:
    """An image of a row: a path in the folder or in its folder `images`, or bytes or a path as datasets stores them."""
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
        with library_errors("the image cannot be read", where=where):
            return Image.open(io.BytesIO(image["bytes"])).convert("RGB")
    image = image.get("path") if isinstance(image, dict) else image
    if not isinstance(image, str):
        raise InputError("the image is neither a path nor an image's bytes", where=where, fix="correct the row")
    released = folder / "images" / image
    return open_image(released if released.is_file() else folder / image)
