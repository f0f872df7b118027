"""Which files are read as videos: complete, truncated and damaged ones, any file name, other kinds of files."""

import json
import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
from fuzz.driver import damage_video
from PIL import Image
from support.refusals import refused
from typer.testing import CliRunner

from lvctx.artifacts.sniff import sniff
from lvctx.cli.app import app
from lvctx.errors import InputError
from lvctx.video import container
from lvctx.video import segment_decoder as planned
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
H264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "12"]
WAYS: dict[str, list[str]] = {
    "fast.mp4": [*H264, "-movflags", "+faststart"],
    "late.mp4": H264,
    "pieces.mp4": [*H264, "-movflags", "frag_keyframe+empty_moov+default_base_moof"],
    "plain.mkv": H264,
    "plain.avi": ["-c:v", "mpeg4", "-g", "12"],
    "titled.avi": ["-c:v", "mpeg4", "-metadata", "title=A caf?"],
    "plain.ts": H264,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Two seconds at 25 frames a second in every container."""
    folder = tmp_path_factory.mktemp("files")
    for name, how in WAYS.items():
        source = ["-f", "lavfi", "-i", "testsrc2=s=64x48:r=25:d=2"]
        subprocess.run([FFMPEG, "-v", "error", *source, *how, folder / name], check=True)
    return {name: (folder / name).read_bytes() for name in WAYS}


def frames_of_ffmpeg(path: Path) -> int:
    command = [FFMPEG, "-v", "quiet", "-i", f"file:{path}", "-fps_mode", "passthrough", "-f", "framehash", "-"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return sum(not line.startswith("#") for line in lines)


def put(raw: bytes, at: int, value: bytes) -> bytes:
    return raw[:at] + value + raw[at + len(value) :]


def resized(raw: bytes, change: Callable[[int], int]) -> bytes:
    """An AVI whose RIFF chunk states another size."""
    return put(raw, 4, struct.pack("<I", change(len(raw) - 8)))


def resized_segment(raw: bytes, change: Callable[[int], int]) -> bytes:
    """A Matroska file whose segment states another size; FFmpeg writes it in eight bytes."""
    at = raw.index(b"\x18S\x80g") + 4
    assert raw[at] == 1
    return put(raw, at + 1, change(int.from_bytes(raw[at + 1 : at + 8], "big")).to_bytes(7, "big"))


WHOLE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "an ID3 tag": ("fast.mp4", lambda b: b + b"TAG" + b"a tag of a player".ljust(125, b"\0")),
    "a camera's trailer": ("fast.mp4", lambda b: b + bytes(range(7, 87)) + struct.pack("<II", 80, 3) + b"8db42d69" * 4),
    "zeros": ("fast.mp4", lambda b: b + bytes(4096)),
    "a few zeros": ("late.mp4", lambda b: b + bytes(5)),
    "newlines": ("late.mp4", lambda b: b + b"\n\n\n"),
    "text": ("pieces.mp4", lambda b: b + b"<!-- end of file, with thanks -->"),
    "a cut free box": ("fast.mp4", lambda b: b + struct.pack(">I", 500) + b"free" + bytes(100)),
    "mdat to the end of the file": ("fast.mp4", lambda b: put(b, b.index(b"mdat") - 4, bytes(4))),
    "a title in Latin-1": ("titled.avi", lambda b: b.replace(b"A caf?", b"A caf\xe9")),
    "RIFF with its header": ("plain.avi", lambda b: resized(b, lambda n: n + 8)),
    "RIFF with a list's header": ("plain.avi", lambda b: resized(b, lambda n: n + 12)),
    "RIFF of size 0": ("plain.avi", lambda b: resized(b, lambda n: 0)),
    "RIFF of unknown size": ("plain.avi", lambda b: resized(b, lambda n: 0xFFFFFFFF)),
    "RIFF too short": ("plain.avi", lambda b: resized(b, lambda n: n - 8)),
    "zeros after RIFF": ("plain.avi", lambda b: b + bytes(333)),
    "a partial packet more": ("plain.ts", lambda b: b + b[188:288]),
    "a partial packet at last": ("plain.ts", lambda b: b[:-50]),
    "a segment of unknown size": ("plain.mkv", lambda b: resized_segment(b, lambda n: (1 << 56) - 1)),
    "a segment that is too long": ("plain.mkv", lambda b: resized_segment(b, lambda n: n + 12)),
    "a segment that is too short": ("plain.mkv", lambda b: resized_segment(b, lambda n: n - 3)),
    "zeros after a segment": ("plain.mkv", lambda b: b + bytes(50)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_are_read_as_ffmpeg_does(name: str, files: dict[str, bytes], tmp_path: Path) -> None:
    source, change = WHOLE[name]
    path = tmp_path / source
    path.write_bytes(change(files[source]))
    reader = read_video(path, VideoSampling(fps="native"))
    assert len(list(reader)) == frames_of_ffmpeg(path) >= 48
    assert "partial" not in reader.facts


CUT: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "mdat ends beyond the file": ("fast.mp4", lambda b: b[: len(b) * 6 // 10]),
    "mdat lacks a byte": ("fast.mp4", lambda b: b[:-1]),
    "no moov": ("late.mp4", lambda b: b[: len(b) * 6 // 10]),
    "no moov after a whole mdat": ("late.mp4", lambda b: b[: b.index(b"moov") - 4]),
    "a cut moov": ("late.mp4", lambda b: b[: b.index(b"moov") + 200]),
    "a moov alone": ("fast.mp4", lambda b: b[: b.index(b"mdat") - 4]),
    "a cut fragment": ("pieces.mp4", lambda b: b[: len(b) * 6 // 10]),
    "a fragment without data": ("pieces.mp4", lambda b: b[: b.rindex(b"mdat") - 4]),
    "a cut cluster": ("plain.mkv", lambda b: b[: len(b) * 6 // 10]),
    "a cut segment": ("plain.mkv", lambda b: b[:-1]),
    "no cues": ("plain.mkv", lambda b: b[: b.rindex(b"\x1cS\xbbk")]),
    "a cut movi": ("plain.avi", lambda b: b[: len(b) * 6 // 10]),
    "a cut movi of unknown RIFF size": ("plain.avi", lambda b: resized(b, lambda n: 0)[: len(b) * 6 // 10]),
    "a cut index": ("plain.avi", lambda b: b[:-200]),
}


@pytest.mark.parametrize("name", CUT)
def test_cut_files_are_refused(name: str, files: dict[str, bytes], tmp_path: Path) -> None:
    source, change = CUT[name]
    path = tmp_path / source
    path.write_bytes(change(files[source]))
    with pytest.raises(InputError, match="cut short") as e:
        list(read_video(path, VideoSampling(frames=4)))
    assert ("--allow-partial" in str(e.value)) == ("moov" not in name), "only where something can be read"
    assert "encode-video" not in str(e.value)


def test_a_header_that_ends_beyond_any_file_is_refused(tmp_path: Path) -> None:
    """File systems have a largest offset (ext4: 16 TiB); to go beyond is an error."""
    path = tmp_path / "long.mkv"
    path.write_bytes(b"\x1aE\xdf\xa3\x01" + b"\xff" * 6 + bytes(100))
    with pytest.raises(InputError) as e:
        list(read_video(path, VideoSampling(frames=1)))
    assert e.value.where == path


NAMES = (
    *("2024-05-01T10:30:22.mp4", "10:30:22.mp4", "concat:a.mp4", "data:x.mp4", "pipe:", "subfile,,start,0.mp4", "fd:"),
    *(
        "-a.mp4",
        "a%d.mp4",
        "a%03d.png",
        "http:x.mp4",
        "file:a.mp4",
        "a*.jpg",
        " a b'\"\n.mp4",
        "ä日.mp4",
        b"caf\xe9.mp4",
    ),
)


@pytest.mark.parametrize("name", NAMES)
def test_any_file_name(
    name: str | bytes, files: dict[str, bytes], tiny_tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(os.fsdecode(name))
    path.write_bytes(files["fast.mp4"])
    assert len(list(read_video(path, VideoSampling(frames=3)))) == 3
    if name in ("10:30:22.mp4", "-a.mp4", b"caf\xe9.mp4"):
        flags = ["encode-video", "--tower", str(tiny_tower), "--frames", "2", "-o", "out", "--", str(path)]
        done = CliRunner().invoke(app, flags)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["video"] == str(path)


def test_decord_takes_any_name(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("decord")
    monkeypatch.chdir(tmp_path)
    Path("10:30:22.mp4").write_bytes(files["fast.mp4"])
    assert len(list(read_video(Path("10:30:22.mp4"), VideoSampling(frames=3, decoder="decord")))) == 3


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{other}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{other}'\n",
        "ID3\x04\x00\x00\x00\x00\x00\x00#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{other}\n#EXT-X-ENDLIST\n",
        "<MPD profiles='urn:mpeg:dash:profile:isoff-on-demand:2011'><BaseURL>{other}</BaseURL></MPD>",
    ],
)
def test_a_playlist_opens_no_other_file(text: str, files: dict[str, bytes], tmp_path: Path) -> None:
    """FFmpeg itself would read the other file: a local playlist may name local files."""
    (tmp_path / "other.ts").write_bytes(files["plain.ts"])
    path = tmp_path / "list.mp4"
    path.write_text(text.format(other="other.ts"))
    with pytest.raises(InputError, match="not a video") as e:
        list(read_video(path, VideoSampling(frames=2)))
    assert text.startswith("ID3") or "playlist" in str(e.value)


def other_files(folder: Path) -> dict[str, Path]:
    """Files and folders that are no videos, by what an error calls them."""
    files = {
        "text": b"I am a video.\n",
        "an HTML page": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n",
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "JSON text": b'[{"video": "a.mp4"}]',
        "a safetensors file": struct.pack("<Q", 2) + b"{}",
    }
    found = {}
    for number, (what, content) in enumerate(files.items()):
        found[what] = folder / f"{number}.mp4"
        found[what].write_bytes(content)
    found["an image (JPEG)"] = folder / "image.mp4"
    Image.new("RGB", (8, 8)).save(found["an image (JPEG)"], "jpeg")
    found["a model directory (llama)"] = folder / "model"
    found["a model directory (llama)"].mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    found["packed text"] = folder / "packed"
    found["packed text"].mkdir()
    (folder / "packed" / "MANIFEST.json").write_text('{"schema": "lvctx.packed/1"}')
    return found


def test_errors_name_what_was_given(
    files: dict[str, bytes], tiny_vlm: Path, tiny_tower: Path, tiny_lm: Path, tmp_path: Path
) -> None:
    """Each command that wants one kind of file is given the others: exit 3, one line that says what it is."""
    video = tmp_path / "video one.mp4"
    video.write_bytes(files["fast.mp4"])

    def refused(*command: object) -> str:
        done = CliRunner().invoke(app, [str(part) for part in command])
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("lvctx: ")]
        assert done.exit_code == 3, line
        assert "write it again" not in line
        return line

    def asked(path: Path) -> tuple[object, ...]:
        return "vqa", path, "--model", tiny_vlm, "--feature-cache", tmp_path / "cache", "--ask", "What?"

    done = CliRunner().invoke(app, [*map(str, asked(video))])
    assert (done.exit_code, json.loads(done.stdout)["frames"]) == (0, 2)
    niah = ("niah", "video", "--model", tiny_vlm, "--lengths", 2, "--depths", 0, "-o", tmp_path / "n", "--haystack")
    kept = ("--feature-cache", tmp_path / "features")
    assert CliRunner().invoke(app, [*map(str, (*niah, video, *kept))]).exit_code == 0
    assert [path.name for path in kept[1].glob("*.safetensors")] == [f"{video.stem}.frames.safetensors"]
    assert "a video" in refused("info", video)
    encode = ("encode-video", "-o", tmp_path / "f", "--tower")
    assert "a video (MP4 or QuickTime), not a model directory" in refused(*encode, video, video)
    extend = ("extend-lm", "--model", tiny_lm, "--context", 1024, "--steps", 1, "-o", tmp_path / "e", "--data")
    assert "a video (MP4 or QuickTime), not packed text; run lvctx pack-text" in refused(*extend, video)
    done = CliRunner().invoke(app, [*map(str, encode), str(tiny_tower), "--frames", "2", str(video)])
    frames = json.loads(done.stdout)["path"]
    assert "a frames artifact (of lvctx encode-video), not a video" in refused(*encode, tiny_tower, frames)
    for what, path in other_files(tmp_path).items():
        assert what in refused(*encode, tiny_tower, path)
        assert what in refused(*asked(path))
        if what != "a model directory (llama)":
            assert what in refused(*encode, path, video)
        if what != "packed text":
            assert what in refused(*extend, path)
            assert what in sniff(path).phrase


@pytest.mark.parametrize(
    "command",
    [
        "encode-video",
        "vqa",
        "niah video",
        "niah haystack",
        "videomme run",
        "bench mlvu run",
        "pack-chat",
        "mrope-extend",
    ],
)
def test_partial_videos_are_allowed_everywhere(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "400", "NO_COLOR": "1"}).output
    assert "--allow-partial" in shown
    assert "Use what can be decoded of truncated or damaged" in shown


def test_any_error_of_a_decoder_is_the_videos(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(files["fast.mp4"])
    for error in (OSError(95, "Operation not supported"), MemoryError(), ValueError("odd"), IndexError("list index")):

        def fail(*args: object, error: Exception = error) -> Any:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(planned.RgbConverter, "rgb", fail)
            with pytest.raises(InputError, match=rf"(cannot be decoded|out of memory) \({type(error).__name__}") as e:
                list(read_video(path, VideoSampling(frames=2)))
            assert e.value.where == path
        with monkeypatch.context() as patched:
            patched.setattr(container.av, "open", fail)
            with pytest.raises(InputError):
                list(read_video(path, VideoSampling(frames=2)))


def test_damaged_videos_cost_themselves(files: dict[str, bytes], tiny_tower: Path, tmp_path: Path) -> None:
    rng = random.Random(17)
    folder = tmp_path / "mutants"
    folder.mkdir()
    for number in range(200):
        name = rng.choice(list(files))
        (folder / f"{number:03}{Path(name).suffix}").write_bytes(damage_video(files[name], rng))
    videos = sorted(map(str, folder.iterdir()))
    flags = ["--tower", str(tiny_tower), "--frames", "3", "-o", str(tmp_path / "out"), "-"]
    done = CliRunner().invoke(app, ["encode-video", *flags], input="\n".join(videos))
    assert done.exit_code == 4, done.output[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["path"] if "error" in row else row["video"] for row in rows] == videos
    assert 20 < sum("error" in row for row in rows) < 180
    assert all("\n" not in row["error"] for row in rows if "error" in row)
    assert all(row["frames"] == 3 for row in rows if "error" not in row)


def test_frames_that_are_too_large_are_refused(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.mp4"
    path.write_bytes(files["fast.mp4"])
    monkeypatch.setattr(container, "MAX_PIXELS", 64 * 48 - 1)
    with refused(InputError, "large.mp4"):
        list(read_video(path, VideoSampling(frames=1)))
