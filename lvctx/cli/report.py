"""`lvctx report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lvctx.cli.options import OutputOptions, command
from lvctx.cli.output import emit, progress
from lvctx.cli.tables import Threshold
from lvctx.config import Flag
from lvctx.errors import UsageError


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
