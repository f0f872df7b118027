"""Checks before a benchmark's run: its own questions, and folders that have their videos and subtitles."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from lvctx.errors import InputError
from lvctx.eval.benchmarks.answers import Question
from lvctx.eval.benchmarks.benchmark_list import BENCHMARKS, load_benchmark, run_command
from lvctx.eval.benchmarks.question_files import has_value, read_question_rows
from lvctx.eval.benchmarks.subtitles import SUBTITLE_SUFFIXES, find_subtitles
from lvctx.eval.benchmarks.video_files import video_stem


def read_questions(bench: ModuleType, path: Path) -> list[Question]:
    """The questions of a benchmark. Raises InputError that names the other benchmark whose questions they are."""
    row = read_question_rows(path)[0]
    columns = {name for name in row if has_value(row, name)}
    if not _fits(bench, columns):
        fitting = [name for name in BENCHMARKS if _fits(load_benchmark(name), columns)]
        if fitting:
            title = BENCHMARKS[fitting[0]].title
            raise InputError(f"questions of {title}, not of {bench.NAME}", where=path, fix=run_command(fitting[0]))
    questions: list[Question] = bench.samples(path)
    return questions


def _fits(bench: ModuleType, columns: set[str]) -> bool:
    return any(columns.issuperset(alternative) for alternative in bench.COLUMNS)


def check_videos(folder: Path, questions: Sequence[Question]) -> None:
    """Raise InputError where none of the questions' videos is in the folder or below it."""
    wanted = {unicodedata.normalize("NFC", video_stem(q.video)) for q in questions if not q.images}
    for _, folders, files in os.walk(folder):
        folders[:] = [subfolder for subfolder in folders if not subfolder.startswith(".")]
        if any(unicodedata.normalize("NFC", video_stem(file)) in wanted for file in files):
            return
    if wanted:
        first = next(q.video for q in questions if not q.images)
        raise InputError(f"none of the {len(wanted):,} videos is in it, such as {first:.80}", where=folder)


def check_subtitles(folder: Path, videos: Iterable[str]) -> None:
    """Raise InputError where none of the videos has subtitles in the folder."""
    stems = {video_stem(video) for video in videos}
    files = [file for file in folder.iterdir() if file.suffix.lower() in SUBTITLE_SUFFIXES]
    if not files:
        raise InputError(f"no {', '.join(SUBTITLE_SUFFIXES)} file in it", where=folder)
    if not any(file.name.startswith(tuple(stems)) for file in files) or not any(
        find_subtitles(folder, stem) for stem in stems
    ):
        what = f"subtitles of other videos, such as {files[0].name:.80}: none of the {len(stems):,} videos has any"
        raise InputError(what, where=folder, fix="give the folder of this benchmark's subtitles")
