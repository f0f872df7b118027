"""Runs of every kind, written as the commands write them, with replies drawn from a seed instead of a model's.

PYTHONPATH=tests python tests/support/report_runs.py docs     # the screenshots in docs/
"""

import io
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from lvctx.artifacts import schemas
from lvctx.artifacts.jsonl_log import write_jsonl
from lvctx.artifacts.result_log import RESULTS, short_hash
from lvctx.eval.niah.image_needles import drawn_needles
from support import browser

TASKS = ("Counting Problem", "Object Recognition", "Temporal Reasoning", "OCR Problems")
DOMAINS = ("Knowledge", "Film & Television", "Sports Competition")
QUESTIONS = (
    "How often does the door open?",
    "What is written on the sign?",
    "Who speaks first?",
    "What is being built?",
)


def write_rows(out: Path, made_of: dict[str, Any], rows: dict[str, dict[str, Any]]) -> Path:
    """results.jsonl of a run, as `ResultLog` writes it."""
    identity = {"run": short_hash(made_of), "made_of": made_of}
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / RESULTS, [{"key": key, **identity, **row} for key, row in rows.items()])
    return out


def needle_run(out: Path, *, seed: int, reach: float, model: str = "extended-7b") -> Path:
    """Five image needles in each cell of 6 depths x 5 lengths; the fewer are found, the longer than `reach` tokens."""
    dice = random.Random(seed)
    needles = drawn_needles(5, size=64, seed=seed).needles
    made_of = {"model": "77a0c1d2e3f40516", "haystack": "0f1e2d3c4b5a6978", "scoring": "both", "seed": seed}
    rows = {}
    for length in (200, 400, 800, 1600, 3000):
        for depth in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            for trial, needle in enumerate(needles):
                tokens = length * 144 + 70
                correct = dice.random() < min(1.0, (reach / tokens) ** 1.5 + 0.1)
                row: dict[str, Any] = {"schema": schemas.NIAH, "model": model, "modality": "video", "chance": 0.1}
                row |= {"trained_length": 224_000, "longest_sample": 7_300, "tokens": tokens}
                row |= {
                    "haystack": ["hay.frames.safetensors"],
                    "needles": {"source": "drawn", "size": 64, "distractors": 0},
                }
                row |= {
                    "length": length,
                    "depth": depth,
                    "trial": trial,
                    "position": int(depth * length),
                    "point": None,
                }
                row |= {"needle": needle.digest, "question": needle.question, "answer": needle.answer}
                if length == 3000 and depth == 0.6 and trial == 4:
                    rows[f"{length}-{depth}-{trial}"] = {**row, "error": "CUDA out of memory"}
                    continue
                reply = needle.answer if correct else dice.choice(("teal", "gray", "pink"))
                row |= {
                    "correct": correct,
                    "log_prob": round(-dice.random() * (0.2 if correct else 6), 4),
                    "generated": reply,
                }
                rows[f"{length}-{depth}-{trial}"] = {**row, "rank": 1 if correct else dice.randrange(2, 40)}
    return write_rows(out, made_of, rows)


