"""Finds the videos of a benchmark by the names in its questions."""

import os
import unicodedata
from pathlib import Path

from lvctx.errors import InputError

VIDEO_SUFFIXES = frozenset((
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".h265", ".hevc", ".ivf", ".m1v",
    ".m2t", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mpv", ".mts",
    ".mxf", ".nut", ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".wtv", ".y4m",
))  # fmt: skip
"""Common suffixes of FFmpeg's demuxers, in lower case."""


def video_stem(name: str) -> str:
    """A video's name without folder and video suffix; other dots are kept, as in `talk.part2`."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    return stem if suffix.lower() in VIDEO_SUFFIXES else f"{stem}{suffix}"


def find_video(folder: Path, name: str) -> Path:
    """The file called `name` in `folder` or anywhere below it, hidden folders left out.

    The next best match has the same suffix in other case, then the same stem with any video suffix. Among equal
    matches, files in the folder of `name` come first, then those directly in `folder`. Raises InputError if there is no
    match, or if two match equally.
    """
    name = unicodedata.normalize("NFC", name)  # macOS decomposes file names
    file_name, parents = os.path.basename(name), [part for part in Path(name).parts[:-1] if part not in ("/", "..")]
    suffix = os.path.splitext(file_name)[1].lower()
    ranked: dict[tuple[bool, int, bool], list[Path]] = {}
    for directory, folders, files in os.walk(folder):
        folders[:] = [subfolder for subfolder in folders if not subfolder.startswith(".")]
        subpath = Path(directory).relative_to(folder).parts
        elsewhere = list(subpath[len(subpath) - len(parents) :]) != parents
        for file in files:
            candidate = unicodedata.normalize("NFC", file)
            candidate_suffix = os.path.splitext(candidate)[1].lower()
            if candidate == file_name:
                fit = 0
            elif candidate_suffix in VIDEO_SUFFIXES and video_stem(candidate) == video_stem(file_name):
                fit = 1 if candidate_suffix == suffix else 2
            else:
                continue
            ranked.setdefault((elsewhere, fit, bool(subpath)), []).append(Path(directory, file))
    if not ranked or not file_name:
        raise InputError(f"no video {name}", where=folder, fix="add it; its questions count as failed")
    best = sorted(ranked[min(ranked)])
    if len(best) > 1:
        both = " and ".join(str(file.relative_to(folder)) for file in best[:2])
        raise InputError(f"two videos for {name}: {both}", where=folder, fix="keep one; its questions count as failed")
    return best[0]
