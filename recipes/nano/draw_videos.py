"""Draw a benchmark of video questions for the nano models, and count right answers for each number of frames.

    python recipes/nano/draw_videos.py OUT --videos 24          # OUT/0-000.mp4, ..., OUT/questions.jsonl
    lvctx vqa - --model VLM --frames 8 < OUT/questions.jsonl > OUT/8.jsonl
    python recipes/nano/draw_videos.py OUT --score OUT/*.jsonl

A video has 384 drawn frames of `lvctx niah haystack`, one per second; an image with a shape is on display for 6, 24 and
96 of them in turn, at a random place. The question is its colour (ten colours, chance .10). With few sampled frames the
image may not be among them, which limits what a model can answer; the number of videos that have it is printed too.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import av
import numpy as np

from lvctx.artifacts.store import atomic_file
from lvctx.eval.statistics import wilson_interval
from lvctx.video.drawn_images import COLORS, SHAPES, draw_image
from lvctx.video.drawn_scenes import scene

QUESTION = "Find the image with the {shape}. What color is the {shape}?"
SECONDS, SHOWN = 384, (6, 24, 96)
SIDE = 120


def draw_video(folder: Path, number: int, seed: int) -> dict[str, object]:
    """Write a video unless it exists; returns its line of questions.jsonl."""
    rng = np.random.default_rng([seed, number])
    shape, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
    shown = SHOWN[number % len(SHOWN)]
    first = int(rng.integers(SECONDS - shown + 1))
    image = np.asarray(draw_image(rng, size=SIDE, shape=shape, color=color))
    scenes = chain.from_iterable(scene(seed + 1000 * number, i, SIDE) for i in count())
    path, question = folder / f"{seed}-{number:03}.mp4", QUESTION.format(shape=shape)
    row = {"path": str(path), "question": question, "expected": color, "first": first, "shown": shown}
    if path.exists():
        return row
    with atomic_file(path) as partial, av.open(f"file:{partial}", "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=1, options={"crf": "12", "threads": "1"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for second, frame in enumerate(islice(scenes, SECONDS)):
            pixels = image if first <= second < first + shown else frame
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return row


def tables(files: list[Path]) -> Iterator[str]:
    """A line for each file of answers, fewest frames first."""
    runs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    for rows in sorted(runs, key=lambda rows: rows[0]["frames"]):
        right = sum(row["answer"].lower().startswith(row["expected"]) for row in rows)
        sampled = sum(any(row["first"] <= t < row["first"] + row["shown"] for t in row["pts"]) for row in rows)
        low, high = wilson_interval(right / len(rows), len(rows))
        tokens = max(row["tokens"] for row in rows)
        count = f"{right:3} of {len(rows)} right ({low:.2f} to {high:.2f})"
        yield f"{rows[0]['frames']:4} frames, {tokens:6,} tokens: {count}, {sampled} have the image among their frames"


def main() -> None:
    """Draw the videos, or score answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score", type=Path, nargs="+", default=[], help="files of answers, instead of drawing")
    args = parser.parse_args()
    if args.score:
        print("\n".join(tables(args.score)))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [draw_video(args.output, number, args.seed) for number in range(args.videos)]
    (args.output / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
