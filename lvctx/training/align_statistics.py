"""Statistics of an alignment's data: tokens per sample and image sizes (LongVA, figure 5), with a plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.artifacts.store import atomic_file
from lvctx.config import OnProgress
from lvctx.models.image_processing import image_size
from lvctx.models.loading import load_tokenizer
from lvctx.models.loss import IGNORED
from lvctx.models.vision_encoder import TowerFiles
from lvctx.models.vlm_assembly import VIDEO_TOKEN, add_visual_tokens
from lvctx.training.align_job import AlignJob


@dataclass(frozen=True, kw_only=True)
class AlignStatistics:
    """What one pass over the data holds."""

    lengths: Sequence[int]
    """Tokens of each sample: of its longest sequence, if it is a pair."""
    sizes: Sequence[tuple[int, int]]
    """Width and height in pixels of each sample's images."""
    tokens: int
    """Tokens of all sequences."""
    visual_tokens: int
    """Those of images."""
    counted_tokens: int
    """Those with a loss."""

    @property
    def facts(self) -> dict[str, Any]:
        """For the row of a dry run."""
        counts = {name: getattr(self, name) for name in ("tokens", "visual_tokens", "counted_tokens")}
        return {**counts, "longest_sample": max(self.lengths)}


def align_statistics(job: AlignJob, on_progress: OnProgress) -> AlignStatistics:
    """Encode all samples; only the headers of images are read. Raises InputError for a file that is not an image."""
    tokenizer = load_tokenizer(job.text_source)
    if job.lm is not None:
        add_visual_tokens(tokenizer, job.lm)
    video = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    encoding = job.encoding(TowerFiles.find(job.vision_source).config)
    lengths: list[int] = []
    sizes: list[tuple[int, int]] = []
    tokens = visual = counted = 0
    for number in range(len(job.rows)):
        sample = job.sample(number, tokenizer, encoding)
        for sequence in sample.sequences:
            tokens += len(sequence.ids)
            visual += sequence.ids.count(video)
            counted += sum(label != IGNORED for label in sequence.labels)
        lengths.append(sample.longest)
        sizes += map(image_size, sample.images)
        on_progress(number + 1, len(job.rows), "tokens")
    return AlignStatistics(lengths=lengths, sizes=sizes, tokens=tokens, visual_tokens=visual, counted_tokens=counted)


def draw_statistics(statistics: AlignStatistics, target: Path) -> None:
    """Draw the histograms of image sizes and of tokens per sample to a .png or .svg."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    if statistics.sizes:
        widths, heights = np.array(statistics.sizes).T
        largest = max(widths.max(), heights.max())
        counts = np.histogram2d(widths, heights, bins=40, range=[[0, largest + 1]] * 2)[0]
        shades = left.imshow(
            np.ma.masked_equal(counts.T, 0), origin="lower", extent=(0, largest, 0, largest), norm="log", cmap="viridis"
        )
        bar = figure.colorbar(shades, ax=left, shrink=0.85)
        bar.ax.tick_params(labelsize=7)
    left.set_title(f"{len(statistics.sizes):,} images", fontsize=8, loc="left")
    left.set_xlabel("width, pixels", fontsize=8)
    left.set_ylabel("height, pixels", fontsize=8)
    right.hist(statistics.lengths, bins=50)
    right.set_yscale("log")
    right.set_title(f"{len(statistics.lengths):,} samples", fontsize=8, loc="left")
    right.set_xlabel("tokens of a sample", fontsize=8)
    right.set_ylabel("samples", fontsize=8)
    for ax in (left, right):
        ax.tick_params(labelsize=7, which="both")
        ax.spines[["top", "right"]].set_visible(False)
    with atomic_file(target) as partial, rc_context({"svg.hashsalt": "lvctx"}):
        metadata = {"Date": None} if target.suffix == ".svg" else {"Software": None}
        figure.savefig(partial, format=target.suffix[1:], metadata=metadata)
