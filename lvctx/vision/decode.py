"""Frames of a video by time: the same frames, pixels and timestamps as FFmpeg, one at a time.

A frame is identified by its number in the order of presentation and by its presentation timestamp (pts). Three ways to
sample: every frame; a rate, which takes at t_k = first pts + k / rate the frame on display, that is the last whose
pts <= t_k; or a number of frames spread as LongVA's linspace(0, n - 1, N) over the n frames of the video.

PyAV (FFmpeg's own libraries) is the default. The video is read once, front to back; only wanted frames become RGB,
through the filters that the ffmpeg program itself would insert, so a rotated or 10-bit video looks as it does there.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Literal

import av
import numpy as np
from av.video.frame import VideoFrame

from lvctx.errors import InputError, UsageError

Rate = float | Literal["native"]
"""Frames a second, or every frame."""
Decoder = Literal["auto", "decord", "pyav"]

CORRUPT_LIMIT = 0.01
"""Share of frames that may be damaged before the video is refused."""
ONE_PACKET_A_FRAME = ("h264", "hevc", "vp9", "av1")
"""Codecs whose packets can be counted instead of their frames; VP8 or old AVIs hide frames or pack several."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One sampled frame."""

    index: int
    """Number in the source, in the order of presentation, from 0."""
    pts: float
    """Presentation timestamp in seconds, as FFmpeg says it: the first frame's need not be 0."""
    image: np.ndarray
    """uint8 (H, W, 3), RGB, upright."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A frame of the source that is not converted yet: what sampling decides on."""

    index: int
    """As in `Frame`."""
    pts: Fraction
    """Exact seconds."""
    end: Fraction
    """When the next frame is due; equal to `pts` where the container does not say."""
    data: Any = field(default=None, repr=False)
    """The decoder's own frame."""


class FrameReader(Iterator[Frame]):
    """The frames asked for; once exhausted, `facts` says what was seen on the way."""

    def __init__(self, frames: Iterator[Frame], facts: dict[str, Any]) -> None:
        self._frames = frames
        self.facts = facts
        """width, height, source_frames, duration (seconds), corrupt (damaged frames), decoder (with versions)."""

    def __next__(self) -> Frame:
        return next(self._frames)


def read_frames(
    path: Path, *, fps: Rate | None = None, frames: int | None = None, decoder: Decoder = "auto"
) -> FrameReader:
    """Read the frames of `path` at a rate `fps`, or `frames` of them evenly spread; exactly one of the two is given.

    Memory does not grow with the length of the video. Raises InputError for a file that is missing, empty, cut short,
    not a video, without a picture, or of which more than 1% is damaged; MissingError where decord is not installed.
    """
    if (fps is None) == (frames is None):
        raise UsageError("give either a rate or a number of frames")
    check_whole(path)
    facts: dict[str, Any] = {}
    if decoder == "decord":
        from lvctx.vision.decord import read_with_decord

        open_video(path)[0].close()  # says what is wrong with the file better than decord does
        return FrameReader(read_with_decord(path, fps, frames, facts), facts)
    return FrameReader(_read_with_pyav(path, fps, frames, facts), facts)


def sample(shots: Iterable[Shot], *, fps: Rate | None, wanted: Iterable[int] = ()) -> Iterator[Shot]:
    """The shots to take, in order: at the rate `fps`, or where `fps` is None those numbered in ascending `wanted`.

    A shot that stays on display over several sampling times is taken several times.
    """
    if fps is None:
        todo = iter(wanted)
        want = next(todo, None)
        for shot in shots:
            while want == shot.index:
                yield shot
                want = next(todo, None)
        return
    if fps == "native":
        yield from shots
        return
    step = 1 / Fraction(fps).limit_denominator(100_000)
    shown: Shot | None = None
    due = Fraction(0)
    for shot in shots:
        if shown is None:
            due = shot.pts
        while shown is not None and due < shot.pts:
            yield shown
            due += step
        shown = shot
    while shown is not None and (due < shown.end or due == shown.pts):
        yield shown
        due += step


