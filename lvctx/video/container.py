"""Video files without decoding: whether they are complete, whether they open, and what their headers contain."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av

from lvctx.artifacts.sniff import ADVICE, Sniffed, mistaken, sniff
from lvctx.errors import InputError, LvctxError
from lvctx.video.squares import MAX_PIXELS
from lvctx.video.truncation import find_truncation

log = logging.getLogger(__name__)


def check_complete(path: Path, *, allow_partial: bool = False) -> bool:
    """Whether a file is whole as far as its container tells. Raises InputError where there is none or it is empty.

    Also for one that has been cut short, unless `allow_partial`.
    """
    size = check_exists(path)
    cut = find_truncation(path)
    if cut and not allow_partial:
        fix = "get it again, or --allow-partial takes what is left" if cut.readable else "get it again"
        raise InputError(f"the video is cut short at {size:,} bytes ({cut.why})", where=path, fix=fix)
    return cut is None


def check_exists(path: Path) -> int:
    """Size of a file in bytes. Raises InputError where there is none, it is empty or may not be read."""
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
    """Turn whatever FFmpeg and PyAV raise over a file into one InputError that names it.

    What a damaged file makes of them is of every type (OSError, ValueError, IndexError, MemoryError and others).
    """
    try:
        yield
    except LvctxError:
        raise
    except Exception as e:
        log.info("%s: the decoder failed", path, exc_info=True)
        reason = getattr(e, "strerror", None) or str(e) or "no reason given"
        raise InputError(f"cannot be decoded ({type(e).__name__}: {reason})", where=path, fix=DAMAGED) from e


DAMAGED = "get it again, or convert it with ffmpeg"
"""What to do about a video that the decoder fails over."""


def open_file(path: Path) -> Any:
    """A PyAV container of this file and no other. Raises what PyAV raises.

    FFmpeg takes what precedes a colon in a name for a protocol and % for a pattern, and a playlist makes it open the
    files and addresses that it lists. So it gets a descriptor in place of a name, and may open nothing else.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        options = {"fd": str(descriptor), "protocol_whitelist": "fd"}
        # Titles and comments are often in another encoding than they should be, and are nothing to us.
        return av.open("fd:", options=options, metadata_errors="replace")
    finally:
        os.close(descriptor)  # FFmpeg has its own copy


def open_video(path: Path) -> tuple[Any, Any]:
    """A container and its video stream, of several the one that the ffmpeg program takes, ready to decode on all cores.

    Raises InputError where there is none.
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
        raise mistaken(path, "a video", fix="give a video; an animation in this format has to be converted first")
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
    """What the ffmpeg program chooses a video stream by (fftools/ffmpeg_mux_init.c, `map_auto_video`).

    The largest frame, and a stream that is marked as default counts as five million pixels more. One without a
    packet is the last choice: FFmpeg decides by what it has read, this function by what the container states.
    """
    default = bool(stream.disposition & av.stream.Disposition.default)
    return int(stream.width) * int(stream.height) + 5_000_000 * default + 100_000_000 * (stream.frames > 0)


def _check_kind(path: Path) -> Sniffed:
    """What a file is that is no video; InputError where more can be said of it than what FFmpeg says."""
    sniffed = sniff(path)
    if sniffed.name not in ("video", "sound", "text", "other"):
        raise mistaken(path, "a video", fix=OTHERS.get(sniffed.name, "give a video file"), sniffed=sniffed)
    return sniffed


OTHERS = {
    "frames": "give the video itself; vqa and niah read this file with the LlavaOnevision model that encoded it",
    "json": "give a video file; lvctx encode-video - reads a list of paths from stdin",
}
"""What to do about files of other kinds that are taken for videos."""


def demux(container: Any, stream: Any) -> Iterator[Any]:
    """The packets of a stream that hold something, up to the end or to where the container is beyond reading."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.FFmpegError):
            return
        except IndexError:
            # PyAV flushes at the end every stream there is, and fails over one that began on the way.
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
