"""Collect runs of any kind into the plain data that the page shows. No model is needed."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lvctx import __version__
from lvctx.config import OnProgress
from lvctx.eval.report.needle_section import compare_needle_runs, needle_section
from lvctx.eval.report.question_section import answers_section, benchmark_section, compare_runs, responses_section
from lvctx.eval.report.run_files import RunFile, find_runs, printable
from lvctx.eval.report.thumbnails import Thumbnails
from lvctx.eval.report.training_section import training_section


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The content of a page; JSON values only."""

    runs: list[dict[str, Any]]
    """A section for each run, in the given order."""
    comparisons: list[dict[str, Any]]
    """Paired differences of runs of a benchmark, or of needle tests with the same needles."""
    images: list[dict[str, Any]]
    """Images that the runs refer to by number."""
    threshold: float
    """Minimum accuracy of a length for the effective length."""
    videos_without_images: int
    """Number of videos that could not be read, or for which there was no room."""
    version: str = __version__
    """Version of lvctx that wrote the report."""


def collect_report(paths: Sequence[Path], *, thumbnails: int, threshold: float, on_progress: OnProgress) -> ReportData:
    """Read the runs at `paths`, with `thumbnails` images of each video. Raises InputError for what cannot be read."""
    images = Thumbnails(thumbnails, on_progress)
    runs = _with_distinct_names([run for path in paths for run in find_runs(path)])
    sections = [_section(run, images, threshold) for run in runs]
    comparisons = compare_runs(sections) + compare_needle_runs([run for run in runs if run.kind == "needles"])
    for section in sections:
        section.pop("replies", None)
    return ReportData(
        runs=sections,
        comparisons=comparisons,
        images=images.images,
        threshold=threshold,
        videos_without_images=sum(not found for found in images.videos.values()) if thumbnails else 0,
    )


def _section(run: RunFile, images: Thumbnails, threshold: float) -> dict[str, Any]:
    if run.kind == "needles":
        return needle_section(run, images, threshold=threshold)
    if run.kind == "benchmark":
        return benchmark_section(run, images)
    if run.kind == "responses":
        return responses_section(run)
    return answers_section(run, images) if run.kind == "answers" else training_section(run)


def _with_distinct_names(runs: Iterable[RunFile]) -> list[RunFile]:
    """The runs; those that share a name are called by their path."""
    runs = list(runs)
    counts = Counter(run.name for run in runs)
    return [run if counts[run.name] == 1 else replace(run, name=printable(run.path)) for run in runs]