def benchmark_run(
    out: Path,
    *,
    seed: int,
    skill: float,
    questions: int = 60,
    video: Path | None = None,
    model: str = "extended-7b",
    failed: int = 0,
) -> Path:
    """Video-MME: `questions`, three about a video, with replies on which scorers disagree; the last ones `failed`."""
    dice = random.Random(seed)
    drawn = random.Random(0)
    made_of = {"bench": "videomme", "model": "77a0c1d2e3f40516", "sampling": {"frames": 32}, "style": "official"}
    rows = {}
    for n in range(questions):
        answer = drawn.choice("ABCD")
        letter = answer if dice.random() < skill else dice.choice("ABCD")
        forms = (
            letter,
            letter,
            f"{letter}.",
            f"Answer: {letter}",
            f"({letter.lower()})",
            f"The best answer is {letter}.",
            "I cannot tell.",
        )
        groups = {"duration": ("short", "medium", "long")[n // 3 % 3], "domain": DOMAINS[n // 9 % 3]}
        groups |= {"sub_category": "History", "task_type": TASKS[n % 4]}
        row: dict[str, Any] = {
            "schema": schemas.QUESTIONS,
            "bench": "videomme",
            "model": model,
            "id": f"{n // 3:03}-{n % 3 + 1}",
        }
        row |= {
            "video": f"video{n // 3:03}",
            "question": QUESTIONS[n % 4],
            "groups": groups,
            "answer": answer,
            "letters": "ABCD",
        }
        row |= {
            "options": [f"{c}. {w}" for c, w in zip("ABCD", ("Never.", "Once.", "Twice.", "Three times."), strict=True)]
        }
        row |= {"file": str(video)} if video else {}
        if n >= questions - failed:
            rows[row["id"]] = {**row, "error": f"video{n // 3:03}.mp4: truncated"}
            continue
        row |= {"response": dice.choice(forms), "tokens": 4_700, "reply_tokens": 3, "frames": 32}
        row["cost"] = {"decode_seconds": 1.5, "prefill_seconds": 0.5, "tokens_in": 4_700, "tokens_out": 3}
        if n % 5 == 0:
            row["reasoning"] = "The door opens while the man reads the sign, and again at the end."
        rows[row["id"]] = row
    return write_rows(out, {**made_of, "seed": seed}, rows)


def answers_file(out: Path, *, video: Path, replies: tuple[str, ...]) -> Path:
    """Answers of `vqa` about one video."""
    shared = {
        "schema": schemas.ANSWER,
        "path": str(video),
        "frames": 3,
        "pts": [0.0, 1.0, 2.0],
        "tokens": 500,
        "reply_tokens": 4,
    }
    write_jsonl(out, [{**shared, "question": "What is on the road?", "answer": reply} for reply in replies])
    return out


def training_run(out: Path, *, seed: int, steps: int) -> Path:
    """metrics.jsonl of a training."""
    dice = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        loss = 1.6 + 2.4 / (1 + step / 12) + dice.gauss(0, 0.06)
        row = {
            "step": step,
            "loss": loss,
            "tokens": 224_000,
            "lr": {"lm": 1e-5 * min(1, step / 20)},
            "norm": abs(dice.gauss(1, 0.1)),
        }
        rows.append(
            {
                **row,
                "seconds": 24.0,
                "tokens_per_second": 9_300 + dice.random() * 50,
                "memory_bytes": 38 << 30,
                "mfu": 0.35,
            }
        )
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "metrics.jsonl", rows)
    return out


def main(docs: Path) -> None:
    """Screenshots of a report with runs of every kind: needles and questions."""
    with tempfile.TemporaryDirectory() as name, browser.headless() as window:
        here = Path(name)

        def lvctx(*arguments: str) -> None:
            subprocess.run([sys.executable, "-m", "lvctx", *arguments], cwd=here, check=True)

        lvctx("niah", "haystack", "--frames", "150", "--side", "160", "-o", "video.mp4")
        needle_run(here / "needles-extended", seed=1, reach=300_000)
        needle_run(here / "needles-baseline", seed=2, reach=60_000, model="baseline-7b")
        video = here / "video.mp4"
        benchmark_run(here / "videomme-extended", seed=1, skill=0.6, questions=180, video=video)
        benchmark_run(here / "videomme-baseline", seed=2, skill=0.4, questions=180, failed=6, model="baseline-7b")
        training_run(here / "extended-7b", seed=0, steps=300)
        names = ("needles-extended", "needles-baseline", "videomme-extended", "videomme-baseline", "extended-7b")
        lvctx("report", *names, "-o", "report.html")
        window.open((here / "report.html").as_uri())
        window.resize(1160, 2060)
        window.click("#run-0 .heat tbody tr:nth-child(5) td:last-child button")
        window.run("scrollTo(0, 0)")
        save(window, docs / "report.png")
        window.set_scheme("dark")
        window.resize(1160, 1200)
        window.click("#run-2 .list > li:nth-child(4) summary")
        window.run("document.querySelector('#run-2 .tables').scrollIntoView()")
        save(window, docs / "report-questions.png")


def save(window: browser.Browser, target: Path) -> None:
    """A screenshot in few colors, which is small."""
    Image.open(io.BytesIO(window.screenshot())).convert("RGB").quantize(128).save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
