"""Time from a video file to its frames artifact, against decord alone reading the same frames: in turns in one run.

    python benchmarks/encode_video.py VIDEO --tower TOWER --fps 1 [--repeat 3]

Ours decodes in a process of its own, squares the images, runs the tower and writes the artifact; decord only reads.
Processor seconds count child processes too.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decord

from lvctx.device import resolve_device
from lvctx.video.frame_selection import frame_numbers
from lvctx.video.packet_index import read_packets
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.video_encoder import VideoEncoder

CHUNK = 32


def with_decord(video: Path, wanted: list[int]) -> int:
    """Decode and convert the wanted frames."""
    reader = decord.VideoReader(str(video), ctx=decord.cpu(0))
    return sum(len(reader.get_batch(wanted[i : i + CHUNK]).asnumpy()) for i in range(0, len(wanted), CHUNK))


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    kinds = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--tower", required=True)
    parser.add_argument("--fps", type=float)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeat", type=int, default=3)
    a = parser.parse_args()
    index = read_packets(a.video)
    assert index is not None
    sampling = VideoSampling(fps=a.fps, frames=a.frames)
    wanted = frame_numbers(index, sampling, a.video)
    row: dict[str, Any] = {}

    def ours() -> None:
        encoder = VideoEncoder.open(a.tower, sampling, batch=a.batch, device=resolve_device(a.device))
        with tempfile.TemporaryDirectory() as out:
            row.update(encoder.encode(a.video, Path(out)))
        encoder.close()

    runs: dict[str, Callable[[], Any]] = {"ours": ours, "decord": lambda: with_decord(a.video, wanted)}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(a.repeat):
        for name, run in runs.items():
            began, worked = time.perf_counter(), processor_seconds()
            run()
            seconds[name].append((time.perf_counter() - began, processor_seconds() - worked))
    wall, cpu = ({name: statistics.median(t[i] for t in of) for name, of in seconds.items()} for i in (0, 1))
    facts = {"video": a.video.name, "source_frames": len(index), "frames": len(wanted), "repeat": a.repeat}
    facts |= {"features": row["features_per_frame"], "width": row["width"]}
    for kind, of in (("wall", wall), ("cpu", cpu)):
        ratio = round(of["ours"] / of["decord"], 3)
        facts[kind] = {name: round(value, 2) for name, value in of.items()} | {"ratio": ratio}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
