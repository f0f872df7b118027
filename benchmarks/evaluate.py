"""What `--batch` and reading ahead save: `videomme run` from video files to rows, samples per second.

    python benchmarks/evaluate.py --lm .cache/nano/lm --tower recipes/nano/tower --clips .cache/nano/clips [--batch 8]
    python benchmarks/evaluate.py --model VLM --clips FOLDER --device cuda

Three questions about each of `--videos` videos, which are the clips in turn under other names. The ways take turns in
one run: `one` asks one question after another and reads a video when its turn comes, `ahead` reads the next one
meanwhile, `batch` generates replies together, `both` is what the command does. Every way has the same loaded model,
reads and encodes all videos anew, and writes its rows. Replies are of a fixed length, by default the 16 tokens of the
command, whatever the model would generate. Without `--model`, a projector is drawn, as in `videomme.py`.

`same_replies` is the share of replies that are those of `one`. Medians over turns; `speedup` is the median of each
turn's ratio to `one`, of seconds and of processor seconds. `cost` has the seconds of the phases, summed over rows.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from videomme import draw_model

from lvctx.eval.benchmarks import videomme
from lvctx.eval.benchmarks.run_benchmark import BenchmarkConfig, plan_benchmark, run_benchmark
from lvctx.inference.sampling_params import SamplingParams
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.parallel.context import ParallelContext
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.registry import open_vlm

QUESTIONS = Path(__file__).resolve().parent.parent / "tests" / "data" / "questions.json"


def ways_of(batch: int) -> dict[str, tuple[int, bool]]:
    """Batch, and whether videos are read ahead."""
    return {"one": (1, False), "ahead": (1, True), "batch": (batch, False), "both": (batch, True)}


def prepare(clips: Path, videos: int, folder: Path) -> Path:
    """Links to the clips, and questions about all of them."""
    asked = json.loads(QUESTIONS.read_text())[:3]
    files, rows = sorted(clips.glob("*.mp4")), []
    for number in range(videos):
        (folder / f"v{number}.mp4").symlink_to(files[number % len(files)].resolve())
        names = {"video_id": f"v{number}", "videoID": f"v{number}"}
        rows += [{**question, **names, "question_id": f"{number}-{i}"} for i, question in enumerate(asked)]
    (folder / "questions.json").write_text(json.dumps(rows))
    return folder


def run(model: Any, path: Path, data: Path, way: tuple[int, bool], a: argparse.Namespace) -> dict[str, Any]:
    """One run into a new folder."""
    with tempfile.TemporaryDirectory() as out:
        engine = TransformersEngine(open_vlm(path), device=a.device, dtype=a.dtype, batch=way[0])
        engine.model, engine.reads_ahead, engine.stop_ids = model, way[1], set()
        config = BenchmarkConfig(
            model=str(path),
            videos=data,
            questions=data / "questions.json",
            prompt="official",
            subtitles=None,
            params=SamplingParams(max_new_tokens=a.reply),
        )
        job = plan_benchmark(videomme, config, engine, VideoSampling(frames=a.frames))
        began, worked = time.perf_counter(), time.process_time()
        parallel = ParallelContext(device=a.device)
        options: dict[str, Any] = {"parallel": parallel, "resume": "auto", "force": False}
        rows = list(run_benchmark(job, Path(out), engine, on_progress=lambda done, total, note: None, **options))
        seconds = time.perf_counter() - began, time.process_time() - worked
    cost: Counter[str] = Counter()
    for row in rows:
        cost.update({key: value for key, value in row["cost"].items() if key.endswith("_seconds")})
    return {"seconds": seconds, "replies": [row["response"] for row in rows], "cost": cost, "tokens": rows[0]["tokens"]}


def measure(path: Path, data: Path, a: argparse.Namespace) -> dict[str, Any]:
    """Medians over turns."""
    engine = TransformersEngine(open_vlm(path), device=a.device, dtype=a.dtype)
    ways = ways_of(a.batch)
    run(engine.model, path, data, ways["both"], smaller(a))
    turns: list[dict[str, dict[str, Any]]] = []
    for turn in range(a.repeat):
        names = sorted(ways, reverse=bool(turn % 2))
        turns.append({name: run(engine.model, path, data, ways[name], a) for name in names})
    samples = 3 * a.videos

    def median(of: Any) -> dict[str, float]:
        return {name: round(statistics.median(of(turn, name) for turn in turns), 3) for name in ways}

    def ratio(kind: int) -> dict[str, float]:
        return median(lambda turn, name: turn["one"]["seconds"][kind] / turn[name]["seconds"][kind])

    first = turns[0]["one"]["replies"]
    same = {name: sum(a == b for a, b in zip(turns[0][name]["replies"], first, strict=True)) for name in ways}
    return {
        "videos": a.videos,
        "samples": samples,
        "frames": a.frames,
        "prompt_tokens": turns[0]["one"]["tokens"],
        "reply_tokens": a.reply,
        "batch": a.batch,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "repeat": a.repeat,
        "samples_per_second": median(lambda turn, name: samples / turn[name]["seconds"][0]),
        "speedup": ratio(0),
        "speedup_cpu": ratio(1),
        "same_replies": {name: round(count / samples, 3) for name, count in same.items()},
        "cost": {name: {k: round(v, 2) for k, v in turns[-1][name]["cost"].items()} for name in ways},
    }


def smaller(a: argparse.Namespace) -> argparse.Namespace:
    """A small run, since the first forward takes longer than others."""
    return argparse.Namespace(**{**vars(a), "frames": 2, "reply": 2})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--lm", type=Path)
    parser.add_argument("--tower", type=Path)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--reply", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    a = parser.parse_args()
    if (a.model is None) == (a.lm is None or a.tower is None):
        parser.error("give --model, or --lm and --tower")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as data:
        model = a.model or draw_model(a.lm, a.tower, Path(folder))
        print(json.dumps(measure(model, prepare(a.clips, a.videos, Path(data)), a)))


if __name__ == "__main__":
    main()
