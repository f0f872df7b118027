"""Evaluation beside needle tests and benchmarks: `perplexity`, and `report`, the page of all results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lvctx.cli.options import OutputOptions, command
from lvctx.cli.output import emit, progress
from lvctx.cli.tables import Threshold
from lvctx.config import Flag
from lvctx.errors import UsageError
from lvctx.eval.perplexity_config import PerplexityConfig


@command(
    "perplexity",
    "lvctx perplexity lm --data packed --seq-len 256 --rows 1 --points 4",
    "lvctx perplexity lm lm-32k --data packed --rows 1 -o perplexity.png",
)
def perplexity(config: PerplexityConfig, output: OutputOptions) -> None:
    """Perplexity of language models by position in long rows of text.

    One line per model: `by_position` has the perplexity of the tokens between a position and the one before it in
    `positions`, `up_to_position` that of all tokens up to it.
    """
    if config.out is not None and config.out.suffix not in (".png", ".svg"):
        raise UsageError(f"-o {config.out}: the name has to end in .png or .svg")
    rows = []
    with progress("perplexity", "loading the model") as on_progress:
        from lvctx.eval.perplexity import draw_perplexity, measure_perplexity

        for name in config.models:
            rows.append(measure_perplexity(config, name, on_progress))
            emit(rows[-1])
    if config.out is not None:
        draw_perplexity(rows, config.out)


@dataclass(frozen=True, kw_only=True)
class HtmlReportConfig:
    """The runs to show, and the output."""

    runs: Annotated[tuple[Path, ...], Flag(argument=True, metavar="RUN...")]
    """Results directories of niah, videomme and bench, answers of vqa (.jsonl), responses in Video-MME's format
    (.json), trained models with metrics.jsonl, or a directory of such directories."""
    out: Annotated[Path, Flag(names=("-o", "--out"))]
    """The page: .html."""
    thumbnails: Annotated[int, Flag(min=0, max=16)] = 4
    """Images of each video, where its file can still be read; 0 for none. A report has at most 1,200 images."""
    threshold: Threshold = 0.9
    """Minimum accuracy of a length for the effective length."""


@command(
    "report",
    "lvctx report niah -o report.html",
    "lvctx report niah videomme nextqa vlm --thumbnails 2 -o report.html --json",
)
def html_report(config: HtmlReportConfig, output: OutputOptions) -> None:
    """Show evaluation results and training curves on one self-contained HTML page.

    The page loads nothing: it can be opened, printed and sent as a single file. It has a table of all runs; heatmaps
    whose cells show each needle and reply; scores with 95% intervals, and every question with its reply and the verdict
    of each scorer; training curves, costs and provenance. No model is needed.
    """
    from lvctx.artifacts.schemas import REPORT
    from lvctx.eval.report.collect import collect_report
    from lvctx.eval.report.page import write_page

    if config.out.suffix not in (".html", ".htm"):
        raise UsageError(f"-o {config.out}: the name has to end in .html")
    with progress("report", "reading the runs") as on_progress:
        data = collect_report(
            config.runs, thumbnails=config.thumbnails, threshold=config.threshold, on_progress=on_progress
        )
        write_page(data, config.out)
    sizes = {"runs": len(data.runs), "images": len(data.images), "bytes": config.out.stat().st_size}
    emit({"schema": REPORT, "path": str(config.out), **sizes})
