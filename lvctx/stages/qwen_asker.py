"""Qwen-VL models shown video files or pictures: sampled, sized, embedded grid by grid, and asked about."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvctx.model.load import DeviceMap, load_image_processor
from lvctx.model.qwen_vl import TIMED
from lvctx.positions.mrope_ids import Rules
from lvctx.stages.asker import Asker
from lvctx.vision.decode import Frame, read_frames
from lvctx.vision.film import Film, check_reachable, shoot
from lvctx.vision.hybrid import Hybrid, Mode
from lvctx.vision.reel import Reel, empty_table, see
from lvctx.vision.rules import qwen_rule


@dataclass(frozen=True, kw_only=True)
class Viewing:
    """How a video is sampled and sized."""

    fps: float = 2.0
    """Frames a second; the paper's."""
    frames: int | None = None
    """This many evenly spread in place of a rate."""
    max_frames: int = 768
    """Where the rate gives more, this many evenly spread; the processor's own default."""
    hybrid: Hybrid = field(default_factory=Hybrid)
    """Resolution; uniform at 240 tokens a grid by default."""
    threshold: float | None = None
    """Adaptive selection of high resolution: least difference from the last high frame, 0 to 1. None: by group."""
    allow_partial: bool = False
    """Whether a video that is cut short, or of which more than 1% is damaged, is taken for what is left of it."""

    @property
    def facts(self) -> dict[str, Any]:
        """What decides which pixels a model sees, for a row."""
        sampled = {"frames": self.frames} if self.frames else {"fps": self.fps, "max_frames": self.max_frames}
        facts = {**sampled, **asdict(self.hybrid), "threshold": self.threshold, "positions": "mrope"}
        return facts | ({"allow_partial": True} if self.allow_partial else {})


def resolution(text: str | None, mode: Mode) -> Hybrid | None:
    """What --hybrid L,M,S and --hybrid-mode ask for; None where neither does. Raises UsageError for other text."""
    return Hybrid.parse(text or "1,240,1", mode) if text or mode != "pair" else None


def viewing(*, hybrid: str, mode: Mode, **options: Any) -> Viewing:
    """A `Viewing` with its resolution as L,M,S. Raises UsageError for other text, or a size that cannot be had."""
    resolution = Hybrid.parse(hybrid, mode)
    check_reachable(resolution)
    return Viewing(hybrid=resolution, **options)


class QwenAsker(Asker):
    """An `Asker` of video files and pictures."""

    longer = "stretch the model with lvctx mrope-extend"

    def __init__(
        self,
        path: Path,
        *,
        viewing: Viewing,
        device: str,
        chunk: int,
        reuse: bool = True,
        device_map: DeviceMap | None = None,
    ) -> None:
        """Load the model. Raises InputError if it cannot be loaded, UsageError for a resolution it cannot have."""
        super().__init__(path, device=device, chunk=chunk, reuse=reuse, device_map=device_map)
        self.viewing = viewing
        self.rule = qwen_rule(path, self.tokenizer, viewing.hybrid)
        self.mark = self.rule.mark("video")
        self.processor = load_image_processor(path)
        self.tokens_per_second = Rules.of(self.vlm.config).tokens_per_second

    def watch(self, path: Path) -> tuple[Film, dict[str, Any]]:
        """Read and resize a video's frames, and show them; with what decoding found out.

        Raises InputError for a video that cannot be read.
        """
        viewing = self.viewing
        if viewing.frames is None:
            reader = read_frames(path, fps=viewing.fps, allow_partial=viewing.allow_partial)
            film = self._shoot(islice(reader, viewing.max_frames + 1))
            if len(film.frames) <= viewing.max_frames:
                self.show_film(film)
                return film, reader.facts
        reader = read_frames(path, frames=viewing.frames or viewing.max_frames, allow_partial=viewing.allow_partial)
        film = self._shoot(reader)
        self.show_film(film)
        return film, reader.facts

    def _shoot(self, frames: Iterable[Frame]) -> Film:
        shots = ((frame.pts, frame.image) for frame in frames)
        return shoot(shots, self.rule, threshold=self.viewing.threshold, resample=self.processor.resample)

    def show_film(self, film: Film) -> None:
        """Take a film as what is being talked about."""
        reel = self._reel(film.pts)
        self._embed(reel, film.frames, reel.ids(range(len(film.frames)), film.blocks))

    def show_images(self, images: Sequence[Image.Image]) -> None:
        """Take pictures, one after the other, as what is being talked about, each at the size the model wants."""
        reel, sized, parts = self._reel([0.0]), [], []
        for number, image in enumerate(images):
            blocks = self.rule.image(*image.size)
            _, down, across = blocks[0].grid
            size = across * self.rule.factor, down * self.rule.factor
            sized.append(image.resize(size, resample=self.processor.resample))
            parts.append(reel.ids([number], blocks))
        self._embed(reel, sized, np.concatenate(parts))

    def _reel(self, pts: Sequence[float]) -> Reel:
        timed = self.vlm.config.model_type in TIMED
        return Reel(
            self.rule,
            vocabulary=self.reader.vocabulary,
            tokens_per_second=self.tokens_per_second,
            times=lambda count: pts,
            write=partial(self.tokenizer.encode, add_special_tokens=False) if timed else None,
        )

    def _embed(self, reel: Reel, frames: Sequence[Image.Image], block: np.ndarray) -> None:
        table_RE = empty_table(self.vlm, reel)
        see(self.vlm, self.processor, reel, table_RE, list(reel.grids), lambda number, size: frames[number])
        self._take(table_RE, block, reel.positions)
