"""Mutated inputs of every kind, given to the command line: codes 0, 2, 3, 4 and 5, no traceback, 10 s and 2 GiB each.

    cd tests; python -m fuzz.driver FOLDER --count 10000 [KIND ...]

A seed is a number: `--first SEED --count 1 KIND` makes and runs one input again.
"""

import argparse
import csv
import json
import logging
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import save_tower
from PIL import Image
from support import broken
from support.limited import BYTES, SECONDS, fault, limited
from typer.testing import CliRunner

from lvctx.cli.app import app

TOGETHER = 200
"""Inputs that one process runs in `suspects`."""

TURNS = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A dog."}]
ROWS: list[dict[str, Any]] = [{"id": str(n), "conversations": TURNS} for n in range(3)]
RECIPE = '[info]\njson = true\nquiet = false\n\n[other]\nlist = [1, 2.5, "a"]\ntable = {a = 1, b = 2024-01-01}\n'
SUBTITLES = "1\n00:00:01,000 --> 00:00:02,000\nHello <i>there</i>\n\n2\n00:00:03,000 --> 00:00:04,500\nBye\n\n"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PIECES = [
    *(
        b"",
        b"\0",
        b"\xff",
        b'"',
        b"\n",
        b"[" * 3000,
        b"{" * 200,
        b"\\ud800",
        b",",
        b"-1",
        b"1e999",
        b"9" * 5000,
        b"null",
    ),
    *(b"{% for a in range(9999) %}{% for b in range(9999) %}", b"{{ 9 ** 9 ** 9 }}", b"=", b"-->", b"\xef\xbb\xbf"),
]


def damage(raw: bytes, rng: Random) -> bytes:
    """Bytes changed, cut out, repeated or cut off, up to eight times."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.choice([0, 1, 4, 40])] = rng.choice([*PIECES, bytes([rng.randrange(256)]), data[:64]])
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


FIELDS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
VIDEOS = {"mp4": "libx264", "mkv": "libvpx", "avi": "mpeg4", "ts": "mpeg2video"}
SAMPLING: tuple[tuple[object, ...], ...] = (
    *(("--frames", 3), ("--fps", "native"), ("--fps", 1000, "--max-frames", 50), ("--frames", 9, "--allow-partial")),
    *(("--frames", 3, "--decoder", "decord"),),
)


def damage_video(raw: bytes, rng: Random) -> bytes:
    """Up to three times: bytes flipped, cut off, zeroed, repeated or moved, or a number of a header replaced."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, to = rng.randrange(len(data)), rng.randrange(len(data))
        block = data[at : at + rng.choice((1, 4, 16, 188, 1500))]
        match rng.randrange(7):
            case 0:
                for _ in range(rng.choice((1, 3, 20))):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                del data[max(at, 8) :]
            case 2:
                data[at : at + len(block)] = bytes(len(block))
            case 3:
                data[to:to] = block
            case 4:
                del data[at : at + len(block)]
                data[to:to] = block
            case _:  # the numbers of headers are near the beginning, and before each packet
                width, order = rng.choice((1, 2, 4, 8)), rng.choice(("big", "little"))
                at = min(at, rng.choice((600, 2000, len(data))))
                data[at : at + width] = (rng.choice(FIELDS) % (1 << 8 * width)).to_bytes(width, order)
    return bytes(data) or b"\0"


def save_video(path: Path, codec: str) -> bytes:
    """Eight frames of 48 x 48 pixels, a key frame every three; the content of the file."""
    options = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 48, 48, "yuv420p", 3
        for number in range(8):
            image = np.full((48, 48, 3), 30 * number, np.uint8)
            image[number : number + 20, 10:30] = (250, 10, 60)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode(None))
    return path.read_bytes()