def spread(count: int, frames: int) -> list[int]:
    """Numbers of `frames` frames evenly spread over `count`, both ends included: LongVA's linspace, rounded down."""
    return np.linspace(0, count - 1, frames, dtype=int).tolist()


def check_whole(path: Path) -> None:
    """Raise InputError for a file that is missing or empty, or an MP4 or Matroska file shorter than it says it is.

    A decoder plays what is left of a cut file without a word.
    """
    if not path.exists():
        raise InputError("no such video", where=path)
    if not path.is_file():
        raise InputError("not a file", where=path, fix="give a video file")
    size = path.stat().st_size
    if size == 0:
        raise InputError("the file is empty", where=path, fix="download or copy it again")
    with open(path, "rb") as f:
        head = f.read(256)
        if head[4:8] == b"ftyp":
            end = _end_of_mp4(f, size)
        elif head.startswith(b"\x1aE\xdf\xa3"):
            end = _end_of_matroska(head)
        else:
            return
    if end > size:
        raise InputError(f"the video is cut short at {size:,} bytes", where=path, fix="download it again")


def _end_of_mp4(f: BinaryIO, size: int) -> int:
    """Where the first box ends that ends beyond `size`, or else `size`."""
    at = 0
    while at < size:
        f.seek(at)
        head = f.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:  # a 64-bit length follows the box's name
            length = int.from_bytes(head[8:16], "big")
        elif length == 0 and len(head) >= 8:  # the last box, up to the end of the file
            return size
        at += max(length, 8)
    return at


def _end_of_matroska(head: bytes) -> int:
    """Where the segment ends that follows the header; 0 where it does not say, as in a recorded live stream."""

    def number(at: int) -> tuple[int, int]:
        width = 9 - head[at].bit_length()  # as many bytes as the first has leading zeros, and one
        value = int.from_bytes(head[at : at + width], "big") & ((1 << 7 * width) - 1)
        return (0 if value == (1 << 7 * width) - 1 else value), at + width

    try:
        length, at = number(4)
        if head[at + length : at + length + 4] != b"\x18S\x80g":
            return 0
        length, at = number(at + length + 4)
    except IndexError:
        return 0
    return at + length if length else 0


def open_video(path: Path) -> tuple[Any, Any]:
    """A container and its video stream, ready to decode on all cores. Raises InputError where there is none."""
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise InputError(f"not a video that FFmpeg can open ({reason})", where=path) from e
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover and s.codec_context is not None]
    if not streams:
        container.close()
        raise InputError("no video stream", where=path, fix="give a file with a picture")
    streams[0].thread_type = "AUTO"
    return container, streams[0]


def probe(path: Path) -> dict[str, Any]:
    """width, height and, as far as the container says, duration in seconds and average fps; nothing is decoded."""
    check_whole(path)
    container, stream = open_video(path)
    with container:
        if stream.duration is not None:
            duration = float(stream.duration * stream.time_base)
        else:
            duration = (container.duration or 0) / av.time_base
        rate = float(stream.average_rate or 0)
        return {"width": stream.width, "height": stream.height, "duration": duration, "source_fps": rate}


def count_at_rate(path: Path, fps: float) -> tuple[int, int, float, int]:
    """Width and height once upright, duration in seconds, and how many frames `read_frames` gives at a rate `fps`.

    Only the first frame is decoded where the container says its duration; else all are. Raises as `read_frames`.
    """
    reader = read_frames(path, fps=fps, decoder="pyav")
    first = next(reader, None)
    if first is None:
        raise InputError("not one frame could be decoded", where=path)
    height, width = first.image.shape[:2]
    duration = float(probe(path)["duration"])
    if duration <= 0:
        frames = 1 + sum(1 for _ in reader)
        return width, height, float(reader.facts["duration"]), frames
    return width, height, duration, max(1, math.ceil(round(duration * fps, 4)))


