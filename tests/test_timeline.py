"""Numbers, times, streams and orientation of frames are those of the ffmpeg program, in unusual containers too.

Every frame carries its number as ten bars, most significant first: black is 0, white is 1.
"""

import itertools
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest

from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
WIDTH, HEIGHT = 80, 32
H264 = ["-c:v", "libx264", "-crf", "12", "-g", "12", "-bf", "3", "-pix_fmt", "yuv420p"]
HEVC = ["-c:v", "libx265", "-x265-params", "log-level=0:keyint=12:bframes=3", "-pix_fmt", "yuv420p"]
MPEG2 = ["-c:v", "mpeg2video", "-q:v", "2", "-bf", "2"]
MPEG4 = ["-c:v", "mpeg4", "-q:v", "2", "-bf", "2", "-g", "13"]
Make = Callable[..., Path]


def ffmpeg(*arguments: object, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [FFMPEG, "-y", "-v", "error", *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, check=True)


def pictures(first: int, count: int) -> bytes:
    bits = np.arange(first, first + count)[:, None] >> np.arange(9, -1, -1) & 1
    row = np.repeat(20 + 215 * bits, WIDTH // 10, axis=1).astype(np.uint8)
    return np.repeat(np.repeat(row[:, None, :, None], HEIGHT, axis=1), 3, axis=3).tobytes()


def number(picture_HW3: np.ndarray) -> int:
    width = picture_HW3.shape[1] // 10
    light = picture_HW3[len(picture_HW3) // 2, width // 2 :: width].mean(-1) > 128
    return int((light << np.arange(9, -1, -1)).sum())


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A video of `count` numbered frames: `make(name, *how, first=0, count=60, rate=25)`."""
    folder = tmp_path_factory.mktemp("numbered")

    def make(name: str, *how: object, first: int = 0, count: int = 60, rate: int = 25) -> Path:
        out = folder / name
        if not out.exists():
            raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", rate, "-i", "-"]
            ffmpeg(*raw, *how, out, given=pictures(first, count))
        return out

    return make


def copied(path: Path, name: str, *how: object) -> Path:
    ffmpeg("-i", path, "-c", "copy", *how, path.with_name(name))
    return path.with_name(name)


def shown_by_ffmpeg(path: Path, filters: str = "null") -> list[int]:
    raw = ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    out = ffmpeg("-i", path, "-vf", filters, *raw).stdout
    return [number(picture) for picture in np.frombuffer(out, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)]


def shown_at_1_fps(path: Path) -> list[int]:
    # From the first frame on, the frame on display: the last whose time is not later.
    return shown_by_ffmpeg(path, "setpts=PTS-STARTPTS,fps=1:round=up")


def numbers(path: Path, *, wanted: Sequence[int] | None = None, **how: Any) -> list[int]:
    return [number(frame.image) for frame in read_video(path, VideoSampling(**how), frame_indices=wanted)]


UNORDERED: dict[str, tuple[list[str], str]] = {
    "h264.avi": (H264, ""),
    "mpeg4.avi": (MPEG4, ""),
    "mpeg2.avi": (MPEG2, ""),
    "h264_avi.mp4": (H264, "h264.avi"),
    "h264_avi.mov": (H264, "h264.avi"),
    "mpeg4_avi.mp4": (MPEG4, "mpeg4.avi"),
    "bare.h264": (H264, ""),
    "bare.hevc": (HEVC, ""),
    "hevc_bare.mp4": (HEVC, "bare.hevc"),
}


@pytest.mark.parametrize("name", UNORDERED)
def test_frames_are_numbered_as_they_leave_the_decoder(name: str, make: Make) -> None:
    how, source = UNORDERED[name]
    path = copied(make(source, *how), name) if source else make(name, *how)
    everything = list(read_video(path, VideoSampling(fps="native")))
    shown = shown_by_ffmpeg(path)
    assert [number(f.image) for f in everything] == shown
    assert [f.index for f in everything] == list(range(len(shown)))
    assert [f.pts - everything[0].pts for f in everything] == pytest.approx([i / 25 for i in range(60)][: len(shown)])
    assert numbers(path, frames=8) == [shown[int(i)] for i in np.linspace(0, len(shown) - 1, 8)]
    assert numbers(path, fps=1) == shown[::25]
    assert name == "hevc_bare.mp4" or shown == list(range(60)), "there an edit list hides two"


def test_frames_without_reordering_need_no_full_decode(make: Make) -> None:
    from lvctx.video.packet_index import read_packets

    for path in (make("plain.avi", *H264[:-4], "-bf", 0), make("low.mp4", *H264, "-tune", "zerolatency")):
        assert read_packets(path) is not None
        assert numbers(path, frames=8) == [0, 8, 16, 25, 33, 42, 50, 59]


KINDS: dict[str, list[object]] = {"ts": H264, "hevc.ts": HEVC, "mpg": MPEG2, "m2ts": [*H264, "-f", "mpegts"]}
KINDS["m2ts"] += ["-mpegts_m2ts_mode", 1]


@pytest.mark.parametrize("kind", KINDS)
def test_joined_recordings_go_on(kind: str, make: Make) -> None:
    how = KINDS[kind]
    a, b = make(f"a.{kind}", *how), make(f"b.{kind}", *how, first=500)
    late = make(f"late.{kind}", *how, "-output_ts_offset", 3600, first=500)
    for name, parts in {"again": [a, b], "ahead": [a, late], "back": [late, a], "three": [a, late, a]}.items():
        path = a.with_name(f"{name}.{kind}")
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        everything = list(read_video(path, VideoSampling(fps="native")))
        assert [number(f.image) for f in everything] == shown_by_ffmpeg(path)
        steps = np.diff([f.pts for f in everything])
        assert (steps >= 0).all()
        assert steps.max() < 0.2
        assert numbers(path, fps=1) == shown_at_1_fps(path)
        assert len(numbers(path, fps=5)) == pytest.approx(len(everything) / 5, abs=1)
        wanted = [0, 58, 61, 63, 119]
        assert numbers(path, wanted=wanted) == [number(everything[i].image) for i in wanted]


def test_a_recording_that_begins_within_a_group_of_pictures(make: Make) -> None:
    for kind, how in {"ts": H264, "hevc.ts": HEVC}.items():
        a, b = make(f"a.{kind}", *how), make(f"b.{kind}", *how, first=500).read_bytes()
        path = a.with_name(f"within.{kind}")
        path.write_bytes(a.read_bytes() + b[188 * (len(b) // 188 // 3) :])
        assert numbers(path, fps="native", allow_partial=True) == shown_by_ffmpeg(path)
        assert max(numbers(path, fps=2, allow_partial=True)) > 540, "the second recording is sampled"


@pytest.mark.parametrize("before", [20, 100])
def test_a_33_bit_clock_wraps(before: int, make: Make) -> None:
    wrap = 2**33 / 90_000
    path = make(f"wraps{before}.ts", *H264, "-output_ts_offset", wrap - 1.4 - before, count=300, rate=2)
    assert numbers(path, fps=0.1) == [20 * i for i in range(15)] == shown_by_ffmpeg(path, "fps=0.1:round=up")


def test_a_still_stays_on_display_where_the_container_is_trusted(make: Make) -> None:
    path = make("still.mkv", "-vf", "setpts='(N+25*30*gte(N,5))/25/TB'", "-fps_mode", "vfr", *H264, count=10)
    assert numbers(path, fps=1) == shown_at_1_fps(path)
    assert len(numbers(path, fps=1)) == 31


@pytest.mark.parametrize(
    ("turn", "flips"), itertools.product((0, 90, 180, 270, 45), ((), ("-display_hflip",), ("-display_vflip",)))
)
def test_a_frame_is_turned_and_flipped_as_in_ffmpeg(turn: int, flips: Sequence[str], make: Make) -> None:
    plain = make("upright.mp4", "-vf", "geq=lum='X*2+Y':cb=X:cr=Y", *H264, count=3)
    path = plain.with_name(f"turned{turn}{''.join(flips)}.mp4")
    ffmpeg("-display_rotation", turn, *flips, "-i", plain, "-c", "copy", path)
    frames = list(read_video(path, VideoSampling(fps="native")))
    theirs = np.frombuffer(ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-").stdout, np.uint8)
    ours = np.stack([frame.image for frame in frames])
    assert (theirs.reshape(ours.shape) == ours).all()
    assert ours.shape[1:3] == ((WIDTH, HEIGHT) if turn in (90, 270) else (HEIGHT, WIDTH))


STREAMS: dict[str, list[str]] = {
    "no_default": ["-disposition:v", "0"],
    "first": ["-disposition:v:0", "default", "-disposition:v:1", "0"],
    "second": ["-disposition:v:0", "0", "-disposition:v:1", "default"],
    "both": ["-disposition:v", "default"],
}


@pytest.mark.parametrize("name", [f"{name}.{kind}" for name in STREAMS for kind in ("mp4", "mkv", "ts")])
@pytest.mark.parametrize("sizes", [("64x48", "160x96", "100x50"), ("160x96", "64x48", "160x96")])
def test_of_several_streams_the_one_that_ffmpeg_takes(name: str, sizes: Sequence[str], tmp_path: Path) -> None:
    sources = [x for size in sizes for x in ("-f", "lavfi", "-i", f"testsrc2=s={size}:r=5:d=1")]
    chosen = [x for i in range(len(sizes)) for x in ("-map", i)]
    path = tmp_path / name
    ffmpeg(*sources, *chosen, "-c:v", "mpeg4", *STREAMS[path.stem], path)
    log = subprocess.run([FFMPEG, "-i", path, "-f", "null", "-"], capture_output=True, check=True).stderr.decode()
    width, height = map(int, re.findall(r", (\d+)x(\d+)", log[log.index("Output #0") :])[0])
    assert next(read_video(path, VideoSampling(fps="native"))).image.shape == (height, width, 3)
