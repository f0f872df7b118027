"""From a video to its artifact: right features, one row each, the same bytes again, and nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import warm_server
from support.frames import write_frames
from support.refusals import refused
from typer.testing import CliRunner

from lvctx.artifacts import schemas
from lvctx.artifacts.manifest import Provenance
from lvctx.artifacts.store import sha256_file
from lvctx.cli.app import app
from lvctx.errors import InputError
from lvctx.models.vision_encoder import TowerFiles, load_tower
from lvctx.parallel.work_shares import share_videos
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling, parse_rate
from lvctx.vlm.feature_cache import open_frames, read_feature_cache
from lvctx.vlm.video_encoder import VideoEncoder

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
Row = dict[str, Any]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a.mp4` and `b.mp4` (two seconds, 25 fps, B-frames), another `other/a.mp4`, and broken files."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "other").mkdir()
    for name, picture in (("a.mp4", "testsrc2"), ("b.mp4", "rgbtestsrc"), ("other/a.mp4", "smptebars")):
        source = ["-f", "lavfi", "-i", f"{picture}=s=90x50:r=25:d=2", "-c:v", "libx264", "-pix_fmt", "yuv420p"]
        subprocess.run([FFMPEG, "-v", "error", *source, folder / name], check=True)
    (folder / "text.mp4").write_text("I am text")
    (folder / "empty.mp4").touch()
    return folder


def run(*args: object, stdin: str | None = None) -> tuple[int, list[Row], list[str]]:
    """Exit code, rows on stdout, and our lines on stderr."""
    done = CliRunner().invoke(app, ["encode-video", *map(str, args)], input=stdin)
    said = [line for line in done.stderr.splitlines() if line.startswith("lvctx: ")]
    assert "Traceback" not in done.stderr
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()], said


def test_features_are_the_towers(clips: Path, tiny_tower: Path, tmp_path: Path) -> None:
    code, rows, _ = run(
        clips / "a.mp4", "--tower", tiny_tower, "--fps", 5, "--batch", 3, "--dtype", "float32", "-o", tmp_path
    )
    assert (code, len(rows)) == (0, 1)
    row, target = rows[0], tmp_path / "a.frames.safetensors"
    assert row["schema"] == schemas.FRAMES
    assert row["path"] == str(target)
    assert row["sha256"] == sha256_file(target)
    assert (row["frames"], row["tokens_per_frame"], row["duration"]) == (10, 4, 2.0)
    assert load_file(target).keys() == {"features", "pts", "index"}, "a stock reader reads it"
    frames = read_feature_cache(target)
    assert frames.features.shape == (10, 16, 32)
    assert frames.features.dtype == torch.bfloat16
    assert frames.index.tolist() == list(range(0, 50, 5))
    assert frames.pts.tolist() == [i * 0.2 for i in range(10)] or np.allclose(frames.pts, np.arange(10) * 0.2)
    assert frames.provenance["inputs"] == {
        "tower": TowerFiles.find(tiny_tower).fingerprint,
        "video": sha256_file(clips / "a.mp4"),
    }
    assert frames.provenance["config"]["frame_mode"] == "crop"
    assert "libavcodec" in frames.provenance["facts"]["decoder"]
    tower = load_tower(tiny_tower, dtype=torch.float32)
    images = [Image.fromarray(f.image) for f in read_video(clips / "a.mp4", VideoSampling(fps=5.0))]
    expected = tower.encode_images([tower.preprocess.square(image, "crop") for image in images])
    torch.testing.assert_close(frames.features, expected.bfloat16(), rtol=1e-2, atol=1e-3)


def test_the_same_bytes_twice_and_nothing_to_do_the_third_time(clips: Path, tiny_tower: Path, tmp_path: Path) -> None:
    options = ("--tower", tiny_tower, "--fps", "native", "--frame-mode", "pad", "--batch", 16)
    _, first, _ = run(clips / "a.mp4", *options, "-o", tmp_path / "1")
    _, second, _ = run(clips / "a.mp4", *options, "-o", tmp_path / "2")
    assert first[0]["sha256"] == second[0]["sha256"]
    assert first[0]["frames"] == 50
    target = tmp_path / "1" / "a.frames.safetensors"
    before = target.stat().st_mtime_ns
    code, again, _ = run(clips / "a.mp4", *options, "-o", tmp_path / "1")
    assert (code, again) == (0, first)
    assert target.stat().st_mtime_ns == before
    code, rows, said = run(clips / "a.mp4", "--tower", tiny_tower, "--frames", 3, "-o", tmp_path / "1")
    assert code == 3
    assert "fps: native -> None" in said[0]
    assert "error" in rows[0]
    code, rows, _ = run(clips / "a.mp4", "--tower", tiny_tower, "--frames", 3, "-o", tmp_path / "1", "--force")
    assert (code, rows[0]["frames"]) == (0, 3)


def test_one_broken_video_costs_itself(clips: Path, tiny_tower: Path, tmp_path: Path) -> None:
    broken = [clips / "text.mp4", clips / "missing.mp4", clips / "empty.mp4"]
    videos: Sequence[Path] = [broken[0], clips / "a.mp4", *broken[1:], clips / "b.mp4"]
    code, rows, said = run(*videos, "--tower", tiny_tower, "--frames", 2, "-o", tmp_path)
    assert code == 4
    assert [r["path"] for r in rows if "error" in r] == [str(p) for p in broken]
    assert [Path(r["path"]).name for r in rows if "error" not in r] == ["a.frames.safetensors", "b.frames.safetensors"]
    assert len(said) == 3
    assert all(str(p) in line for p, line in zip(broken, said, strict=True))
    assert sorted(os.listdir(tmp_path)) == ["a.frames.safetensors", "b.frames.safetensors"]
    for only in broken:
        code, rows, said = run(only, "--tower", tiny_tower, "-o", tmp_path)
        assert (code, len(rows), len(said)) == (3, 1, 1)
    code, _, said = run(*broken, "--tower", tiny_tower, "-o", tmp_path)
    assert (code, len(said)) == (3, 3)


def test_namesakes_do_not_collide(clips: Path, tiny_tower: Path, tmp_path: Path) -> None:
    videos = (clips / "a.mp4", clips / "other" / "a.mp4", clips / "a.mp4")
    code, rows, _ = run(*videos, "--tower", tiny_tower, "--frames", 2, "-o", tmp_path)
    assert code == 0
    own = sha256_file(clips / "other" / "a.mp4")[:8]
    names = ["a.frames.safetensors", f"a-{own}.frames.safetensors"]
    assert [Path(r["path"]).name for r in rows] == [*names, names[0]]
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_paths_and_rows_on_stdin(clips: Path, tiny_tower: Path, tmp_path: Path) -> None:
    lines = f"{clips / 'a.mp4'}\n\n{json.dumps({'path': str(clips / 'b.mp4'), 'question': 'Why?'})}\n"
    code, rows, _ = run("-", "--tower", tiny_tower, "--frames", 2, "-o", tmp_path, stdin=lines)
    assert (code, len(rows)) == (0, 2)
    assert rows[1]["question"] == "Why?"
    assert rows[1]["path"].endswith("b.frames.safetensors")
    code, rows, said = run("-", "--tower", tiny_tower, "--frames", 2, "-o", tmp_path, stdin=f"{lines}{{oops\n")
    assert (code, len(rows), len(said)) == (3, 2, 1)
    assert "stdin:4" in said[0]


def test_dry_run_predicts_and_writes_nothing(clips: Path, tiny_tower: Path, tmp_path: Path) -> None:
    out = tmp_path / "frames"
    code, rows, _ = run(clips / "a.mp4", "--tower", tiny_tower, "--fps", 4, "-o", out, "--dry-run")
    assert code == 0
    assert not out.exists()
    assert (rows[0]["expected_frames"], rows[0]["expected_bytes"]) == (8, 8 * 16 * 32 * 2)
    assert rows[0]["decoder"] == "pyav"
    assert run(clips / "text.mp4", "--tower", tiny_tower, "--dry-run")[0] == 3


def test_options_that_contradict(clips: Path, tiny_tower: Path) -> None:
    video = clips / "a.mp4"
    assert run(video)[0] == 2
    assert run(video, "--tower", tiny_tower, "--model", tiny_tower)[0] == 2
    assert run(video, "--tower", tiny_tower, "--fps", 1, "--frames", 2)[0] == 2
    assert run(video, "--tower", tiny_tower, "--fps", "fast")[0] == 2
    assert run(video, "--tower", "/nowhere")[0] == 3


def test_rates() -> None:
    assert parse_rate("native") == "native"
    assert parse_rate("30000/1001") == 30000 / 1001
    for bad in ("0", "-1", "1/0", "nan", "inf", "fast", ""):
        with pytest.raises(ValueError, match="not a frame rate"):
            parse_rate(bad)


def test_decord_is_recorded(clips: Path, tiny_tower: Path, tmp_path: Path) -> None:
    pytest.importorskip("decord")
    code, rows, _ = run(clips / "a.mp4", "--tower", tiny_tower, "--frames", 3, "--decoder", "decord", "-o", tmp_path)
    assert code == 0
    made = read_feature_cache(Path(rows[0]["path"])).provenance
    assert made["config"]["decoder"] == "decord"
    assert made["facts"]["decoder"].startswith("decord ")


def test_several_at_once_are_the_same_and_in_order(clips: Path, tiny_tower: Path, tmp_path: Path) -> None:
    videos = (clips / "a.mp4", clips / "text.mp4", clips / "other" / "a.mp4", clips / "b.mp4")
    options = ("--tower", tiny_tower, "--fps", 3, "--batch", 4)
    code, alone, _ = run(*videos, *options, "-o", tmp_path / "1")
    assert code == 4
    code, together, _ = run(*videos, *options, "--jobs", 3, "-o", tmp_path / "3")
    assert code == 4
    assert [r.get("sha256") for r in together] == [r.get("sha256") for r in alone]
    assert [Path(r["path"]).name for r in together] == [Path(r["path"]).name for r in alone]


def test_processes_share_the_videos(clips: Path, tiny_tower: Path, tmp_path: Path) -> None:
    """Two under torchrun: the rows, the names and the bytes of one process; each video is read by one of them."""
    videos = [str(clips / name) for name in ("a.mp4", "text.mp4", "b.mp4", "other/a.mp4", "missing.mp4")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = []
    for name, launcher in (("one", [warm_server.start()]), ("two", warm_server.torchrun(2))):
        out = tmp_path / name
        done = subprocess.run(
            [*launcher, "encode-video", "-", "--tower", str(tiny_tower), "--frames", "3", "-o", str(out)],
            input="\n".join(videos),
            capture_output=True,
            text=True,
            env=env,
            timeout=300,
        )
        assert (done.returncode == 4) == (name == "one"), "torchrun has an exit code of its own"
        errors = [line for line in done.stderr.splitlines() if line.startswith("lvctx: ")]
        assert [sum(name in line for line in errors) for name in ("text.mp4", "missing.mp4")] == [1, 1]
        said.append(done.stdout.replace(str(out), ""))
    assert len(said[0].splitlines()) == 5
    assert said[1] == said[0]
    names = sorted(os.listdir(tmp_path / "one"))
    assert len(names) == 3
    assert sorted(os.listdir(tmp_path / "two")) == names
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_two_processes_encode_one_video_once(clips: Path, tiny_tower: Path, tmp_path: Path) -> None:
    """The ranks of a question about a video all need its features, in one folder."""
    given = ["encode-video", clips / "a.mp4", "--tower", tiny_tower, "--fps", "native", "--batch", 1]
    assert run(*given[1:], "-o", tmp_path / "alone")[0] == 0
    started = [warm_server.Command(*given, "-o", tmp_path / "together") for _ in range(3)]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert os.listdir(tmp_path / "together") == ["a.frames.safetensors"]
    stored, alone = (sha256_file(tmp_path / name / "a.frames.safetensors") for name in ("together", "alone"))
    assert stored == alone
    assert {json.loads(rows)["sha256"] for rows, _ in said} == {alone}


def test_shares_are_whole_even_and_keep_namesakes_together(tmp_path: Path) -> None:
    videos = []
    for name, size in (("a/x", 5), ("b/y", 9), ("b/x", 5), ("c/z", 8), ("c/w", 1), ("gone", None)):
        path = tmp_path / f"{name}.mp4"
        path.parent.mkdir(exist_ok=True)
        if size is not None:
            path.write_bytes(bytes(size))
        videos.append((path, {}))
    assert share_videos(videos, 2) == [[0, 2, 4, 5], [1, 3]], "10 + 1 + 0 and 9 + 8 bytes"
    shares = share_videos(videos, 4)
    assert sorted(i for share in shares for i in share) == list(range(6))
    assert [0, 2] in [share[:2] for share in shares]
    assert share_videos(videos, 1) == [list(range(6))]
    assert share_videos(videos[:1], 3) == [[0], [], []]


def test_key_frames_and_partial_videos_are_recorded(clips: Path, tiny_tower: Path, tmp_path: Path) -> None:
    code, rows, _ = run(clips / "a.mp4", "--tower", tiny_tower, "--fps", 2, "--seek", "keyframe", "-o", tmp_path / "k")
    assert code == 0
    made = read_feature_cache(Path(rows[0]["path"])).provenance
    assert made["config"]["seek"] == "keyframe"
    assert rows[0]["time_error"] == made["facts"]["time_error"]
    assert rows[0]["time_error"]["max"] == 37 / 25, "one key frame, and the last sample is frame 37"
    cut = tmp_path / "cut.mkv"
    subprocess.run([FFMPEG, "-v", "error", "-i", clips / "a.mp4", "-c", "copy", cut], check=True)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2 + 1])
    assert run(cut, "--tower", tiny_tower, "-o", tmp_path / "c")[0] == 3
    code, rows, _ = run(cut, "--tower", tiny_tower, "--allow-partial", "-o", tmp_path / "c")
    assert (code, rows[0]["frames"] >= 1, rows[0]["partial"]) == (0, True, True)


def test_a_rate_is_bounded(clips: Path, tiny_tower: Path, tmp_path: Path) -> None:
    """Evenly spread frames where the rate gives more than --max-frames, also between --start and --end."""

    def numbers(*flags: object) -> list[int]:
        code, rows, said = run(clips / "a.mp4", "--tower", tiny_tower, *flags, "--force", "-o", tmp_path)
        assert code == 0, said
        planned = run(clips / "a.mp4", "--tower", tiny_tower, *flags, "--force", "-o", tmp_path, "--dry-run")[1]
        found: list[int] = read_feature_cache(Path(rows[0]["path"])).index.tolist()
        assert planned[0]["expected_frames"] == len(found)
        return found

    assert numbers("--fps", 5, "--max-frames", 4) == np.linspace(0, 49, 4, dtype=int).tolist()
    assert numbers("--fps", 5, "--max-frames", 10) == list(range(0, 50, 5))
    part = ("--start", 0.4, "--end", 1.2)
    assert numbers("--fps", 5, "--max-frames", 3, *part) == np.linspace(10, 29, 3, dtype=int).tolist()
    assert numbers("--fps", 5, *part) == [10, 15, 20, 25]
    for flags in (
        ("--frames", 3, "--max-frames", 2),
        ("--fps", "native", "--max-frames", 2),
        ("--start", 1, "--end", 1),
    ):
        assert run(clips / "a.mp4", "--tower", tiny_tower, *flags, "-o", tmp_path)[0] == 2
    assert run(clips / "a.mp4", "--tower", tiny_tower, "--start", 5, "-o", tmp_path)[0] == 3


def test_contact_sheets(clips: Path, tiny_tower: Path, tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    shutil.copy(clips / "a.mp4", video)
    _, rows, _ = run(video, "--tower", tiny_tower, "--fps", 5, "-o", tmp_path / "f")
    artifact, sheet = rows[0]["path"], tmp_path / "sheet.png"

    def draw(*more: object) -> Any:
        return CliRunner().invoke(app, ["info", artifact, "--json", "--contact-sheet", str(sheet), *map(str, more)])

    done = draw()
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["shown"], said["frames"], said["video"]) == (10, 10, str(video))
    with Image.open(sheet) as image:
        columns, rows_down = 8, 2
        assert image.size == (columns * 192, rows_down * (107 + 14))
        shown = np.asarray(image.convert("RGB")).astype(int)
    frames = list(read_video(video, VideoSampling(fps=5.0)))
    for i, frame in enumerate(frames):
        x, y = i % 8 * 192, i // 8 * 121
        expected = np.asarray(Image.fromarray(frame.image).resize((192, 107))).astype(int)
        assert (shown[y : y + 107, x : x + 192] == expected).all(), i
        assert (shown[y + 107 : y + 121, x : x + 192] < 128).any(), "its time below it"
    video.rename(tmp_path / "moved.mp4")
    gone = draw()
    assert gone.exit_code == 3
    assert "its video is missing" in gone.stderr
    assert draw("--video", tmp_path / "moved.mp4").exit_code == 0
    other = draw("--video", clips / "b.mp4")
    assert other.exit_code == 3
    assert "not the video" in other.stderr


MADE = Provenance(schema=schemas.FRAMES, command="encode-video", config={"fps": 1.0}, inputs={})


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "x.frames.safetensors"
    with pytest.raises(RuntimeError), open_frames(target, MADE, {}) as writer:  # noqa: PT012 (the writer must be open)
        writer.append(torch.zeros(2, 4, 8), [0.0, 1.0], [0, 1])
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_artifacts_read_back(tmp_path: Path) -> None:
    target = tmp_path / "x.frames.safetensors"
    features = torch.randn(3, 4, 8).bfloat16()
    write_frames(target, features, [0.1, 0.2, 3600.0], [0, 5, 2**40], MADE)
    frames = read_feature_cache(target)
    assert torch.equal(frames.features, features)
    assert frames.pts.tolist() == [0.1, 0.2, 3600.0]
    assert frames.index.tolist() == [0, 5, 2**40]
    raw = target.read_bytes()
    write_frames(target, features, [0.1, 0.2, 3600.0], [0, 5, 2**40], MADE)
    assert target.read_bytes() == raw
    target.write_bytes(raw[:-1])
    with refused(InputError, target.name):
        read_feature_cache(target)


def test_errors_of_earlier_videos_are_not_kept(
    clips: Path, tiny_tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would keep its traceback's frames, and the list of videos may have no end."""
    alive: list[int] = []

    def fail_all(self: VideoEncoder, videos: Any, *args: Any, **options: Any) -> Any:
        errors = []
        for video, row in videos:
            error = InputError("damaged", where=video)
            errors.append(weakref.ref(error))
            yield video, row, error
            del error
            alive.append(sum(error() is not None for error in errors))

    monkeypatch.setattr(VideoEncoder, "encode_all", fail_all)
    assert run(*[clips / "text.mp4"] * 20, "--tower", tiny_tower, "-o", tmp_path)[0] == 3
    assert len(alive) == 20
    assert max(alive) <= 2


