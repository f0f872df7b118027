"""Counted frames are the frames read, in dry runs, packed chat and haystacks, whatever length a container states."""

import json
import subprocess
from pathlib import Path

import imageio_ffmpeg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import mrope_models
from test_mrope_train import reader_of
from test_niah import run

from lvctx.video.frame_count import count_frames
from lvctx.video.hybrid import Hybrid
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.registry import open_vlm

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
PICTURE = ["-f", "lavfi", "-i", "testsrc2=s=64x48:r=25:d=2"]
SOUND = ["-f", "lavfi", "-i", "sine=d=6"]
H264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "12"]
VP9 = ["-c:v", "libvpx-vp9", "-deadline", "realtime"]
STILLS = ["-vf", "setpts='(N+40*gt(N,9)+200*gt(N,30))/25/TB'", "-fps_mode", "vfr", "-enc_time_base", "1/1000"]
VIDEOS: dict[str, list[str]] = {
    "sound.mkv": [*PICTURE, *SOUND, *H264, "-c:a", "libopus"],
    "sound.webm": [*PICTURE, *SOUND, *VP9, "-c:a", "libopus"],
    "sound.mp4": [*PICTURE, *SOUND, *H264, "-c:a", "aac"],
    "sound.ts": [*PICTURE, *SOUND, *H264, "-c:a", "aac"],
    "late.mkv": [*PICTURE, *H264, "-output_ts_offset", "3.3"],
    "late.mp4": ["-itsoffset", "3.3", *PICTURE, *SOUND, *H264, "-c:a", "aac"],
    "stills.mp4": [*PICTURE, *STILLS, *H264],
    "stills.mkv": [*PICTURE, *STILLS, *H264],
    "ntsc.mp4": [*PICTURE, "-r", "30000/1001", *H264],
    "old.avi": [*PICTURE, "-c:v", "mpeg4", "-bf", "2"],
    "unordered.avi": [*PICTURE, *H264],
    "vp8.webm": [*PICTURE, "-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-deadline", "realtime"],
    "live.mkv": [*PICTURE, *H264, "-live", "1"],
    "film.gif": [*PICTURE, "-r", "10"],
    "one.mp4": [*PICTURE, "-frames:v", "1", *H264],
    "program.mpg": [*PICTURE, "-c:v", "mpeg2video"],
    "hidden.mp4": [],
    "joined.ts": [],
}
SURE = ("mp4", "mkv", "ts")
"""Suffixes of the files here whose packets tell all."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counted")
    for name, how in VIDEOS.items():
        if how:
            subprocess.run([FFMPEG, "-v", "error", *how, folder / name], check=True)
    edited = ["-ss", "0.5", "-i", folder / "ntsc.mp4", "-c", "copy"]
    subprocess.run([FFMPEG, "-v", "error", *edited, folder / "hidden.mp4"], check=True)
    (folder / "joined.ts").write_bytes((folder / "sound.ts").read_bytes() * 2)
    return folder


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(VIDEOS)),
    st.one_of(
        st.just({"fps": "native"}),
        st.builds(dict, fps=st.one_of(st.sampled_from([0.1, 1.0, 2.0, 30000 / 1001]), st.floats(0.05, 60))),
        st.builds(dict, frames=st.integers(1, 70)),
    ),
)
def test_frames_counted_are_frames_read(videos: Path, name: str, how: dict[str, object]) -> None:
    path = videos / name
    seen = [frame.image.shape for frame in read_video(path, VideoSampling(**how))]  # type: ignore[arg-type]
    count = count_frames(path, VideoSampling(**how))  # type: ignore[arg-type]
    assert (count.frames, count.height, count.width, 3) == (len(seen), *seen[0])
    assert count.exact
    guess = count_frames(path, VideoSampling(**how), decode=False)  # type: ignore[arg-type]
    assert guess.exact or name.split(".")[1] not in SURE
    assert guess.frames == len(seen) or not guess.exact
    assert guess.frames == pytest.approx(len(seen), rel=0.1, abs=1)
    assert count.duration == pytest.approx(read_duration(path), abs=1e-6)


def read_duration(path: Path) -> float:
    reader = read_video(path, VideoSampling(fps="native"))
    frames = list(reader)
    assert reader.facts["duration"] >= frames[-1].pts - frames[0].pts
    return float(reader.facts["duration"])


def test_duration_is_that_of_the_video_stream(videos: Path) -> None:
    for name in ("sound.mkv", "sound.webm", "sound.mp4", "late.mkv", "late.mp4"):
        assert count_frames(videos / name, VideoSampling(fps=1.0)).duration == pytest.approx(2, abs=0.05), name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mrope_models.save("qwen2_5_vl", tmp_path_factory.mktemp("counting") / "model")


def test_what_is_packed_can_be_trained_on(videos: Path, model: Path) -> None:
    here = model.parent
    names = sorted(VIDEOS)
    talk = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Bars."}]
    (here / "chat.json").write_text(json.dumps([{"video": name, "conversations": talk} for name in names]))
    flags = ("--model", model, "--interleaved", here / "chat.json", "--media", videos, "--long-share", 0)
    done = run("pack-chat", *flags, "--hybrid", "2,16,4", "--target-length", 4000, "-o", here / "chat")
    assert done.exit_code == 0, done.stderr
    reader = reader_of(here)
    reader.media = videos
    packed = [item["path"] for row in range(len(reader.rows)) for s in reader.rows.samples(row) for item in s["media"]]
    assert sorted(packed) == names
    for row in range(len(reader.rows)):
        assert reader.read(row).patches is not None


@pytest.mark.parametrize("name", ["sound.mkv", "sound.webm", "sound.mp4", "late.mp4", "stills.mp4", "old.avi"])
def test_a_haystack_has_the_frames_that_exist(name: str, videos: Path, model: Path) -> None:
    hybrid = Hybrid(group=2, tokens=16, ratio=4)
    haystack = open_vlm(model).haystack([videos / name], VideoSampling(fps=2.0, hybrid=hybrid), as_images=False)
    read = len(list(read_video(videos / name, VideoSampling(fps=2.0))))
    assert len(haystack.seconds) == read // 2 * 2


@pytest.mark.parametrize("how", [("--fps", 1), ("--fps", "native"), ("--frames", 8), ("--fps", 2, "--hybrid", "4,4,4")])
def test_a_dry_run_counts_the_frames_of_a_run(how: tuple[object, ...], videos: Path, tiny_tower: Path) -> None:
    for name in sorted(VIDEOS):
        done = run("encode-video", videos / name, "--tower", tiny_tower, *how, "--dry-run")
        assert done.exit_code == 0, done.stderr
        row = json.loads(done.stdout)
        fps = {"native": "native"}.get(str(how[1])) or float(str(how[1]))
        sampling = {"frames": how[1]} if how[0] == "--frames" else {"fps": fps}
        read = len(list(read_video(videos / name, VideoSampling(**sampling))))  # type: ignore[arg-type]
        assert row["expected_frames"] == read or row["about"], name
        assert ("about" in done.stderr) == row["about"]
        assert not (row["about"] and name.split(".")[1] in SURE)
