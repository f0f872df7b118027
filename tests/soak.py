"""Memory, open files and processes of commands that run for hours: none may grow.

    cd tests; python -m soak FOLDER --minutes 120

Half the time `encode-video | vqa` is given video after video, one in five of them damaged; the other half, `niah text`
runs one grid of 250,000 cells. Writes FOLDER/soak.json and FOLDER/soak.png.
Exit 1 if something grows, see `growth`.
"""

import argparse
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from conftest import save_tower
from fuzz.driver import VIDEOS, save_video
from support import broken
from support.warm_server import ROOT

SHARE, ERRORS = 0.02, 3
SAMPLES = 200
UNITS = {"rss_mib": "MiB in memory (RSS)", "files": "open files", "processes": "processes"}


def growth(seconds: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """By how much a line through the second half of the samples rises, and the standard error of that.

    `grows` is true if the rise is more than `SHARE` of the mean and more than `ERRORS` standard errors.
    """
    x, y = np.array(seconds[len(seconds) // 2 :]), np.array(values[len(values) // 2 :])
    (slope, _), covariance = np.polyfit(x - x[0], y, 1, cov=True)
    rise, error = slope * (x[-1] - x[0]), math.sqrt(covariance[0, 0]) * (x[-1] - x[0])
    rounded = {"mean": y.mean(), "rise": rise, "standard_error": error, "minutes": (x[-1] - x[0]) / 60}
    grows = bool(rise > SHARE * y.mean() and rise > ERRORS * error)
    return {key: round(float(value), 3) for key, value in rounded.items()} | {"grows": grows}


def sample() -> dict[str, float]:
    """What all processes below this one have together."""
    total = {"rss_mib": 0.0, "files": 0, "processes": 0}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            total["rss_mib"] += process.memory_info().rss / 2**20
            total["files"] += process.num_fds()
            total["processes"] += 1
    return total


def watch(step: Callable[[], None], minutes: float) -> dict[str, Any]:
    """Call `step` until the time is over, with samples between calls."""
    began, rows = time.monotonic(), []
    for done in itertools.count():
        passed = time.monotonic() - began
        if passed >= len(rows) * minutes * 60 / SAMPLES:
            rows.append({"seconds": round(passed, 1), "done": done, **sample()})
        if passed > minutes * 60:
            break
        step()
    seconds = [row["seconds"] for row in rows]
    return {"done": done, **{key: growth(seconds, [row[key] for row in rows]) for key in UNITS}, "samples": rows}


def run(*command: object, **options: Any) -> "subprocess.Popen[str]":
    """Start a command of Python's that reads text from a pipe and writes to one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1, "env": environment}
    return subprocess.Popen([sys.executable, *map(str, command)], **(pipes | options))


@contextmanager
def videos(folder: Path, vlm: Path, log: Any) -> Iterator[Callable[[], None]]:
    """A step is one answer about one video of an endless list; videos and features are removed after it."""
    whole = {name: save_video(folder / f"whole.{name}", codec) for name, codec in VIDEOS.items()}
    for name in ("videos", "frames"):  # of an earlier run
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "videos").mkdir()
    sources = itertools.cycle([*whole.items(), ("mp4", whole["mp4"][:-200])])
    encode = run("-m", "lvctx", "encode-video", "-", "--model", vlm, "--frames", 3, "-o", folder / "frames", stderr=log)
    ask = ["--model", vlm, "--ask", "What?", "--max-new-tokens", 2]
    vqa = run("-m", "lvctx", "vqa", *ask, stdin=encode.stdout, stderr=log)
    pending: deque[Path] = deque()
    numbers = itertools.count()

    def step() -> None:
        while len(pending) < 8:
            name, content = next(sources)
            pending.append(folder / "videos" / f"{next(numbers)}.{name}")
            pending[-1].write_bytes(content)
            encode.stdin.write(f"{pending[-1]}\n")
        row = json.loads(vqa.stdout.readline())
        video = pending.popleft()
        assert ("error" in row) == (int(video.stem) % 5 == 4), row
        video.unlink()
        if "error" not in row:
            Path(row["path"]).unlink()

    yield step
    encode.stdin.close()
    rest = vqa.stdout.read().splitlines()
    assert (encode.wait(), vqa.wait(), len(rest)) == (4, 4, len(pending))  # some videos are damaged


@contextmanager
def needles(folder: Path, lm: Path, log: Any) -> Iterator[Callable[[], None]]:
    """A step is one cell of a needle test."""
    (folder / "essay.txt").write_text("The sea was calm that morning. " * 400)
    shutil.rmtree(folder / "niah", ignore_errors=True)
    grid = ["--lengths", "1000,1200,1400,1600,1800", "--depths", "0,0.25,0.5,0.75,1", "--trials", 10_000, "--no-reuse"]
    files = ["--model", lm, "--haystack", folder / "essay.txt", "-o", folder / "niah"]
    niah = run("-m", "lvctx", "niah", "text", *files, *grid, stderr=log)

    def step() -> None:
        assert niah.stdout.readline(), "the needle test ended"

    yield step
    niah.kill()
    niah.wait()


def draw(halves: dict[str, Any], out: Path) -> None:
    """Draw every series over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3 * len(halves)), layout="constrained")
    for axes, (name, half) in zip(figure.subplots(len(halves), len(UNITS)), halves.items(), strict=True):
        for ax, (key, unit) in zip(axes, UNITS.items(), strict=True):
            ax.plot([row["seconds"] / 60 for row in half["samples"]], [row[key] for row in half["samples"]])
            ax.set(title=name, xlabel="minutes", ylabel=unit)
            ax.set_ylim(bottom=0)
    figure.savefig(out)


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=120)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lm = broken.save_lm(folder / "lm")
    vlm = broken.save_vlm(lm, save_tower(folder / "tower"), folder / "vlm")
    halves = {}
    with open(folder / "stderr.log", "w") as log:
        for name, opened in {
            "encode-video | vqa": videos(folder, vlm, log),
            "niah text": needles(folder, lm, log),
        }.items():
            with opened as step:
                step()  # every import is over
                halves[name] = watch(step, options.minutes / 2)
            print(name, json.dumps({key: value for key, value in halves[name].items() if key != "samples"}))
    machine = {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    (folder / "soak.json").write_text(json.dumps({"minutes": options.minutes, **machine, "halves": halves}, indent=1))
    draw(halves, folder / "soak.png")
    sys.exit(any(half[key]["grows"] for half in halves.values() for key in UNITS))


if __name__ == "__main__":
    main()
