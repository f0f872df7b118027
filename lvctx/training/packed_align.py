"""Packed chat rows as samples of an alignment: long multimodal rows for a LlavaOnevision model.

A row's samples follow each other as one sequence whose tokens attend to all before them, so that a long row has large
positions, as `mrope-extend` trains a Qwen-VL (GIRAFFE, appendix E: concatenated to the target length).
"""

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.data.chat_encoding import TokenSequence
from lvctx.data.conversations import MediaFile
from lvctx.data.packed_chat import ChatRows
from lvctx.errors import InputError, UsageError
from lvctx.models.loading import context_length, load_config
from lvctx.training.align_config import AlignConfig
from lvctx.training.batching import Sample
from lvctx.training.chat_rows import check_tokens
from lvctx.video.hybrid import Hybrid
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.registry import open_vlm
from lvctx.vlm.token_count import LlavaRule

OF_SAMPLES = ("image_encoding", "unires_rule", "max_grids", "frames", "fps", "max_length", "pose")
"""Options that decide what `pack-chat` has decided already."""


def check_packed(config: AlignConfig, model: Path | None) -> ChatRows:
    """The rows of `config.data`, packed for `model`. Raises UsageError and InputError; loads no weights."""
    rows = ChatRows(config.data)
    unused = [name for name in OF_SAMPLES if getattr(config, name)]
    unused += [name for name, value in (("template", "chat"), ("loss_on", "answers")) if getattr(config, name) != value]
    if unused:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise UsageError(f"packed rows leave no choice of {flags}", fix="drop it, or run pack-chat again")
    if config.stage == "dpo":
        raise UsageError("packed rows have no preferences", fix="give --stage projector or full, or pairs as --data")
    if model is None:
        raise UsageError(
            "packed rows need the model that they were packed for", fix="give --init, not --lm and --tower"
        )
    check_tokens(rows, model)
    _check_blocks(rows, model, fix=f"pack-chat with --model {model}")
    longest, context = rows.longest, context_length(load_config(model).get_text_config())
    if longest > context:
        fix = f"extend it first, lvctx extend-lm --context {longest}, or pack-chat with a lower --target-length"
        raise InputError(f"a row has {longest:,} tokens, the model {context:,} positions", where=config.data, fix=fix)
    return rows


def _check_blocks(rows: ChatRows, model: Path, *, fix: str) -> None:
    """Raise InputError for rows whose visual tokens are not those of the model's tower and image encoding."""
    other = InputError("packed for another vision tower or image encoding", where=rows.directory, fix=fix)
    hybrid = rows.manifest["config"].get("hybrid")
    try:
        rule = open_vlm(model, weights=False).token_rule(VideoSampling(hybrid=Hybrid(**hybrid) if hybrid else None))
    except (UsageError, TypeError):
        raise other from None
    assert isinstance(rule, LlavaRule)
    for number in range(len(rows)):
        expected = np.zeros(len(rows.row(number)), bool)
        for item in chain.from_iterable(sample["media"] for sample in rows.samples(number)):
            size = item["width"], item["height"]
            blocks = rule.image(*size) if item["kind"] == "image" else rule.video(*size, item["frames"])
            if [[b.frames, *b.grid] for b in blocks] != [block[1:] for block in item["blocks"]]:
                raise other
            expected[item["at"] : item["at"] + item["tokens"] + 1] = True
        if not np.array_equal(rows.row(number) == rule.placeholder, expected):
            raise other


def media_files(rows: ChatRows, images: Path) -> list[MediaFile]:
    """The files of all rows' media, in order. Raises InputError for a missing one."""
    files = [file for number in range(len(rows)) for file in _row_files(number, rows, images)]
    for file in files:
        if not file.path.is_file():
            raise InputError(f"no such {file.kind}", where=file.path, fix="check --images, or run pack-chat again")
    return files


def _row_files(number: int, rows: ChatRows, images: Path) -> list[MediaFile]:
    media = chain.from_iterable(sample["media"] for sample in rows.samples(number))
    return [MediaFile(item["kind"], images / item["path"], item) for item in media]


def packed_sample(number: int, rows: ChatRows, images: Path) -> Sample:
    """A row as one sequence; `images` is the folder that the paths of its media are relative to."""
    sequence = TokenSequence(ids=rows.row(number).tolist(), labels=rows.labels(number).tolist())
    where = f"{rows.directory} row {number}"
    files = tuple(_row_files(number, rows, images))
    return Sample(number=number, where=where, files=files, sequences=(sequence,))


def packed_facts(rows: ChatRows) -> dict[str, Any]:
    """What the rows hold: numbers of rows, samples, samples of each kind, images and videos."""
    samples = [sample for number in range(len(rows)) for sample in rows.samples(number)]
    media = Counter(item["kind"] for sample in samples for item in sample["media"])
    return {
        "rows": len(rows),
        "samples": len(samples),
        "kinds": dict(sorted(Counter(sample["kind"] for sample in samples).items())),
        "images": media["image"],
        "videos": media["video"],
    }
