"""Time from a video file to its sampled frames: ours, decord's `get_batch`, and the limit, in turns in one run.

    python benchmarks/decode.py VIDEO --fps 1 [--repeat 3] [--threads 2]
    python benchmarks/decode.py VIDEO --frames 128

`limit` decodes every packet of the video and converts nothing: what no reader that decodes everything can beat. Medians
of wall-clock seconds and of processor seconds; on a busy machine the latter say more. Both readers get the same frames.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import av
import decord

from lvctx.video.frame_selection import frame_numbers
from lvctx.video.packet_index import read_packets
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling

CHUNK = 32
"""Frames of one get_batch: all at once would hold them all."""


def limit(video: Path, threads: int) -> int:
    """Decode everything."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        return sum(1 for _ in container.decode(stream))


def with_decord(video: Path, wanted: list[int], threads: int) -> int:
    """Decode and convert the wanted frames."""
    reader = decord.VideoReader(str(video), ctx=decord.cpu(0), num_threads=threads)
    return sum(len(reader.get_batch(wanted[i : i + CHUNK]).asnumpy()) for i in range(0, len(wanted), CHUNK))


def median_times(runs: dict[str, Callable[[], int]], repeat: int) -> dict[str, dict[str, float]]:
    """Run each in turn, `repeat` times over; name -> median wall and processor seconds."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            began, worked = time.perf_counter(), time.process_time()
            run()
            seconds[name].append((time.perf_counter() - began, time.process_time() - worked))
    return {
        name: {kind: round(statistics.median(t[i] for t in of), 2) for i, kind in enumerate(("wall", "cpu"))}
        for name, of in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--fps", type=float)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-limit", action="store_true", help="leave out the decode of everything")
    a = parser.parse_args()
    index = read_packets(a.video)
    assert index is not None
    sampling = VideoSampling(fps=a.fps, frames=a.frames)
    wanted = frame_numbers(index, sampling, a.video)
    runs: dict[str, Callable[[], int]] = {
        "ours": lambda: sum(1 for _ in read_video(a.video, sampling, threads=a.threads)),
        "decord": lambda: with_decord(a.video, wanted, a.threads),
    }
    if not a.no_limit:
        runs["limit"] = lambda: limit(a.video, a.threads)
    times = median_times(runs, a.repeat)
    facts = {"video": a.video.name, "bytes": a.video.stat().st_size, "source_frames": len(index), "frames": len(wanted)}
    others = [name for name in times if name != "ours"]
    ratio = {f"{k}_to_{name}": round(times["ours"][k] / times[name][k], 3) for k in ("wall", "cpu") for name in others}
    print(json.dumps({**facts, "threads": a.threads, "repeat": a.repeat, **times, **ratio}))


if __name__ == "__main__":
    main()