class Fuzzer:
    """The inputs that mutations begin with, in a folder, and the commands that read them."""

    def __init__(self, folder: Path, vlm: Path) -> None:
        self.folder, self.vlm = folder, vlm
        self.frames = (vlm / "model.safetensors").read_bytes()
        self.videos = {name: save_video(folder / f"whole.{name}", codec) for name, codec in VIDEOS.items()}
        self.kinds: dict[str, Callable[[Random], list[object]]] = {
            **{kind: getattr(self, kind) for kind in ("safetensors", "config", "template", "recipe", "subtitles")},
            **{kind: self._rows(kind) for kind in ("json", "jsonl", "csv", "parquet")},
            **{kind: getattr(self, kind) for kind in ("image", "responses", "video")},
        }

    def _write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    def _pack(self, path: Path, model: Path | None = None, *more: object) -> list[object]:
        out = self.folder / "packed"
        shutil.rmtree(out, ignore_errors=True)
        rows = ["--target-length", 512, "--long-share", 0, "-q", "-o", out]
        return ["pack-chat", "--model", model or self.vlm, "--image", path, *rows, *more]

    def safetensors(self, rng: Random) -> list[object]:
        """A header whose values change, or bytes of the whole file."""
        length = int.from_bytes(self.frames[:8], "little")
        header = json.loads(self.frames[8 : 8 + length])
        if rng.random() < 0.6:
            raw = json.dumps(broken.mutate(header, rng)).encode()
            content = struct.pack("<Q", len(raw)) + raw + self.frames[8 + length :]
        else:
            content = damage(self.frames[: 8 + length], rng) + self.frames[8 + length :]
        model = broken.clone(self.vlm, self.folder / "model")
        (model / "model.safetensors").unlink()
        (model / "model.safetensors").write_bytes(content)
        return ["info", rng.choice([model, model / "model.safetensors"])]

    def config(self, rng: Random) -> list[object]:
        """config.json with other values, or damaged."""
        model = broken.clone(self.vlm, self.folder / "model")
        raw = (model / "config.json").read_bytes()
        (model / "config.json").write_bytes(
            json.dumps(broken.mutate(json.loads(raw), rng)).encode() if rng.random() < 0.7 else damage(raw, rng)
        )
        plan = ["plan", "extend-lm", "--model", model, "--seq-len", 512, "--device", "h200", "-q"]
        return rng.choice([["info", model], plan])

    def template(self, rng: Random) -> list[object]:
        """A chat template, damaged."""
        model = broken.clone(self.vlm, self.folder / "model")
        raw = rng.choice([TEMPLATE, *broken.TEMPLATES]).encode()
        (model / "chat_template.jinja").write_bytes(damage(raw, rng))
        return self._pack(self._write("chat.json", json.dumps(ROWS).encode()), model, "--template", "own")

    def recipe(self, rng: Random) -> list[object]:
        """A TOML recipe, damaged."""
        return ["info", self.vlm, "--recipe", self._write("r.toml", damage(RECIPE.encode(), rng))]

    def subtitles(self, rng: Random) -> list[object]:
        """SubRip, damaged, read by a run of Video-MME that has no video."""
        self._write("subtitles/a.srt", damage(SUBTITLES.encode(), rng))
        question = {"video_id": "1", "videoID": "a", "question_id": "1-1", "question": "Why?", "answer": "A"}
        more = {"duration": "short", "domain": "x", "sub_category": "y", "task_type": "z", "options": ["A. a", "B. b"]}
        questions = self._write("q.json", json.dumps([question | more]).encode())
        folders = ["--videos", self.folder, "--subtitles", self.folder / "subtitles"]
        run = ["videomme", "run", "--model", self.vlm, "--questions", questions, *folders, "--frames", 2, "--dry-run"]
        return [*run, "-o", self.folder / "run"]

    def _rows(self, kind: str) -> Callable[[Random], list[object]]:
        def make(rng: Random) -> list[object]:
            rows = broken.mutate(ROWS, rng) if rng.random() < 0.5 else ROWS
            path = self.folder / f"rows.{kind}"
            if kind == "json":
                path.write_text(json.dumps(rows))
            elif kind == "jsonl":
                path.write_text("".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])))
            elif kind == "csv":
                with open(path, "w", newline="") as f:
                    writer = csv.writer(f)
                    writer.writerows([["id", "conversations"], *([row["id"], json.dumps(TURNS)] for row in ROWS)])
            else:
                pq.write_table(pa.Table.from_pylist(ROWS), path)
            if rows is ROWS:
                path.write_bytes(damage(path.read_bytes(), rng))
            return self._pack(path)

        return make

    def responses(self, rng: Random) -> list[object]:
        """Responses of Video-MME, with other values or damaged."""
        question = {"question_id": "1-1", "question": "Why?", "options": ["A. a"], "answer": "A", "response": "A"}
        video = {"video_id": "1", "duration": "short", "domain": "x", "sub_category": "y", "questions": [question]}
        raw = json.dumps(broken.mutate([video], rng)).encode()
        return ["videomme", "score", self._write("r.json", damage(raw, rng) if rng.random() < 0.5 else raw)]

    def image(self, rng: Random) -> list[object]:
        """An image of one of several formats, damaged, in a chat sample."""
        kind = rng.choice(["png", "jpeg", "gif", "bmp", "tiff", "webp"])
        Image.radial_gradient("L").resize((40, 30)).convert("RGB").save(self.folder / f"i.{kind}")
        path = self.folder / f"i.{kind}"
        path.write_bytes(damage(path.read_bytes(), rng))
        row = {"image": path.name, "conversations": [{"from": "human", "value": "<image>\nWhat?"}, TURNS[1]]}
        return self._pack(self._write("images.json", json.dumps([row]).encode()), None, "--media", self.folder)

    def video(self, rng: Random) -> list[object]:
        """Two videos of every container, damaged, in one command: its limits are those of all."""
        files = []
        for number, (name, whole) in enumerate([*self.videos.items()] * 2):
            files.append(self._write(f"videos/{number}.{name}", damage_video(whole, rng)))
        shutil.rmtree(self.folder / "frames", ignore_errors=True)
        return ["encode-video", *files, "--model", self.vlm, *rng.choice(SAMPLING), "-o", self.folder / "frames"]


