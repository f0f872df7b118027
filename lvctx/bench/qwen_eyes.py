"""Qwen-VL models among haystacks of video files: a needle is a grid of the film, and time goes on through it.

The film with its needle is read as `vqa` reads a film: sampled at a rate, sized by hybrid resolution, whose groups are
counted with the needle in it. Where two frames are merged a needle is shown for both, so that it has a grid to itself.
A frame's time is its number in that film over the rate.

Apart, every frame is an image by itself, of the size the model wants: delimiters around each, and positions that go on
by its height or width (Visual Haystacks; GIRAFFE section 3.1). So positions grow much faster than in a film.

Shapes: E width of the language model, R rows of the table.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from lvctx.bench.video_niah import Layout
from lvctx.errors import InputError, UsageError
from lvctx.model.load import load_config, load_image_processor
from lvctx.model.qwen_vl import TIMED
from lvctx.positions.mrope_ids import Rules
from lvctx.vision.decode import Count, count_frames, read_frames
from lvctx.vision.film import check_reachable
from lvctx.vision.hybrid import Hybrid
from lvctx.vision.images import image_size, open_image
from lvctx.vision.reel import Grid, Reel, empty_table, see
from lvctx.vision.rules import qwen_rule
from lvctx.vision.tokens import Block

PICTURES = (".png", ".jpg", ".jpeg")
"""What is taken from a folder, in the order of names; `lvctx niah haystack` writes such."""


class QwenEyes:
    """A Qwen-VL model's tower, and video files or folders of pictures."""

    def __init__(
        self,
        path: Path,
        *,
        tokenizer: Any,
        files: Sequence[Path],
        fps: float,
        hybrid: Hybrid | None,
        apart: bool = False,
        allow_partial: bool = False,
    ) -> None:
        """See `open_eyes`; of a file the first frame is decoded, and all where its packets do not tell how many."""
        self.apart, self.natural = apart, apart and hybrid is None
        hybrid = hybrid or Hybrid()
        if apart and not self.natural:
            hybrid = replace(hybrid, mode="image")
        if hybrid.mode == "literal" and not hybrid.uniform:
            raise UsageError("--hybrid-mode literal merges a needle with its neighbours", fix="pair, or image")
        check_reachable(hybrid)
        self.files, self.fps, self.hybrid = tuple(files), fps, hybrid
        self.rule = rule = qwen_rule(path, tokenizer, hybrid)
        self.processor = load_image_processor(path)
        self.unit = 1 if apart or hybrid.mode == "image" else rule.merge
        self.mark, config = rule.mark("video"), load_config(path)
        self.allow_partial = allow_partial
        counted = [_count(file, fps, allow_partial=allow_partial) for file in self.files]
        partial = [str(file) for file, count in zip(self.files, counted, strict=True) if count.partial]
        width, height = counted[0].width, counted[0].height
        self.size = (width, height)
        """Of the source's frames, in pixels."""
        sizes = {block.grid[1:] for block in self._blocks(width, height, 2 * rule.merge)}
        for file, one in zip(self.files, counted, strict=True):
            across, down = one.width, one.height
            if {block.grid[1:] for block in self._blocks(across, down, 2 * rule.merge)} != sizes:
                raise InputError(
                    f"{across} x {down} pixels beside {width} x {height}", where=file, fix="give one shape"
                )
        count = sum(one.frames for one in counted) // self.unit * self.unit
        self.seconds = np.arange(count) / fps
        self.image_size = min(width, height)
        seconds = Rules.of(config).tokens_per_second
        self.reel = Reel(
            rule,
            vocabulary=int(config.get_text_config().vocab_size),
            tokens_per_second=seconds,
            times=lambda count: (np.arange(count) / fps).tolist(),
            write=functools.partial(tokenizer.encode, add_special_tokens=False) if config.model_type in TIMED else None,
        )
        self.positions = self.reel.positions
        self.facts = {
            "positions": "mrope",
            "fps": fps,
            "hybrid": [hybrid.group, hybrid.tokens, hybrid.ratio],
            "hybrid_mode": hybrid.mode,
            "tokens_per_second": seconds,
            "source_size": [width, height],
        }
        if partial:
            self.facts["partial"] = partial
        if apart:
            self.facts |= {"apart": True, "natural_size": self.natural}

    def _blocks(self, width: int, height: int, pictures: int) -> list[Block]:
        return self.rule.image(width, height) * pictures if self.natural else self.rule.video(width, height, pictures)

    def layout(self, frames: int, inserted: int) -> Layout:
        """See `Eyes.layout`: there is no bound."""
        return self

    def ids(self, pictures: np.ndarray) -> np.ndarray:
        """See `Layout`."""
        blocks = self._blocks(*self.size, len(pictures))
        if not self.apart:
            return self.reel.ids(pictures.tolist(), blocks)
        # A needle has the size of the picture whose place it takes, as in a film.
        return np.concatenate(
            [self.reel.ids([number], [block]) for number, block in zip(pictures.tolist(), blocks, strict=True)]
        )

    def table(self, model: Any, frames: int, images: Sequence[Image.Image]) -> torch.Tensor:
        """See `Eyes.table`: the grids of all sequences that were laid out. Frames are decoded once and not kept."""
        table_RE = empty_table(model, self.reel)
        waiting: dict[int, list[Grid]] = defaultdict(list)
        for grid in self.reel.grids:
            waiting[grid.pictures[-1]].append(grid)
        background = tuple(round(255 * mean) for mean in self.processor.image_mean)
        # A picture becomes a frame of the source first, so that it keeps its shape as the frames keep theirs.
        inserted = [ImageOps.pad(image, self.size, color=background) for image in images]
        shown = islice(
            chain.from_iterable(_frames(file, self.fps, allow_partial=self.allow_partial) for file in self.files),
            frames,
        )
        held: dict[int, Image.Image] = {}
        ready: list[Grid] = []

        def take(number: int, size: tuple[int, int]) -> Image.Image:
            picture = held[number] if number < frames else inserted[number - frames]
            return picture.resize(size, resample=self.processor.resample)

        for number, picture in enumerate(shown):
            held[number] = picture
            ready += waiting.pop(number, [])
            if len(held) == 16 * self.unit:
                see(model, self.processor, self.reel, table_RE, _by_size(ready), take)
                held, ready = {}, []
        missing = [number for number in waiting if number < frames]
        if missing:
            raise InputError(f"ends before frame {min(missing)}", where=self.files[-1], fix="is the file whole?")
        ready += [grid for grids in waiting.values() for grid in grids]
        see(model, self.processor, self.reel, table_RE, _by_size(ready), take)
        return table_RE


def _by_size(grids: list[Grid]) -> list[Grid]:
    return sorted(grids, key=lambda grid: grid[1:])


def _count(file: Path, fps: float, *, allow_partial: bool) -> Count:
    """Size and number of frames of a video or a folder of pictures."""
    if not file.is_dir():
        return count_frames(file, fps=fps, allow_partial=allow_partial)
    pictures = _listed(file)
    if not pictures:
        raise InputError("no picture in it", where=file, fix=f"put {' or '.join(PICTURES)} there")
    width, height = image_size(pictures[0])
    return Count(frames=len(pictures), exact=True, width=width, height=height, duration=len(pictures) / fps)


def _listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)


def _frames(file: Path, fps: float, *, allow_partial: bool) -> Iterator[Image.Image]:
    if file.is_dir():
        yield from map(open_image, _listed(file))
    else:
        yield from (Image.fromarray(frame.image) for frame in read_frames(file, fps=fps, allow_partial=allow_partial))
