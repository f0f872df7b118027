"""Draw conversations about many separate images, for the language model of the nano Qwen2-VL (`lvctx mrope-extend`).

Images come a few at a time, and after them a question: what color is the shape in one of those shown so far? Every
shape is shown once and asked about once, so a conversation holds twelve questions, the first about a few images and
the last about all. In `short.jsonl` nearly every image shows a shape; in `long.jsonl` most show none, and half of
its conversations show all images before the first question. In `shortest.jsonl`, too, half do; it has six shapes and
six questions, and no position above 255. Images are 4, 9 or 16 visual tokens. A conversation fills a row of its own:
two do not fit.

    python recipes/nano/giraffe_data.py runs/giraffe/chat --photos .cache/nano/photos .cache/nano/clips/bigbuckbunny.mp4
"""

import argparse
import json
import time
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from draw_data import COLOR_NAMES, QUESTION
from photos import load_photos
from PIL import Image

from lvctx.video.drawn_images import SHAPES, draw_grids

LARGE = 96
COST = {48: 6, 72: 11, 96: 18}
"""Side of an image, pixels -> its tokens, with the delimiters."""
BUDGET = {"short": (90, 300), "long": (260, 620), "shortest": (72, 120)}
"""Least and most tokens of a conversation's images."""
QUESTIONS = {"short": len(SHAPES), "long": len(SHAPES), "shortest": 6}
"""Shapes of a conversation."""

Job = tuple[str, int, int, Path, tuple[Path, ...]]


def choose_sizes(rng: np.random.Generator, kind: str) -> list[int]:
    """Sides of a conversation's images: half are small throughout, others of one size, or one in four is large."""
    style = rng.random()
    if style < 0.5:
        pattern = [48]
    elif style < 0.75:
        pattern = [int(rng.choice([72, 96]))]
    else:
        pattern = [96, 48, 48, 48]
    budget = rng.uniform(*BUDGET[kind])
    sizes: list[int] = []
    while sum(COST[size] for size in sizes) < budget or len(sizes) < QUESTIONS[kind]:
        sizes.append(pattern[len(sizes) % len(pattern)])
    return sizes


def reveal(rng: np.random.Generator, places: list[int], count: int, at_once: bool) -> list[tuple[int, int]]:
    """(images shown by then, place asked about) of each question; `places` are those of the shapes."""
    turns, waiting, shown = [], set(places), count if at_once else 0
    while waiting:
        if not at_once:
            shown = min(count, max(shown + int(rng.integers(0, 4)), min(waiting) + 1))
        place = int(rng.choice(sorted(p for p in waiting if p < shown)))
        waiting.remove(place)
        turns.append((shown, place))
    return turns


def draw_sample(job: Job) -> dict[str, Any]:
    """Draw a conversation's images, write them, and return its record."""
    kind, index, seed, out, clips = job
    rng = np.random.default_rng([seed, list(BUDGET).index(kind), index])
    sizes = choose_sizes(rng, kind)
    places = rng.choice(len(sizes), QUESTIONS[kind], replace=False).tolist()
    shapes = rng.permutation(len(SHAPES))[: len(places)].tolist()
    cells = {
        place: (SHAPES[shape], COLOR_NAMES[int(rng.integers(len(COLOR_NAMES)))])
        for place, shape in zip(places, shapes, strict=True)
    }
    strip = draw_grids(rng, size=LARGE, cols=len(sizes), rows=1, cells=cells, photos=load_photos(clips))
    names = []
    for i, size in enumerate(sizes):
        image = strip.crop((i * LARGE, 0, (i + 1) * LARGE, LARGE))
        names.append(f"images/{kind}-{index:04}-{i:03}.png")
        image.resize((size, size), Image.Resampling.BICUBIC).save(out / names[-1], compress_level=1)
    conversations, before = [], 0
    for shown, place in reveal(rng, places, len(sizes), kind != "short" and rng.random() < 0.5):
        shape, color = cells[place]
        marks = "<image>" * (shown - before)
        conversations += [
            {"from": "human", "value": marks + QUESTION.format(shape=shape)},
            {"from": "gpt", "value": color},
        ]
        before = shown
    return {"id": f"{kind}-{index}", "images": names[:before], "conversations": conversations}


def main() -> None:
    """Draw a file of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--short", type=int, default=160, help="conversations")
    parser.add_argument("--long", type=int, default=200, help="conversations")
    parser.add_argument("--shortest", type=int, default=0, help="conversations")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="images, folders, clips to cut images from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with Pool(args.workers) as pool:
        for kind in BUDGET:
            count = getattr(args, kind)
            jobs = [(kind, i, args.seed, args.output, tuple(args.photos)) for i in range(count)]
            records = pool.map(draw_sample, jobs, chunksize=8)
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (args.output / f"{kind}.jsonl").write_text(lines)
            print(
                f"{kind}: {sum(len(r['images']) for r in records)} images, {time.monotonic() - start:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