def suspects(fuzzer: Fuzzer, kind: str, seeds: range) -> Iterator[int]:
    """The seeds whose input does not end well in a process that runs many, with the limits of `limited`.

    This is several times as fast as a process for each input.
    """
    at = seeds.start
    while at < seeds.stop:
        reader, writer = os.pipe()
        if not (child := os.fork()):
            os.close(reader)
            _run_together(fuzzer, kind, range(at, min(at + TOGETHER, seeds.stop)), writer)
        os.close(writer)
        with open(reader) as ends:
            ended = [line.split() for line in ends]
        os.waitpid(child, 0)
        yield from (int(seed) for seed, well in ended if well == "False")
        at = int(ended[-1][0]) + 1 if ended else at
        if len(ended) < TOGETHER and at < seeds.stop:  # the next one has ended the process
            yield at
            at += 1


def _run_together(fuzzer: Fuzzer, kind: str, seeds: range, writer: int) -> NoReturn:
    """Write how each input ends: a line of its seed and whether it ended well."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, mapped + BYTES))
    os.environ["HF_HUB_OFFLINE"] = "1"
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)  # what libraries say beside the command's own streams
    try:
        for seed in seeds:
            arguments = [*map(str, fuzzer.kinds[kind](Random(f"{kind} {seed}")))]
            logging.root.handlers.clear()  # that of the command before writes to its stream
            signal.alarm(SECONDS)
            done = CliRunner().invoke(app, arguments)
            signal.alarm(0)
            ended = subprocess.CompletedProcess(arguments, done.exit_code, b"", done.stderr.encode(errors="replace"))
            os.write(writer, f"{seed} {not fault(ended)}\n".encode())
    finally:
        os._exit(0)


def fuzz(fuzzer: Fuzzer, kind: str, seeds: Iterable[int]) -> list[str]:
    """Run the inputs of these seeds, each in a process of its own; returns what is wrong, with the seed."""
    found = []
    for seed in seeds:
        wrong = fault(limited(*fuzzer.kinds[kind](Random(f"{kind} {seed}"))))
        if wrong:
            found.append(f"{kind} {seed}: {wrong}")
    return found


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_intermixed_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    lm, tower = broken.save_lm(options.folder / "lm"), save_tower(options.folder / "tower")
    fuzzer = Fuzzer(options.folder, broken.save_vlm(lm, tower, options.folder / "vlm"))
    faults = 0
    for kind in options.kinds or fuzzer.kinds:
        began = time.monotonic()
        found = fuzz(fuzzer, kind, suspects(fuzzer, kind, range(options.first, options.first + options.count)))
        line = f"{kind}: {options.count} inputs, {len(found)} faults, {time.monotonic() - began:.0f} s"
        print(line, *found, sep="\n  ", flush=True)
        faults += len(found)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
