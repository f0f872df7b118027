"""Draw the nano recipe's alignment data: images of many cells, and conversations about them in LLaVA's JSON.

    OUT/images/*.png      every image is (cols*S) x (rows*S) pixels, so UniRes cuts it into exactly cols*rows grids
    OUT/projector.json    few cells, most with a shape
    OUT/full.json         2 to 49 cells, log-uniform, most of them without a shape
    OUT/large.json        49 to 320 cells, likewise

Questions are about a shape's colour; where an image holds several shapes, some are asked about and the others only
distract. Cells without a shape are drawn clutter, or crops of photos (images, and single frames of clips, in no
order). The clip that a needle test uses as its haystack must not be among them.

    python recipes/nano/draw_data.py runs/nano/shapes --photos .cache/nano/photos .cache/nano/clips/bigbuckbunny.mp4
"""

import argparse
import json
import math
import os
import time
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from photos import load_photos

from lvctx.video.drawn_images import COLORS, SHAPES, draw_grids

COLOR_NAMES = list(COLORS)
QUESTION = "Find the image with the {shape}. What color is the {shape}?"
GRIDS = {"projector": (2, 4), "full": (2, 49), "large": (49, 320)}


def choose_grid(rng: np.random.Generator, low: int, high: int) -> tuple[int, int]:
    """(cols, rows): their product log-uniform in low..high, the aspect at most four to one where it can be."""
    wanted = math.exp(rng.uniform(math.log(low), math.log(high + 1)))
    pairs = [
        (cols, rows)
        for cols in range(1, high + 1)
        for rows in range(1, high // cols + 1)
        if low <= cols * rows and max(cols, rows) <= 4 * min(cols, rows)
    ]
    nearest = min(abs(math.log(cols * rows / wanted)) for cols, rows in pairs)
    close = [p for p in pairs if abs(math.log(p[0] * p[1] / wanted)) <= nearest + 0.08]
    return close[int(rng.integers(len(close)))]


def turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    """(question, answer) pairs as LLaVA's list of turns; the image comes before the first question."""
    out = []
    for i, (question, answer) in enumerate(pairs):
        out.append({"from": "human", "value": ("" if i else "<image>\n") + question})
        out.append({"from": "gpt", "value": answer})
    return out


def draw_sample(job: tuple[str, int, int, int, Path, tuple[Path, ...]]) -> dict[str, Any]:
    """Draw one image, write it, and return its LLaVA record."""
    stage, index, seed, size, out, clips = job
    rng = np.random.default_rng([seed, list(GRIDS).index(stage), index])
    cols, rows = choose_grid(rng, *GRIDS[stage])
    n = cols * rows
    filled = int(rng.integers(1, min(n, 4) + 1))
    places = rng.choice(n, filled, replace=False).tolist()
    shapes = rng.permutation(len(SHAPES))[:filled]
    cells = {
        place: (SHAPES[int(shape)], COLOR_NAMES[int(rng.integers(len(COLOR_NAMES)))])
        for place, shape in zip(places, shapes, strict=True)
    }
    asked = [cells[place] for place in places]
    if stage != "projector" and rng.random() < 0.5:
        asked = asked[: max(1, filled // 2)]
    pairs = [(QUESTION.format(shape=shape), color) for shape, color in asked]
    name = f"{stage}-{index:05d}.png"
    image = draw_grids(rng, size=size, cols=cols, rows=rows, cells=cells, photos=load_photos(clips))
    image.save(out / "images" / name, compress_level=1)
    return {"id": name[:-4], "image": name, "conversations": turns(pairs)}


def main() -> None:
    """Draw the data of all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--projector", type=int, default=1000, help="images of the projector stage")
    parser.add_argument("--full", type=int, default=400, help="images of the full stage")
    parser.add_argument("--large", type=int, default=0, help="larger ones, for `align --max-grids 320`")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="images, folders, clips to cut cells from")
    parser.add_argument("--size", type=int, default=120, help="a cell's side: the tower's image size, pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with Pool(args.workers) as pool:
        for stage in GRIDS:
            count = getattr(args, stage)
            jobs = [(stage, i, args.seed, args.size, args.output, tuple(args.photos)) for i in range(count)]
            records = pool.map(draw_sample, jobs, chunksize=16)
            (args.output / f"{stage}.json").write_text(json.dumps(records, indent=1) + "\n")
            asked = sum(len(r["conversations"]) // 2 for r in records)
            print(f"{stage}: {count} images, {asked} questions, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
