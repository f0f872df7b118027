"""Time from a video file to its sampled frames as RGB: ours against other readers, in turns in one run.

    python benchmarks/decode.py VIDEO --fps 1 [--repeat 3] [--cores 2] [--check]
    python benchmarks/decode.py VIDEO --frames 128
    python benchmarks/decode.py VIDEO --fps native

The others are PyAV alone (decodes everything, or seeks where wanted frames are more than ten seconds apart), decord's
`get_batch`, torchcodec with both of its seek modes where it can be imported, and the ffmpeg program of imageio-ffmpeg
(one process, or one with `-ss` for each of such distant frames). `limit` decodes every packet and converts nothing:
what no reader that decodes everything can beat. All are confined to `--cores` cores and get as many threads. Medians of
wall-clock seconds and of processor seconds, those of child processes included; on a busy machine the latter say more.
`speed` is the time of the fastest of the others over ours, in the same run: 1 is as fast, less is slower.

`--check` reads once with every reader and states the largest mean difference of a frame's pixels from ours (of 255).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import decord
import imageio_ffmpeg
import numpy as np

from lvctx.video.frame_selection import frame_numbers
from lvctx.video.packet_index import PacketIndex, read_packets
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling

CHUNK = 32
"""Frames of one call of a reader that takes several: all at once would hold them all."""
FAR = 10
"""Seconds between wanted frames from which a user of PyAV or ffmpeg would seek."""
Images = Iterator[np.ndarray]
"""uint8 (H, W, 3)."""


def limit(video: Path, threads: int) -> Images:
    """Decode everything, give nothing."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        for _ in container.decode(stream):
            pass
    yield from ()


def with_pyav(video: Path, index: PacketIndex, wanted: list[int], threads: int) -> Images:
    """PyAV as its documentation shows it."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        due = [int(index.pts_N[index.packet_F[n]]) for n in wanted]
        far = is_far(index, wanted)
        frames = container.decode(stream)
        for tick in due:
            if far:
                container.seek(tick, stream=stream)
                frames = container.decode(stream)
            yield next(frame for frame in frames if frame.pts == tick).to_ndarray(format="rgb24")


def with_decord(video: Path, wanted: list[int], threads: int) -> Images:
    """decord."""
    reader = decord.VideoReader(str(video), ctx=decord.cpu(0), num_threads=threads)
    for i in range(0, len(wanted), CHUNK):
        yield from reader.get_batch(wanted[i : i + CHUNK]).asnumpy()


def with_torchcodec(video: Path, wanted: list[int], threads: int, mode: str) -> Images:
    """torchcodec; `approximate` does not read the packets first, and is right where the rate is constant."""
    from torchcodec.decoders import VideoDecoder

    reader = VideoDecoder(str(video), num_ffmpeg_threads=threads, seek_mode=mode, dimension_order="NHWC")
    for i in range(0, len(wanted), CHUNK):
        yield from reader.get_frames_at(wanted[i : i + CHUNK]).data.numpy()


def with_program(video: Path, index: PacketIndex, wanted: list[int], threads: int, size: tuple[int, int]) -> Images:
    """The ffmpeg program, through a pipe."""
    head = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-threads", str(threads)]
    tail = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    if is_far(index, wanted):
        half = float(index.time(1) - index.time(0)) / 2  # before the frame, so that rounding does not skip it
        seconds = [max(0.0, float(index.time(n) - index.time(0)) - half) for n in wanted]
        for second in seconds:
            yield from piped([*head, "-ss", f"{second:.6f}", "-i", str(video), "-frames:v", "1", *tail], size)
        return
    rate = len(index) // len(wanted)
    chosen = [] if rate == 1 else ["-vf", f"select=not(mod(n\\,{rate}))"]
    yield from piped([*head, "-i", str(video), *chosen, "-fps_mode", "passthrough", *tail], size)


def piped(command: list[str], size: tuple[int, int]) -> Images:
    """The images that a command writes to stdout."""
    height, width = size
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while len(data := process.stdout.read(height * width * 3)) == height * width * 3:
            yield np.frombuffer(data, np.uint8).reshape(height, width, 3)


def is_far(index: PacketIndex, wanted: list[int]) -> bool:
    """Whether seeking is what a user would do."""
    return len(wanted) > 1 and float(index.time(wanted[1]) - index.time(wanted[0])) > FAR


def median_times(readers: dict[str, Callable[[], Images]], repeat: int) -> dict[str, dict[str, float]]:
    """Run each in turn, `repeat` times over; name -> median wall and processor seconds."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for _ in range(repeat):
        for name, read in readers.items():
            began, worked = time.perf_counter(), processor_seconds()
            for _image in read():
                pass
            seconds[name].append((time.perf_counter() - began, processor_seconds() - worked))
    return {
        name: {kind: round(statistics.median(t[i] for t in of), 2) for i, kind in enumerate(("wall", "cpu"))}
        for name, of in seconds.items()
    }


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def differences(readers: dict[str, Callable[[], Images]]) -> dict[str, Any]:
    """Reader -> largest mean difference of a frame from ours, or what is wrong with their number."""
    found: dict[str, Any] = {}
    for name, read in readers.items():
        if name not in ("ours", "limit"):
            pairs = zip(readers["ours"](), read(), strict=True)
            try:
                means = [float(np.abs(a.astype(np.int16) - b).mean()) for a, b in pairs]
                found[name] = round(max(means), 3)
            except ValueError as e:  # of zip
                found[name] = str(e)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--fps", type=lambda text: text if text == "native" else float(text))
    parser.add_argument("--frames", type=int)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--no-limit", action="store_true", help="leave out the decode of everything")
    parser.add_argument("--check", action="store_true")
    a = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: a.cores])
    index = read_packets(a.video)
    assert index is not None
    sampling = VideoSampling(fps=a.fps, frames=a.frames)
    wanted = frame_numbers(index, sampling, a.video)
    size = next(read_video(a.video, sampling)).image.shape[:2]
    readers: dict[str, Callable[[], Images]] = {
        "ours": lambda: (frame.image for frame in read_video(a.video, sampling, threads=a.cores)),
        "pyav": partial(with_pyav, a.video, index, wanted, a.cores),
        "decord": partial(with_decord, a.video, wanted, a.cores),
        "ffmpeg": partial(with_program, a.video, index, wanted, a.cores, size),
    }
    try:
        import torchcodec  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # without FFmpeg's libraries
        pass
    else:
        for mode in ("exact", "approximate"):
            readers[f"torchcodec-{mode}"] = partial(with_torchcodec, a.video, wanted, a.cores, mode)
    facts = {"video": a.video.name, "bytes": a.video.stat().st_size, "source_frames": len(index), "frames": len(wanted)}
    if a.check:
        print(json.dumps({**facts, "differences": differences(readers)}))
        return
    others = [name for name in readers if name != "ours"]
    if not a.no_limit:
        readers["limit"] = partial(limit, a.video, a.cores)
    times = median_times(readers, a.repeat)
    speed = {}
    for kind in ("wall", "cpu"):
        best = min(others, key=lambda name: times[name][kind])
        speed[kind] = {"best": best, "speed": round(times[best][kind] / times["ours"][kind], 3)}
    print(json.dumps({**facts, "cores": a.cores, "repeat": a.repeat, **times, **speed}))


if __name__ == "__main__":
    main()