def _read_with_pyav(path: Path, fps: Rate | None, frames: int | None, facts: dict[str, Any]) -> Iterator[Frame]:
    count = _count_frames(path) if frames is not None else 0
    picture = _Picture()
    facts["corrupt"] = 0
    wanted = spread(count, frames) if frames is not None else ()
    for shot in sample(_shots(path, facts), fps=fps, wanted=wanted):
        image = picture.rgb(shot.data)
        facts["height"], facts["width"] = image.shape[:2]
        yield Frame(index=shot.index, pts=float(shot.pts), image=image)
    seen, corrupt = facts["source_frames"], facts["corrupt"]
    if seen == 0:
        raise InputError("not one frame could be decoded", where=path)
    if corrupt > CORRUPT_LIMIT * (seen + corrupt):
        raise InputError(f"{corrupt} of about {seen} frames are damaged", where=path, fix="get the video again")
    if frames is not None and seen != count:
        raise InputError(f"{count} frames announced, {seen} decoded", where=path, fix="sample with --fps instead")
    versions = (f"{name} {'.'.join(map(str, av.library_versions[name]))}" for name in ("libavcodec", "libswscale"))
    facts["decoder"] = f"PyAV {av.__version__} ({', '.join(versions)})"


def _shots(path: Path, facts: dict[str, Any]) -> Iterator[Shot]:
    """Every frame in the order of presentation; damaged ones are counted in `facts["corrupt"]`."""
    container, stream = open_video(path)
    index = 0
    first = last = Fraction(0)
    with container:
        for frame in _decode(container, stream, facts):
            stamp = frame.pts if frame.pts is not None else frame.dts
            if stamp is None or frame.time_base is None:
                raise InputError("frames without timestamps", where=path, fix="put it into an MP4 or MKV first")
            pts = Fraction(stamp * frame.time_base)
            first = pts if index == 0 else first
            last = Fraction(pts + (frame.duration or 0) * frame.time_base)
            facts["corrupt"] += bool(frame.is_corrupt)
            yield Shot(index=index, pts=pts, end=last, data=frame)
            index += 1
    facts["source_frames"], facts["duration"] = index, float(last - first)


def _decode(container: Any, stream: Any, facts: dict[str, Any]) -> Iterator[VideoFrame]:
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.EOFError):
            return
        try:
            decoded = packet.decode()
        except av.EOFError:
            return
        except av.FFmpegError:
            facts["corrupt"] += 1
            continue
        yield from decoded


def _count_frames(path: Path) -> int:
    container, stream = open_video(path)
    with container:
        if stream.codec_context.codec.canonical_name in ONE_PACKET_A_FRAME:
            return sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
        return sum(1 for _ in _decode(container, stream, {"corrupt": 0}))


_TURNS = {90: (("transpose", "cclock"),), -90: (("transpose", "clock"),)}
_TURNS |= dict.fromkeys((180, -180), (("hflip",), ("vflip",)))  # type: ignore[arg-type]
"""Rotation in degrees, counter-clockwise, that a frame asks for -> FFmpeg's filters."""


class _Picture:
    """Converts frames to RGB through FFmpeg's filters, kept as long as the frames stay of one kind."""

    def __init__(self) -> None:
        self._kind: tuple[Any, ...] = ()
        self._graph: Any = None

    def rgb(self, frame: VideoFrame) -> np.ndarray:
        """uint8 (H, W, 3), turned upright."""
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, frame.rotation)
        if kind != self._kind:
            self._kind, self._graph = kind, self._build(frame)
        self._graph.push(frame)
        return self._graph.pull().to_ndarray()

    @staticmethod
    def _build(frame: VideoFrame) -> Any:
        graph = av.filter.Graph()
        nodes = [
            graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
        ]
        nodes += [graph.add(*turn) for turn in _TURNS.get(frame.rotation, ())]
        nodes += [graph.add("format", "rgb24"), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        return graph
