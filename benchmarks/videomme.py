"""What shared frames save on Video-MME: three questions about one video, its frames read once or three times.

    python benchmarks/videomme.py --lm .cache/nano/lm --tower recipes/nano/tower [--frames 128] [--repeat 5]
    python benchmarks/videomme.py --model VLM --frames 128 --device cuda

Three kinds of work take turns in one run: `once` reads the frames and answers three questions about them, `alone` is a
forward of its own for every question, `one` a video with one question. The goal: `once` costs at most 1.3 of `one`.
All begin with features, as they come out of a frames artifact, and their projector's work is in the seconds. Without
`--model`, a projector is drawn between the language model and the tower: what it says is nothing, what it costs is
the same. So replies are of a fixed length, by default of two tokens: a letter and the turn's end.

Operations are the language model's: two a weight and token, four a head's dimension and pair of tokens of which one
attends the other. `cpu` is processor seconds. On a busy machine set OMP_NUM_THREADS=1.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from niah import flops

from lvctx.eval.benchmarks import videomme
from lvctx.inference.prefix_scorer import common_prefix
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.models.vision_encoder import TowerFiles
from lvctx.models.vlm_assembly import VIDEO_TOKEN, embed_frames, newline_embedding, tokens_per_frame
from lvctx.vlm.base import VisualInput
from lvctx.vlm.llava_onevision import PROJECTOR_BATCH
from lvctx.vlm.registry import open_vlm

QUESTIONS = Path(__file__).resolve().parent.parent / "tests" / "data" / "questions.json"
GOAL = 1.3


def draw_model(lm_dir: Path, tower_dir: Path, out: Path) -> Path:
    """A VLM of both with a drawn projector, and room for 32,768 positions."""
    from lvctx.models.loading import load_model, load_tokenizer
    from lvctx.models.vision_encoder import load_vision_model
    from lvctx.models.vlm_assembly import assemble, save_vlm

    lm, tokenizer = load_model(lm_dir), load_tokenizer(lm_dir)
    lm.config.max_position_embeddings = 32_768
    tower = load_vision_model(tower_dir, dtype=lm.dtype)
    save_vlm(assemble(lm, tower, tokenizer, where=lm_dir, seed=0), tokenizer, tower_dir, out)
    return out


class Bench:
    """A model, a video's features, and prompts about it."""

    def __init__(self, model: Path, frames: int, reply: int, device: str) -> None:
        files = TowerFiles.find(model)
        self.engine = TransformersEngine(open_vlm(model), device=device)
        self.engine.stop_ids = set()  # replies of one length, whatever the model would say
        self.reply = reply
        shape = frames, files.patches_per_frame, files.width
        self.features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.texts = [videomme.prompt(sample, "official", None) for sample in videomme.samples(QUESTIONS)[:3]]

    def run(self, *, questions: int, reuse: bool) -> list[list[int]]:
        """Show the video and answer, from an empty cache."""
        self.engine.scorer.reuse = reuse
        self.engine.set_visual_input(self.visual_input())
        prompts = [self.engine.prompt_ids([text]) for text in self.texts[:questions]]
        return [self.engine.finish([self.engine.start(ids, self.reply)])[0] for ids in prompts]

    def visual_input(self) -> VisualInput:
        """The features as a video."""
        vlm: Any = self.engine.vlm
        count = len(self.features) * tokens_per_frame(vlm.config) + 1

        @torch.inference_mode()
        def table(model: Any) -> torch.Tensor:
            embedded = [embed_frames(model, part) for part in self.features.split(PROJECTOR_BATCH)]
            return torch.cat([*embedded, newline_embedding(model)])

        ids = vlm.vocabulary + np.arange(count)
        return VisualInput(ids_N=ids, table=table, placeholder=VIDEO_TOKEN, tokens=count)

    def flops(self, *, questions: int, reuse: bool) -> float:
        """Operations of `run`, from the prompts alone."""
        config, held, total = self.engine.model.config.text_config, np.empty(0, dtype=np.int64), 0.0
        for text in self.texts[:questions]:
            ids = self.engine.prompt_ids([text])
            # The last token of a reply is never read.
            total += flops(config, common_prefix(held, ids) if reuse else 0, len(ids) + self.reply - 1)
            held = ids
        return total


KINDS: dict[str, dict[str, Any]] = {
    "once": {"questions": 3, "reuse": True},
    "alone": {"questions": 3, "reuse": False},
    "one": {"questions": 1, "reuse": True},
}


def measure(bench: Bench, repeat: int) -> dict[str, Any]:
    """Medians over turns, and what they make of the goal."""
    bench.run(questions=1, reuse=True)  # the first forward pays for more than itself
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    said: dict[str, list[list[int]]] = {}
    for _ in range(repeat):
        for kind, work in KINDS.items():
            began, worked = time.perf_counter(), time.process_time()
            said[kind] = bench.run(**work)
            times[kind].append((time.perf_counter() - began, time.process_time() - worked))
    wall, cpu = ({kind: statistics.median(t[i] for t in of) for kind, of in times.items()} for i in (0, 1))
    work = {kind: bench.flops(**options) for kind, options in KINDS.items()}
    found: dict[str, Any] = {
        "frames": len(bench.features),
        "visual_tokens": bench.visual_input().tokens,
        "prompt_tokens": [len(bench.engine.prompt_ids([text])) for text in bench.texts],
        "reply_tokens": bench.reply,
        "repeat": repeat,
        "replies_agree": said["once"] == said["alone"],
        "questions_a_second": {kind: round(KINDS[kind]["questions"] / wall[kind], 4) for kind in KINDS},
    }
    for name, of, digits in (("seconds", wall, 2), ("cpu", cpu, 2), ("teraflops", work, 3)):
        scale = 1e12 if name == "teraflops" else 1
        found[name] = {kind: round(value / scale, digits) for kind, value in of.items()} | {
            "alone/once": round(of["alone"] / of["once"], 3),
            "once/one": round(of["once"] / of["one"], 3),
        }
    met = {name: found[name]["once/one"] <= GOAL for name in ("seconds", "cpu", "teraflops")}
    return {**found, "goal": GOAL, "met": met}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--lm", type=Path)
    parser.add_argument("--tower", type=Path)
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--reply", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    if (a.model is None) == (a.lm is None or a.tower is None):
        parser.error("give --model, or --lm and --tower")
    with tempfile.TemporaryDirectory() as folder:
        model = a.model or draw_model(a.lm, a.tower, Path(folder))
        print(json.dumps(measure(Bench(model, a.frames, a.reply, a.device), a.repeat)))


if __name__ == "__main__":
    main()
