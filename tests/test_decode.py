"""Frames, pixels and timestamps are FFmpeg's; sampling is by timestamp; broken files are refused in one line."""

import itertools
import random
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refusals import refused

from lvctx.errors import InputError, UsageError
from lvctx.video.container import probe
from lvctx.video.frame_count import count_frames
from lvctx.video.frame_selection import DecodedFrame, spread, take_sampled
from lvctx.video.packet_index import read_packets
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
H264 = ["-c:v", "libx264", "-bf", "3", "-g", "20", "-pix_fmt", "yuv420p"]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make a video with ffmpeg: `make(name, *arguments)`; two seconds of test picture unless an input is given."""
    folder = tmp_path_factory.mktemp("videos")

    def make(name: str, *arguments: object) -> Path:
        source = () if "-i" in arguments else ("-f", "lavfi", "-i", "testsrc2=s=98x66:r=25:d=2")
        out = folder / name
        if not out.exists():
            subprocess.run([FFMPEG, "-v", "error", *source, *map(str, arguments), out], check=True)
        return out

    return make


def ffmpeg(path: Path, *arguments: str) -> bytes:
    start = [FFMPEG, "-v", "error", "-copyts", "-i", str(path), "-map", "0:v:0", "-fps_mode", "passthrough"]
    return subprocess.run([*start, *arguments, "-"], capture_output=True, check=True).stdout


def times_of_ffmpeg(path: Path) -> list[Fraction]:
    lines = ffmpeg(path, "-enc_time_base", "demux", "-f", "framehash").decode().splitlines()
    base = next(Fraction(line.split()[-1]) for line in lines if line.startswith("#tb"))
    return [int(line.split(",")[2]) * base for line in lines if not line.startswith("#")]


VARIABLE = ["-vf", "setpts='(N+0.1*N*N)/25/TB'", "-fps_mode", "vfr", "-enc_time_base", "1/1000"]
VIDEOS: dict[str, list[object]] = {
    "constant.mp4": H264,
    "variable.mp4": [*VARIABLE, *H264],
    "variable.mkv": [*VARIABLE, *H264],
    "starts_late.mkv": [*H264, "-output_ts_offset", "3.3"],
    "ntsc.mp4": ["-vf", "fps=30000/1001", *H264],
    "old.avi": ["-c:v", "mpeg4", "-bf", "2"],
    "vp9.webm": ["-c:v", "libvpx-vp9", "-deadline", "realtime"],
    "vp8.webm": ["-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-deadline", "realtime"],
    "av1.mp4": ["-c:v", "libsvtav1", "-preset", "12"],
    "hevc10.mp4": ["-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params", "log-level=0"],
    "full_range.mp4": ["-c:v", "libx264", "-pix_fmt", "yuvj420p"],
    "bt709.mp4": [*H264, "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"],
    "stream.ts": H264,
}
COPIES: dict[str, list[object]] = {
    "turned90.mp4": ["-display_rotation", "90", "-i", "constant.mp4", "-c", "copy"],
    "turned180.mp4": ["-display_rotation", "180", "-i", "constant.mp4", "-c", "copy"],
    "turned270.mp4": ["-display_rotation", "270", "-i", "constant.mp4", "-c", "copy"],
    "mirrored.mp4": ["-display_hflip", "-i", "constant.mp4", "-c", "copy"],
    "two.mkv": ["-i", "constant.mp4", "-map", "0", "-map", "0", "-c", "copy"],
    "edit_list.mp4": ["-ss", "0.5", "-i", "constant.mp4", "-c", "copy"],
}


def video(make: Make, name: str) -> Path:
    if name in VIDEOS:
        return make(name, *VIDEOS[name])
    source = video(make, "constant.mp4")
    return make(name, *(source if a == "constant.mp4" else a for a in COPIES[name]))


@pytest.mark.parametrize("name", [*VIDEOS, *COPIES])
def test_every_frame_is_ffmpegs(name: str, make: Make) -> None:
    path = video(make, name)
    reader = read_video(path, VideoSampling(fps="native"))
    frames = list(reader)
    raw = np.frombuffer(ffmpeg(path, "-f", "rawvideo", "-pix_fmt", "rgb24"), np.uint8)
    theirs = raw.reshape(len(frames), *frames[0].image.shape)
    assert [f.pts for f in frames] == [float(t) for t in times_of_ffmpeg(path)]
    assert [f.index for f in frames] == list(range(len(frames)))
    assert all((f.image == image).all() for f, image in zip(frames, theirs, strict=True))
    assert reader.facts["source_frames"] == len(frames)
    assert reader.facts["corrupt"] == 0


@pytest.mark.parametrize(
    "name", ["constant.mp4", "variable.mp4", "starts_late.mkv", "ntsc.mp4", "old.avi", "stream.ts"]
)
@pytest.mark.parametrize("fps", [1, 2.5, 7, 30, 30000 / 1001])
def test_a_rate_takes_what_is_on_display(name: str, fps: float, make: Make) -> None:
    path = video(make, name)
    times = times_of_ffmpeg(path)
    reader = read_video(path, VideoSampling(fps=fps))
    taken = [(f.index, f.pts) for f in reader]
    step = 1 / Fraction(fps).limit_denominator(2000)
    expected = []
    for k in range(len(taken)):
        at = times[0] + k * step
        index = max(i for i, t in enumerate(times) if t <= at)
        expected.append((index, float(times[index])))
    assert taken == expected
    assert len(taken) == pytest.approx(reader.facts["duration"] * fps, abs=1)


@pytest.mark.parametrize("name", ["constant.mp4", "variable.mp4", "vp8.webm", "old.avi", "edit_list.mp4"])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_a_number_is_spread_like_linspace(name: str, count: int, make: Make) -> None:
    path = video(make, name)
    everything = list(read_video(path, VideoSampling(fps="native")))
    expected = [int(x) for x in np.linspace(0, len(everything) - 1, count)]
    taken = list(read_video(path, VideoSampling(frames=count)))
    assert [f.index for f in taken] == expected == spread(len(everything), count)
    assert all((f.image == everything[f.index].image).all() for f in taken)
    assert [f.pts for f in taken] == [everything[i].pts for i in expected]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=8),
    st.integers(-1000, 1000),
    st.sampled_from([Fraction(1, 10), Fraction(1), Fraction(7), Fraction(25), Fraction(30000, 1001)]),
)
def test_sampling_is_the_definition(gaps: list[int], start: int, fps: Fraction) -> None:
    edges = [Fraction(start + sum(gaps[:i]), 100) for i in range(len(gaps) + 1)]
    decoded = [DecodedFrame(index=i, pts=a, end=b) for i, (a, b) in enumerate(itertools.pairwise(edges))]
    taken = [s.index for s in take_sampled(decoded, VideoSampling(fps=float(fps)))]
    expected, at = [], edges[0]
    while at < edges[-1]:
        expected.append(max(i for i, t in enumerate(edges[:-1]) if t <= at))
        at += 1 / fps
    assert taken == expected


PARTS: list[tuple[float | None, float | None]] = [(0.43, 1.5), (None, 0.7), (1.2, None), (0.44, 0.48), (0.0, 9.0)]


@pytest.mark.parametrize(("name", "planned"), [("constant.mp4", True), ("starts_late.mkv", True), ("old.avi", False)])
@pytest.mark.parametrize(("start", "end"), PARTS)
def test_a_part_of_a_video_has_ffmpegs_frames_from_start_to_before_end(
    name: str, planned: bool, start: float | None, end: float | None, make: Make
) -> None:
    """Times count from the first frame; the frame at `end` is not taken, whether packets tell all or not."""
    path = video(make, name)
    assert (read_packets(path) is not None) == planned
    times = times_of_ffmpeg(path)
    pictures = np.frombuffer(ffmpeg(path, "-f", "rawvideo", "-pix_fmt", "rgb24"), np.uint8).reshape(-1, 66, 98, 3)
    begin, stop = Fraction(str(start or 0)), Fraction(str(2 if end is None else min(end, 2)))
    inside = [i for i, t in enumerate(times) if begin <= t - times[0] < stop]
    due = itertools.takewhile(lambda t: t < stop, (begin + Fraction(k, 5) for k in itertools.count()))
    expected: dict[str, list[int]] = {
        "native": inside,
        "fps": [max(i for i, t in enumerate(times) if t - times[0] <= at) for at in due],
        "frames": [inside[int(x)] for x in np.linspace(0, len(inside) - 1, 4)],
    }
    for how, options in {"native": {"fps": "native"}, "fps": {"fps": 5.0}, "frames": {"frames": 4}}.items():
        sampling = VideoSampling(start=start, end=end, **options)  # type: ignore[arg-type]
        frames = list(read_video(path, sampling))
        assert [f.index for f in frames] == expected[how], how
        assert [f.pts for f in frames] == [float(times[i]) for i in expected[how]]
        assert all((f.image == pictures[f.index]).all() for f in frames)
        assert count_frames(path, sampling).frames == len(frames)


@pytest.mark.parametrize("name", ["constant.mp4", "old.avi"])
def test_a_part_without_a_frame_is_refused(name: str, make: Make) -> None:
    path = video(make, name)
    for options in ({"fps": "native"}, {"fps": 1.0}, {"frames": 4}):
        sampling = VideoSampling(start=7.0, end=8.0, **options)  # type: ignore[arg-type]
        for read in (lambda s: list(read_video(path, s)), lambda s: count_frames(path, s)):
            with refused(InputError, path.name):
                read(sampling)
    for start, end in ((1.0, 1.0), (2.0, 1.0), (-1.0, None), (None, 0.0)):
        with pytest.raises(UsageError, match="before --end"):
            VideoSampling(start=start, end=end)


def test_reading_is_lazy(make: Make) -> None:
    reader = read_video(video(make, "constant.mp4"), VideoSampling(fps="native"))
    assert next(reader).index == 0
    assert "source_frames" not in reader.facts, "known only when the end was seen"


def test_probe_decodes_nothing(make: Make) -> None:
    facts = probe(video(make, "constant.mp4"))
    assert facts == {"width": 98, "height": 66, "duration": 2.0, "source_fps": 25.0}
    assert probe(video(make, "vp9.webm"))["duration"] == pytest.approx(2, abs=0.1)


def test_one_sampling(make: Make) -> None:
    for both in ({}, {"fps": 1.0, "frames": 3}):
        with pytest.raises(UsageError):
            read_video(video(make, "constant.mp4"), VideoSampling(**both))  # type: ignore[arg-type]


def refused_naming(path: Path, *words: str) -> None:
    with pytest.raises(InputError) as e:
        list(read_video(path, VideoSampling(fps=1)))
    assert e.value.exit_code == 3
    assert "\n" not in str(e.value)
    for word in (str(path), *words):
        assert word in str(e.value)


def test_broken_files_are_one_line(make: Make, tmp_path: Path) -> None:
    whole = video(make, "constant.mp4").read_bytes()
    streamable = make("streamable.mp4", "-i", video(make, "constant.mp4"), "-c", "copy", "-movflags", "+faststart")
    fragmented = make(
        "pieces.mp4", "-i", video(make, "constant.mp4"), "-c", "copy", "-movflags", "+frag_keyframe+empty_moov"
    )
    assert len(list(read_video(fragmented, VideoSampling(fps="native")))) == 50
    files = {
        "empty.mp4": b"",
        "text.mp4": b"I am text.\n" * 500,
        "subtitles.mp4": b"1\n00:00:00,000 --> 00:00:01,000\nI am text.\n" * 50,
        "cut.mp4": whole[: len(whole) // 2],
        "cut_late.mp4": streamable.read_bytes()[:-1],
        "cut_piece.mp4": fragmented.read_bytes()[:-700],
        "cut.mkv": video(make, "variable.mkv").read_bytes()[:-1],
        "cut.webm": video(make, "vp9.webm").read_bytes()[:-900],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    refused_naming(tmp_path / "missing.mp4", "no such video")
    refused_naming(tmp_path / "empty.mp4", "empty")
    refused_naming(tmp_path / "text.mp4", "not a video")
    refused_naming(tmp_path / "subtitles.mp4", "no video stream")
    refused_naming(tmp_path, "not a file")
    for name in ("cut.mp4", "cut_late.mp4", "cut_piece.mp4", "cut.mkv", "cut.webm"):
        refused_naming(tmp_path / name, "cut short")
    refused_naming(make("sound.mp4", "-f", "lavfi", "-i", "sine=d=1"), "no video stream")
    cover = make("cover.png", "-frames:v", "1")
    song = make("song.mp3", "-f", "lavfi", "-i", "sine=d=1", "-i", cover, "-map", "0", "-map", "1", "-c:v", "copy")
    refused_naming(song, "no video stream")


def test_a_live_recording_has_no_length(make: Make) -> None:
    live = make("live.mkv", *H264, "-f", "matroska", "-live", "1")
    assert len(list(read_video(live, VideoSampling(fps="native")))) == 50


def test_damage_is_counted_and_much_of_it_refused(make: Make, tmp_path: Path) -> None:
    whole = video(make, "constant.mp4").read_bytes()
    start, end = whole.index(b"mdat") + 4, whole.index(b"moov") - 4
    damaged = bytearray(whole)
    rng = random.Random(0)
    for _ in range(200):
        damaged[rng.randrange(start, end)] = rng.randrange(256)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    refused_naming(tmp_path / "damaged.mp4", "damaged")


def test_decord_where_asked(make: Make) -> None:
    pytest.importorskip("decord")
    for name in ("constant.mp4", "starts_late.mkv"):
        path = video(make, name)
        for how in ({"fps": 2.0}, {"frames": 7}, {"fps": "native"}):
            ours, theirs = (
                list(read_video(path, VideoSampling(**how))),
                read_video(path, VideoSampling(decoder="decord", **how)),
            )  # type: ignore[arg-type]
            frames = list(theirs)
            assert [(f.index, f.pts) for f in frames] == [(f.index, f.pts) for f in ours]
            assert all(np.abs(a.image.astype(int) - b.image).mean() < 2 for a, b in zip(frames, ours, strict=True))
            assert theirs.facts["decoder"].startswith("decord ")
    for name, word in (
        ("variable.mp4", "varies"),
        ("old.avi", "codec"),
        ("av1.mp4", "codec"),
        ("edit_list.mp4", "edit"),
        ("stream.ts", "seeks"),
        ("mirrored.mp4", "does not mirror"),
        ("two.mkv", "several"),
    ):
        with pytest.raises(InputError, match=word):
            list(read_video(video(make, name), VideoSampling(fps=1, decoder="decord")))
    sound = make("sound.mp4", "-f", "lavfi", "-i", "sine=d=1")
    with refused(InputError, "sound.mp4"):
        list(read_video(sound, VideoSampling(fps=1, decoder="decord")))
