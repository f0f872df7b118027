"""Decoding only what is needed gives the same frames; damage is counted; a decoder that dies costs only its video."""

import os
import random
import signal
import subprocess
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from support.refusals import refused

from lvctx.errors import InputError
from lvctx.video.decode_worker import DecodeRequest, Decoders
from lvctx.video.frame_selection import frame_numbers
from lvctx.video.packet_index import ENTRY, SPARE, read_packets
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
H264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-bf", "3"]
VIDEOS: dict[str, list[str]] = {
    "short_gops.mp4": [*H264, "-g", "12"],
    "short_gops.mkv": [*H264, "-g", "12"],
    "short_gops.ts": [*H264, "-g", "12"],
    "one_gop.mp4": [*H264, "-g", "9999", "-sc_threshold", "0"],
    "open_gops.mp4": [*H264, "-g", "20", "-x264-params", "open-gop=1"],
    "refreshing.mp4": [*H264, "-bf", "0", "-g", "20", "-x264-params", "intra-refresh=1"],
    "all_intra.mp4": [*H264, "-g", "1"],
    "hevc.mp4": ["-c:v", "libx265", "-x265-params", "log-level=0:keyint=20:bframes=3"],
    "vp9.webm": ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-g", "20"],
    "alpha.webm": ["-vf", "format=yuva420p", "-c:v", "libvpx-vp9", "-deadline", "realtime", "-g", "20"],
    "av1.mp4": ["-c:v", "libsvtav1", "-preset", "12", "-g", "20"],
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four seconds of moving picture, 25 a second, in every way of coding."""
    folder = tmp_path_factory.mktemp("parts")
    for name, how in VIDEOS.items():
        source = ["-f", "lavfi", "-i", "testsrc2=s=96x64:r=25:d=4"]
        subprocess.run([FFMPEG, "-v", "error", *source, *how, folder / name], check=True)
    return {name: folder / name for name in VIDEOS}


def pictures_of_ffmpeg(path: Path) -> np.ndarray:
    command = [
        FFMPEG,
        "-v",
        "error",
        "-i",
        path,
        "-fps_mode",
        "passthrough",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, 64, 96, 3)


@pytest.mark.parametrize("name", VIDEOS)
def test_parts_are_ffmpegs_frames(name: str, videos: dict[str, Path]) -> None:
    path = videos[name]
    theirs = pictures_of_ffmpeg(path)
    numbers = [1, 19, 20, 21, 22, 97]
    for how in ({"fps": 1.0}, {"fps": 3.3}, {"frames": 5}, {"frames": 33}, {}):
        for threads in (1, 3):
            wanted = None if how else numbers
            reader = read_video(path, VideoSampling(**how), frame_indices=wanted, threads=threads)  # type: ignore[arg-type]
            frames = list(reader)
            assert all((f.image == theirs[f.index]).all() for f in frames), (how, threads)
            assert how or [f.index for f in frames] == numbers
            assert [f.pts - frames[0].pts for f in frames] == pytest.approx(
                [(f.index - frames[0].index) / 25 for f in frames], abs=2e-3
            )
            assert (reader.facts["source_frames"], reader.facts["corrupt"]) == (len(theirs), 0)


def test_little_is_decoded(videos: dict[str, Path]) -> None:
    index = read_packets(videos["short_gops.mp4"])
    assert index is not None
    assert (index.flags_N & SPARE).sum() > len(index) / 3, "B-frames that nobody refers to"
    seek_ranges = index.seek_ranges([0, 50])
    assert seek_ranges is not None
    assert [index.flags_N[s.start] & ENTRY for s in seek_ranges] == [ENTRY, ENTRY]
    assert sum(s.stop - s.start for s in seek_ranges) <= 13
    refreshing = read_packets(videos["refreshing.mp4"])
    assert refreshing is not None
    assert len(refreshing.entry_dts) == 1, "a recovery point is no place to begin"


def test_key_frames_are_near_and_report_their_error(videos: dict[str, Path]) -> None:
    path = videos["short_gops.mp4"]
    index = read_packets(path)
    assert index is not None
    exact = frame_numbers(index, VideoSampling(fps=2.0), path)
    reader = read_video(path, VideoSampling(fps=2.0, seek="keyframe"))
    frames = list(reader)
    keys = index.key_frames.tolist()
    nearest = [min(keys, key=lambda k, i=i: (abs(k - i), k)) for i in exact]  # type: ignore[misc]
    assert [f.index for f in frames] == nearest
    errors = [abs(k - i) / 25 for k, i in zip(nearest, exact, strict=True)]
    assert reader.facts["time_error"]["max"] == pytest.approx(max(errors), abs=1e-6)
    assert reader.facts["time_error"]["mean"] == pytest.approx(sum(errors) / len(errors), abs=1e-6)
    theirs = pictures_of_ffmpeg(path)
    assert all((f.image == theirs[f.index]).all() for f in frames)


def test_missing_frames_are_counted_and_left_out(videos: dict[str, Path], tmp_path: Path) -> None:
    whole = videos["all_intra.mp4"].read_bytes()
    start, end = whole.index(b"mdat") + 4, whole.rindex(b"moov") - 4
    damaged = bytearray(whole)
    rng = random.Random(1)
    for at in rng.sample(range(start + 3000, end), 30):
        damaged[at : at + 40] = bytes(40)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(damaged)
    with refused(InputError, "damaged.mp4"):
        list(read_video(path, VideoSampling(fps="native")))
    reader = read_video(path, VideoSampling(fps="native", allow_partial=True))
    frames = list(reader)
    assert reader.facts["corrupt"] > 1
    assert len({f.index for f in frames}) == len(frames) <= 100, "none is made up or repeated"


def test_cut_files(videos: dict[str, Path], tmp_path: Path) -> None:
    old = tmp_path / "old.avi"
    source = ["-f", "lavfi", "-i", "testsrc2=s=96x64:r=25:d=2", "-c:v", "mpeg4"]
    subprocess.run([FFMPEG, "-v", "error", *source, old], check=True)
    assert len(list(read_video(old, VideoSampling(fps="native")))) == 50
    for path in (old, videos["short_gops.mkv"]):
        cut = tmp_path / f"cut{path.suffix}"
        cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 1])
        with refused(InputError, cut.name):
            list(read_video(cut, VideoSampling(fps=1)))
        partial = read_video(cut, VideoSampling(fps=1, allow_partial=True))
        assert len(list(partial)) >= 1
        assert partial.facts["partial"]


def test_a_wrong_duration_has_no_effect(videos: dict[str, Path], tmp_path: Path) -> None:
    raw = bytearray(videos["short_gops.mp4"].read_bytes())
    for box in (b"mvhd", b"tkhd"):
        at = raw.index(box) + (20 if box == b"mvhd" else 24)  # version 0: where the duration is
        raw[at : at + 4] = (10**6).to_bytes(4, "big")
    path = tmp_path / "wrong.mp4"
    path.write_bytes(raw)
    for how in ({"fps": 1.0}, {"frames": 5}):
        assert [f.index for f in read_video(path, VideoSampling(**how))] == [  # type: ignore[arg-type]
            f.index
            for f in read_video(videos["short_gops.mp4"], VideoSampling(**how))  # type: ignore[arg-type]
        ]


def request(path: Path) -> DecodeRequest:
    sampling = VideoSampling(fps="native", decoder="pyav", frame_mode="squash")
    return DecodeRequest(path=str(path), sampling=sampling, threads=1, size=32, background=(0, 0, 0))


def test_a_separate_process_gives_the_same_and_is_reused(videos: dict[str, Path], tmp_path: Path) -> None:
    decoders = Decoders()
    (tmp_path / "text.mp4").write_text("I am text")
    for _ in range(2):
        facts: dict[str, Any] = {}
        with decoders.read(request(videos["short_gops.mp4"]), facts) as frames:
            got = list(frames)
        here = read_video(videos["short_gops.mp4"], VideoSampling(fps="native"))
        assert [(f.index, f.pts) for f in got] == [(f.index, f.pts) for f in here]
        assert facts == here.facts
        assert got[0].image.shape == (32, 32, 3)
        with (
            pytest.raises(InputError, match="not a video") as e,
            decoders.read(request(tmp_path / "text.mp4"), {}) as frames,
        ):
            list(frames)
        assert e.value.where == str(tmp_path / "text.mp4")
    (process,) = decoders._idle
    decoders.close()
    assert process.poll() is not None


@pytest.mark.parametrize(("blow", "word"), [(signal.SIGSEGV, "died"), (signal.SIGSTOP, "made no progress")])
def test_a_dead_or_hanging_decoder_costs_one_video(blow: signal.Signals, word: str, videos: dict[str, Path]) -> None:
    decoders = Decoders(timeout=3 if blow == signal.SIGSTOP else 120)
    victim = decoders._start()
    decoders._idle.append(victim)
    os.kill(victim.pid, blow)
    with pytest.raises(InputError, match=word), decoders.read(request(videos["all_intra.mp4"]), {}) as frames:
        list(frames)
    assert victim.poll() is not None, "it is gone"
    patient = Decoders()
    with patient.read(request(videos["all_intra.mp4"]), {}) as frames:
        assert len(list(frames)) == 100
    patient.close()


def test_a_video_that_needs_too_much_memory_costs_one_video(videos: dict[str, Path], tmp_path: Path) -> None:
    large = tmp_path / "large.mkv"
    source = ["-f", "lavfi", "-i", "color=s=8000x8000:d=1:r=2", "-pix_fmt", "yuvj420p", "-c:v", "mjpeg"]
    subprocess.run([FFMPEG, "-v", "error", *source, large], check=True)
    bounded = Decoders(memory=250 << 20)  # a frame has 192 MB in RGB and 96 before
    with pytest.raises(InputError, match="memory") as caught, bounded.read(request(large), {}) as frames:
        list(frames)
    assert caught.value.where == str(large)
    with bounded.read(request(videos["all_intra.mp4"]), {}) as frames:
        assert len(list(frames)) == 100
    bounded.close()


def test_threads_end_when_reading_stops(videos: dict[str, Path]) -> None:
    before = threading.active_count()
    reader = read_video(videos["all_intra.mp4"], VideoSampling(fps="native"), threads=4)
    next(reader)
    reader._frames.close()  # type: ignore[attr-defined]
    for _ in range(100):
        if threading.active_count() <= before:
            return
        time.sleep(0.05)
    raise AssertionError(threading.enumerate())


def test_choosing_is_in_exact_arithmetic(videos: dict[str, Path]) -> None:
    index = read_packets(videos["short_gops.mp4"])
    assert index is not None
    times = [index.time(i) for i in range(len(index))]
    for fps in (1, 2.5, 7, 24, 25, 30000 / 1001, 60):
        step = 1 / Fraction(fps).limit_denominator(100_000)
        expected = []
        while (at := times[0] + len(expected) * step) < times[-1] + Fraction(1, 25):
            expected.append(max(i for i, t in enumerate(times) if t <= at))
        assert frame_numbers(index, VideoSampling(fps=fps), videos["short_gops.mp4"]) == expected
