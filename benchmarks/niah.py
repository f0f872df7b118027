"""What shared prefixes save on V-NIAH's grid: the whole grid with and without, in one run, work and seconds beside.

    python benchmarks/niah.py --model MODEL_DIR --haystack FOLDER_OF_TXT [--longest 1500] [--trials 5] [--depths 6]
    python benchmarks/niah.py --flops-of-the-paper

The grid is the paper's in proportion (LongVA figure 4): 15 lengths up to the longest, 6 depths, 5 needles. Without
reuse every cell is a forward of its own; in both only the answer's logits are made. The two walks take turns, a
thirtieth of the cells each, so that a busy machine hits both alike. Work is counted in floating-point operations of
the language model: two a weight and token, four a head's dimension and pair of tokens of which one attends the other.
`cpu` is the same in processor seconds. On a busy machine set OMP_NUM_THREADS=1: threads that wait for each other at
every operation make short forwards cost as much as long ones.
`--flops-of-the-paper` counts it for Qwen2-7B on the paper's own grid, without running anything; `--nested` for points
that all lengths share, where shorter haystacks have fewer of them.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.eval.niah.needle_task import insertion_points
from lvctx.inference.prefix_scorer import PrefixScorer, common_prefix, walk_order


def flops(config: Any, start: int, stop: int) -> float:
    """Operations to read tokens `start` to `stop` of a sequence whose beginning is in the cache; logits left out."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = config.hidden_size * dim * (2 * heads + 2 * shared)
    weights = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    pairs = (stop**2 - start**2) / 2
    return 2 * weights * (stop - start) + 4 * config.num_hidden_layers * heads * dim * pairs


def count(config: Any, sequences: Sequence[np.ndarray]) -> dict[str, float]:
    """Operations of every sequence alone, and of the walk in the given order."""
    held, once, alone = np.empty(0, dtype=np.int64), 0.0, 0.0
    for ids in sequences:
        once += flops(config, common_prefix(held, ids), len(ids))
        alone += flops(config, 0, len(ids))
        held = ids
    return {"flops_alone": alone, "flops_once": once, "flops_ratio": round(once / alone, 4)}


def paper(nested: bool) -> dict[str, Any]:
    """LongVA's grid on Qwen2-7B: 200 to 3000 frames of 144 tokens, 6 depths, 5 needles, a chat of some 40 tokens."""
    from types import SimpleNamespace

    qwen2 = SimpleNamespace(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    )
    hay = 1000 + np.arange(3000 * 144)
    sequences = []
    for frames in range(200, 3001, 200):
        for _, _, place in insertion_points([d / 5 for d in range(6)], frames, 3000, nested):
            for trial in range(5):
                at = place * 144
                needle = -1000 * (trial + 1) - np.arange(144)
                question = -100 * (trial + 1) - np.arange(25)
                parts = [np.arange(14), hay[:at], needle, hay[at : frames * 144], question]
                sequences.append(np.concatenate(parts).astype(np.int32))
    keys = walk_order(sequences)
    return {
        "grid": "paper, nested" if nested else "paper",
        "cells": len(sequences),
        **count(qwen2, [sequences[i] for i in keys]),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both walks over one grid of text, in turns of a thirtieth of the cells."""
    from lvctx.eval.niah.job import plan_text
    from lvctx.eval.niah.niah_config import Depths, TextNiahConfig
    from lvctx.models.loading import load_model

    step = arguments.longest // 15
    depths = tuple(i / (arguments.depths - 1) for i in range(arguments.depths))
    job = plan_text(
        TextNiahConfig(
            model=arguments.model,
            haystack=(arguments.haystack,),
            lengths=tuple(step * (i + 1) for i in range(15)),
            depths=Depths(values=depths, nested=arguments.nested),
            trials=arguments.trials,
            scoring="forced",
        )
    )
    model = load_model(job.path, device=arguments.device)
    once, alone = PrefixScorer(model), PrefixScorer(model, reuse=False)
    sequences = [job.task.sequence(cell) for cell in job.cells]
    PrefixScorer(model).score(*sequences[-1])  # the first forward pays for more than itself
    seconds, cpu = {"once": 0.0, "alone": 0.0}, {"once": 0.0, "alone": 0.0}
    turn = max(1, len(sequences) // 30)
    found: dict[str, list[Any]] = {"once": [], "alone": []}
    for start in range(0, len(sequences), turn):
        for name, scorer in (("once", once), ("alone", alone)):
            began, worked = time.perf_counter(), time.process_time()
            found[name] += [scorer.score(*pair) for pair in sequences[start : start + turn]]
            seconds[name] += time.perf_counter() - began
            cpu[name] += time.process_time() - worked
    agree = [a.forced == b.forced for a, b in zip(found["once"], found["alone"], strict=True)]
    return {
        "grid": f"{len(job.config.lengths)} lengths to {max(job.config.lengths)} tokens",
        "cells": len(sequences),
        "tokens_once": once.tokens_run,
        "tokens_alone": alone.tokens_run,
        "seconds_once": round(seconds["once"], 1),
        "seconds_alone": round(seconds["alone"], 1),
        "seconds_ratio": round(seconds["once"] / seconds["alone"], 4),
        "cpu_once": round(cpu["once"], 1),
        "cpu_alone": round(cpu["alone"], 1),
        "cpu_ratio": round(cpu["once"] / cpu["alone"], 4),
        **count(model.config, [ids for ids, _ in sequences]),
        "verdicts_agree": sum(agree) / len(agree),
        "right": sum(score.forced for score in found["once"]) / len(agree),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--haystack", type=Path)
    parser.add_argument("--longest", type=int, default=1500)
    parser.add_argument("--depths", type=int, default=6)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--nested", action="store_true")
    parser.add_argument("--flops-of-the-paper", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(paper(arguments.nested) if arguments.flops_of_the_paper else measure(arguments)))


if __name__ == "__main__":
    main()
