"""Video files without decoding: whether they are complete, whether they open, and what their headers contain."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av

from lvctx.artifacts.sniff import ADVICE, Sniffed, mistaken, sniff
from lvctx.errors import InputError, LvctxError, memory_errors
from lvctx.video.squares import MAX_PIXELS
from lvctx.video.truncation import find_truncation

log = logging.getLogger(__name__)


def check_complete(path: Path, *, allow_partial: bool = False) -> bool:
    """Whether a file is complete, judged by its container. Raises InputError if it is missing or empty.

    It also raises InputError for a truncated file, unless `allow_partial`.
    """
    size = check_exists(path)
    cut = find_truncation(path)
    if cut and not allow_partial:
        fix = "get it again, or use what is left with --allow-partial" if cut.readable else "get it again"
        raise InputError(f"the video is cut short at {size:,} bytes ({cut.why})", where=path, fix=fix)
    return cut is None


def check_exists(path: Path) -> int:
    """Size of a file in bytes. Raises InputError if it is missing, empty or not readable."""
    try:
        if path.exists() and not path.is_file():
            what = f"{sniff(path).phrase}, " if path.is_dir() else ""
            raise InputError(f"{what}not a file", where=path, fix="give a video file")
        with open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)
    except FileNotFoundError:
        fix = "download it first" if str(path).startswith(("http:/", "https:/")) else ""
        raise InputError("no such video", where=path, fix=fix) from None
    except LvctxError:
        raise
    except (OSError, ValueError) as e:  # no permission, a name that is too long, or with a zero byte
        raise InputError(f"cannot be read ({getattr(e, 'strerror', None) or e})", where=path) from e
    if size == 0:
        raise InputError("the file is empty", where=path, fix=ADVICE["empty"])
    return size


@contextmanager
def decoder_errors(path: Path) -> Iterator[None]:
    """Turn any exception of FFmpeg and PyAV about a file into an InputError that names it.

    A damaged file can raise exceptions of any type (OSError, ValueError, IndexError and others).
    """
    try:
        with memory_errors(where=path, fix="convert it to a smaller size with ffmpeg"):
            yield
    except LvctxError:
        raise
    except Exception as e:
        log.info("%s: the decoder failed", path, exc_info=True)
        reason = getattr(e, "strerror", None) or str(e) or "no reason given"
        raise InputError(f"cannot be decoded ({type(e).__name__}: {reason})", where=path, fix=DAMAGED) from e


DAMAGED = "get it again, or convert it with ffmpeg"
"""What to do about a video that the decoder fails on."""


def open_file(path: Path) -> Any:
    """Open exactly this file as a PyAV container. Raises what PyAV raises.

    FFmpeg takes text before a colon in a name for a protocol and % for a pattern, and a playlist makes it open the
    listed files and addresses. So it gets a file descriptor instead of a name, and may not open anything else.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        options = {"fd": str(descriptor), "protocol_whitelist": "fd"}
        # Titles and comments often have another encoding than they should have, and are not used here.
        return av.open("fd:", options=options, metadata_errors="replace")
    finally:
        os.close(descriptor)  # FFmpeg has duplicated it


def open_video(path: Path) -> tuple[Any, Any]:
    """A container and its video stream, the one that the ffmpeg program selects, ready to decode on all cores.

    Raises InputError if there is none.
    """
    try:
        container = open_file(path)
    except Exception as e:  # of every type, see decoder_errors
        sniffed = _check_kind(path)
        what = "text, not a video" if sniffed.name == "text" else "not a video"
        reason = getattr(e, "strerror", None) or str(e)
        raise InputError(f"{what} that FFmpeg can open ({reason})", where=path, fix="give a video file") from e
    if container.format.name == "image2" or container.format.name.endswith("_pipe"):
        container.close()
        raise mistaken(path, "a video", fix="give a video; convert an animation in this format first")
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover and s.codec_context is not None]
    if not streams:
        container.close()
        _check_kind(path)
        raise InputError("no video stream", where=path, fix="give a file with a video stream")
    stream = max(streams, key=_preference)  # the first of equals
    if stream.width * stream.height > MAX_PIXELS:
        container.close()
        raise InputError(f"frames of more than {MAX_PIXELS:,} pixels", where=path, fix="scale the video down")
    stream.thread_type = "AUTO"
    return container, stream


def _preference(stream: Any) -> int:
    """The key by which the ffmpeg program selects a video stream (fftools/ffmpeg_mux_init.c, `map_auto_video`).

    It selects the largest frame; a stream marked as default counts as five million pixels more, and one without a
    packet is the last choice. FFmpeg uses the packets that it has read, this function the container's header.
    """
    default = bool(stream.disposition & av.stream.Disposition.default)
    return int(stream.width) * int(stream.height) + 5_000_000 * default + 100_000_000 * (stream.frames > 0)


def _check_kind(path: Path) -> Sniffed:
    """The kind of a file that is not a video; InputError where that is more informative than FFmpeg's error."""
    sniffed = sniff(path)
    if sniffed.name not in ("video", "sound", "text", "other"):
        raise mistaken(path, "a video", fix=OTHERS.get(sniffed.name, "give a video file"), sniffed=sniffed)
    return sniffed


OTHERS = {
    "frames": "give the video itself; vqa and niah accept this file with the LlavaOnevision model that encoded it",
    "json": "give a video file; lvctx encode-video - reads a list of paths from stdin",
}
"""Advice for files of other kinds that are given as videos."""


def demux(container: Any, stream: Any) -> Iterator[Any]:
    """The non-empty packets of a stream, up to the end or to where the container becomes unreadable."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.FFmpegError):
            return
        except IndexError:
            # At the end PyAV flushes every stream, and fails on one that was not present at the beginning.
            return
        if packet.size:
            yield packet


def probe(path: Path) -> dict[str, Any]:
    """width, height and, where the container states them, duration in seconds and average fps; nothing is decoded."""
    check_exists(path)
    container, stream = open_video(path)
    with container, decoder_errors(path):
        if stream.duration is not None:
            duration = float(stream.duration * stream.time_base)
        else:
            duration = (container.duration or 0) / av.time_base
        rate = float(stream.average_rate or 0)
        return {"width": stream.width, "height": stream.height, "duration": duration, "source_fps": rate}