@pytest.mark.slow
def test_a_killed_run_is_redone_to_the_same_bytes(clips: Path, tiny_tower: Path, tmp_path: Path) -> None:
    longer = tmp_path / "long.mp4"
    source = ["-f", "lavfi", "-i", "testsrc2=s=90x50:r=25:d=120", "-c:v", "libx264", "-preset", "ultrafast"]
    subprocess.run([FFMPEG, "-v", "error", *source, longer], check=True)
    command = [sys.executable, "-m", "lvctx", "encode-video", longer, "--tower", tiny_tower, "--fps", "native"]
    out, partial = tmp_path / "out", tmp_path / "out" / ".long.frames.safetensors.partial"
    for kill, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        running = subprocess.Popen([*command, "-o", out], stderr=subprocess.PIPE, text=True)
        while not (partial.exists() and partial.stat().st_size > 200_000) and running.poll() is None:
            time.sleep(0.005)
        running.send_signal(kill)
        _, said = running.communicate(timeout=120)
        assert running.returncode == code, said
        assert "Traceback" not in said
        assert not (out / "long.frames.safetensors").exists()
        assert partial.exists() == (kill == signal.SIGKILL)
        partial.unlink(missing_ok=True)  # the next round waits for its own
    partial.write_bytes(b"left by a killed run")
    code, rows, _ = run(*command[4:], "-o", out)
    assert code == 0
    assert os.listdir(out) == ["long.frames.safetensors"]
    shutil.rmtree(out)
    assert run(*command[4:], "-o", out)[1] == rows
