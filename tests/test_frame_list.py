"""`--frames-from`: the frames that a file states for each video, in the readers, a benchmark and vqa."""

import json
import tempfile
from bisect import bisect_right
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import mrope_models
from test_benchmark_sets import FILES, draw
from test_decode import H264, VARIABLE, Make, make, times_of_ffmpeg
from test_questions import rows_of, run

from lvctx.errors import InputError, UsageError
from lvctx.video.decode_worker import DecodeRequest
from lvctx.video.frame_count import bounded, count_frames
from lvctx.video.frame_list import FrameList
from lvctx.video.packet_index import read_packets
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling

assert callable(make), "a fixture"
# The second has no index of packets, so that all of it is decoded.
VIDEOS: dict[str, list[object]] = {"constant.mp4": H264, "variable.mkv": [*VARIABLE, *H264], "late.avi": [*H264]}


def listed(folder: Path, *entries: dict[str, Any]) -> VideoSampling:
    file = folder / "chosen.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return VideoSampling(frames_from=FrameList.read(str(file)))


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_and_times_are_those_of_the_video(name: str, make: Make, tmp_path: Path) -> None:
    """Times are from the first frame, and take the frame on display: the last with pts <= first + time."""
    path = make(name, *VIDEOS[name])
    times = [pts - times_of_ffmpeg(path)[0] for pts in times_of_ffmpeg(path)]
    every = list(read_video(path, VideoSampling(fps="native")))
    wanted = [40, 3, 0, 41, 3]
    moments = [0.7, 0, float(times[20]), 0.31, 1.0]
    for unit, values, numbers in (
        ("frames", wanted, sorted(set(wanted))),
        ("times", moments, [bisect_right(times, Fraction(t).limit_denominator(10**6)) - 1 for t in sorted(moments)]),
    ):
        sampling = listed(tmp_path, {"video": f"folder/{name}", unit: values}, {"video": "other.mp4", "frames": [999]})
        taken = list(read_video(path, bounded(path, sampling)))
        assert [frame.index for frame in taken] == numbers
        assert all(np.array_equal(frame.image, every[frame.index].image) for frame in taken)
        assert count_frames(path, sampling).frames == len(numbers)
        request = DecodeRequest(path=str(path), sampling=sampling, threads=1, size=8, background=(0, 0, 0))
        sent = DecodeRequest.from_json(request.to_json().encode())
        assert sent.sampling.frames_from is not None
        assert [entry.video for entry in sent.sampling.frames_from.chosen] == [f"folder/{name}"]
        assert [frame.index for frame in read_video(path, sent.sampling)] == numbers


def test_one_of_the_videos_is_decoded_as_a_whole(make: Make) -> None:
    planned = []
    for name, arguments in VIDEOS.items():
        index = read_packets(make(name, *arguments))
        planned.append(index is not None and index.seek_ranges([0]) is not None)
    assert len(set(planned)) == 2, planned


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_that_a_video_does_not_have_are_named(name: str, make: Make, tmp_path: Path) -> None:
    path = make(name, *VIDEOS[name])
    count = len(times_of_ffmpeg(path))
    for entry in ({"video": name, "frames": [count]}, {"video": name, "times": [1e4]}, {"video": "x", "frames": [0]}):
        sampling = listed(tmp_path, entry)
        for read in (count_frames, lambda *arguments: list(read_video(*arguments))):
            with pytest.raises(InputError) as refused:
                read(path, sampling)
            assert refused.value.where == path


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1]", '{"frames": [1]}', '{"video": "a"}', '{"video": "a", "frames": [1], "times": [1]}'),
        *('{"video": "a", "frames": []}', '{"video": "a", "frames": [-1]}', '{"video": "a", "frames": [0.5]}'),
        *('{"video": "a", "times": ["0"]}', '{"video": "a", "times": [NaN]}', '{"video": "a", "frames": [true]}'),
        *('{"video": "", "frames": [1]}', '{"video": "a", "frames": [1]}\n{"video": "b/a", "frames": [1]}'),
    ],
)
def test_files_that_state_no_frames_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "chosen.json").write_text(text)
    with pytest.raises(InputError) as refused:
        FrameList.read(str(tmp_path / "chosen.json"))
    assert str(refused.value.where).startswith(str(tmp_path / "chosen.json"))


def test_a_device_and_the_line_of_malformed_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        FrameList.read("/dev/zero")
    path = tmp_path / "chosen.jsonl"
    path.write_text('{"video": "a", "frames": [1]}\n{"video": "b", "frames": ' + "[" * 100_000)
    with pytest.raises(InputError) as refused:
        FrameList.read(str(path))
    assert refused.value.where == f"{path}:2"


@given(st.lists(st.integers(0, 50), min_size=1), st.lists(st.floats(0, 50), min_size=1))
def test_a_list_and_lines_are_the_same(frames: list[int], times: list[float]) -> None:
    """Also where a name has characters that end a line elsewhere than in JSON lines."""
    entries = [{"video": "a\u2028\x85.mp4", "frames": frames}, {"video": "b", "times": times}]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "list.json").write_text(json.dumps(entries))
        lines = "\r\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        (Path(folder) / "lines.jsonl").write_text(lines, encoding="utf-8", newline="")
        one, other = (FrameList.read(f"{folder}/{name}") for name in ("list.json", "lines.jsonl"))
    assert one.chosen == other.chosen
    assert (one.of(Path("c/a\u2028\x85.mkv")), one.of(Path("b.mp4"))) == one.chosen
    assert list(one.chosen[0].values) == sorted(set(frames))


@pytest.mark.parametrize(
    "other", [{"fps": 1.0}, {"frames": 4}, {"max_frames": 4}, {"start": 1.0}, {"end": 2.0}, {"seek": "keyframe"}]
)
def test_options_that_contradict_it(other: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        replace(listed(tmp_path, {"video": "a", "frames": [1]}), **other)


def test_rows_of_a_benchmark_and_of_vqa_have_the_chosen_frames(tmp_path: Path) -> None:
    vlm = mrope_models.save("qwen2_5_vl", tmp_path / "vlm")
    draw(tmp_path / "videos" / "lv_red.mp4")
    draw(tmp_path / "videos" / "lv_blue.mp4")
    chosen = tmp_path / "chosen.jsonl"
    chosen.write_text('{"video": "lv_red.mp4", "frames": [7, 1, 2, 4]}\n')
    inputs = ["--model", vlm, "--videos", tmp_path / "videos", "--questions", FILES["lvbench"]]
    flags = [*inputs, "--max-new-tokens", 1, "--frames-from", chosen, "-o", tmp_path / "out"]
    done = run("bench", "lvbench", "run", *flags, "--protocol", "internvl3")
    assert done.exit_code == 2, "no such protocol for it"
    done = run("bench", "lvbench", "run", *flags)
    assert done.exit_code == 4, done.output
    rows = rows_of(done)
    assert [row["frame_times"] for row in rows[:2]] == [[0.25, 0.5, 1.0, 1.75]] * 2
    assert rows[0]["made_of"]["sampling"]["frames_from"] == FrameList.read(str(chosen)).digest
    assert "error" in rows[2], "no entry for the other video"
    asked = ["vqa", tmp_path / "videos" / "lv_red.mp4", "--model", vlm, "--ask", "?", "--max-new-tokens", 1]
    assert rows_of(run(*asked, "--frames-from", chosen))[0]["pts"] == [0.25, 0.5, 1.0, 1.75]
    assert run(*asked, "--frames-from", chosen, "--fps", 1).exit_code == 2
    assert run(*asked, "--frames-from", tmp_path / "gone").exit_code == 3
