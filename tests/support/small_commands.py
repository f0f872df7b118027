"""Every command that writes, on inputs so small that it takes about a second, in forks of a warm server."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from PIL import Image

from support import mrope_models, warm_server
from support.aligning import draw, talk, write

DATA = Path(__file__).parents[1] / "data"
QUESTIONS = shlex.quote(str(DATA / "questions.json"))
TRAINING = "--steps 4 --checkpoint-activations none --device cpu"
QWEN_TRAINING = f"--data chat --media . --lora 4 --lr 1e-2 --warmup 0 {TRAINING}"
PACKED = "text.jsonl --seq-len 128 --keep-short 1 --shard-tokens 256 --workers 1 --tokenizer lm"
LINES = {
    "pack-text": f"pack-text {PACKED}",
    "pack-text keep": f"pack-text {PACKED} --mix keep",
    "pack-chat": "pack-chat --model qwen --interleaved chat.jsonl --media . --long-share 0 --target-length 100 "
    "--shard-tokens 60",
    "extend-lm": "extend-lm --model lm --data rows --rope-theta 1e6 --context 512 --lr 1e-3 --batch-tokens 128 "
    f"{TRAINING}",
    "align": f"align --lm lm --tower tower --data data.json --images . --batch 2 --lr 1e-2 --warmup 0 {TRAINING}",
    "mrope-extend": "mrope-extend --model qwen --scale 2",
    "mrope-extend --data": f"mrope-extend --model qwen --scale 2 {QWEN_TRAINING}",
    "encode-video": "encode-video clips/a.mp4 clips/b.mp4 --tower tower --fps native",
    "niah text": "niah text --model lm --haystack essay.txt --lengths 200 --depths 0,0.5,1 --trials 2",
    "videomme run": f"videomme run --model vlm --videos clips --questions {QUESTIONS} --frames 2 --max-new-tokens 2",
    "export hf": "export vlm --to hf",
    "export llava": "export vlm --to llava",
    "export --results": "export vlm --to hf --results shard",
    "niah haystack": "niah haystack --frames 4 --side 32",
    "niah video": "niah video --model vlm --haystack clips/a.mp4 --feature-cache features --lengths 2 --depths 0,1 "
    "--trials 2",
    "bench run": "bench nextqa run --model vlm --videos clips --questions nextqa.csv --frames 2 --max-new-tokens 2",
    "bench merge": "bench merge shard",
    "import-longva": "import-longva llava",
    "perplexity": "perplexity lm --data rows --rows 2",
    "niah report": "niah report all_accuracies.json",
    "report": "report responses.json",
}
COMMANDS = {name: tuple(shlex.split(line)) for name, line in LINES.items()}
"""Name -> arguments, but for `-o`; run them in the folder that `prepare` filled."""
NAMES = {"perplexity": "x.png", "niah report": "x.png", "report": "x.html"}
"""Names of outputs that need a suffix; the others are `x`."""


def prepare(folder: Path, lm: Path, tower: Path, vlm: Path, essays: Path) -> None:
    """Write the inputs of `COMMANDS` into `folder`."""
    for name, path in (("lm", lm), ("tower", tower), ("vlm", vlm)):
        shutil.copytree(path, folder / name)
    draw(folder)
    write(folder / "data.json", [talk("<image>\nWhat?", "red " * (9 - 2 * i), image=f"{i}.png") for i in range(4)])
    write(folder / "text.jsonl", [{"text": f"{i} " * 200} for i in range(9)], lines=True)
    mrope_models.save("qwen2_5_vl", folder / "qwen")
    Image.fromarray(np.zeros((70, 110, 3), np.uint8)).save(folder / "a.png")
    write(folder / "chat.jsonl", [talk("<image>What?", "Dots." * (i + 1), image="a.png") for i in range(3)], lines=True)
    (folder / "essay.txt").write_bytes((essays / "love.txt").read_bytes())
    (folder / "clips").mkdir()
    for name in ("a", "b", *sorted({row["videoID"] for row in json.loads((DATA / "questions.json").read_text())})):
        source = ["-f", "lavfi", "-i", "testsrc2=s=48x48:r=10:d=2", "-c:v", "libx264", "-pix_fmt", "yuv420p"]
        target = folder / "clips" / f"{name}.mp4"
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, target], check=True)
    accuracies = [{"Num. Frame": 200 * n, "Frame Depth": 50 * d, "Score": d / 2} for n in (1, 2) for d in (0, 1, 2)]
    (folder / "all_accuracies.json").write_text(json.dumps(accuracies))
    asked = {"question_id": "1-1", "question": "Why?", "options": ["A. a", "B. b"], "answer": "A", "response": "A"}
    video = {"video_id": "1", "duration": "short", "domain": "x", "sub_category": "y", "questions": [asked]}
    (folder / "responses.json").write_text(json.dumps([video]))
    header, row = (DATA / "nextqa.csv").read_text().splitlines()[:2]
    (folder / "nextqa.csv").write_text(f"{header}\n{row}\n")
    made = {"rows": COMMANDS["pack-text"], "chat": COMMANDS["pack-chat"], "llava": COMMANDS["export llava"]}
    for out, command in (made | {"shard": (*COMMANDS["videomme run"], "--shard", "1/1")}).items():
        done = lvctx(folder, *command, "-o", out)
        assert done.returncode == 0, done.stderr


def start(folder: Path, *args: object, **env: str) -> subprocess.Popen[str]:
    """A command that has been started in `folder`."""
    command = [warm_server.start(), *map(str, args)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, **pipes)


def lvctx(folder: Path, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """A finished command, run in `folder`."""
    process = start(folder, *args, **env)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def contents(out: Path) -> dict[str, bytes]:
    """All files but the logs of trainings and results, which hold the clock."""
    logs = ("metrics.jsonl", "results.jsonl")
    paths = [out] if out.is_file() else sorted(out.rglob("*"))
    files = (path for path in paths if path.is_file() and path.name not in logs)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def logged(out: Path) -> list[dict[str, Any]]:
    """The rows of both logs in their order, without what the clock decides."""
    files = [out / name for name in ("metrics.jsonl", "results.jsonl") if (out / name).exists()]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    clock = ("cost", "seconds", "tokens_per_second", "mfu", "memory_bytes")
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]
