"""Helpers of the alignment tests: drawn images, rows of data, and an alignment of tiny models in this process."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

SIZES = ((96, 96), (96, 48), (96, 96), (96, 48))
"""Width and height of the drawn pictures: for a tower of 48 pixels 2 x 2 or 2 x 1 grids."""


def draw(folder: Path) -> None:
    """Four pictures of noise."""
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def write(path: Path, rows: list[Any], *, lines: bool = False) -> Path:
    """Rows as a JSON list or one object a line."""
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n" if lines else json.dumps(rows))
    return path


def talk(*turns: str, **extra: Any) -> dict[str, Any]:
    """A LLaVA row of turns, the human's first."""
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": t} for i, t in enumerate(turns)], **extra}


def make_forward(vlm: Any, tokenizer: Any, encoding: Any, pixels_from: Path, *, pose: bool = False) -> Any:
    """A VLM ready for micro-batches, its tower frozen."""
    from lvctx.models.image_processing import Preprocess
    from lvctx.models.vlm_assembly import newline_id
    from lvctx.training.batching import Forward

    return Forward(
        vlm,
        encoding=encoding,
        preprocess=Preprocess.from_directory(pixels_from),
        newline=newline_id(tokenizer),
        tower_grad=False,
        device="cpu",
        pose=pose,
    )


def align(
    data: Path,
    out: Path,
    lm: Path | None,
    tower: Path | None,
    *,
    on_progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    micro_tokens: int = 256,
    checkpoint_activations: Any = "auto",
    parallel: Mapping[str, Any] = MappingProxyType({}),
    **changed: Any,
) -> Any:
    """Align in this process, images beside `data`; the job."""
    from lvctx.training.align_config import AlignConfig
    from lvctx.training.align_job import resolve_align
    from lvctx.training.dpo import align_task
    from lvctx.training.parallel_config import ParallelConfig, RunControl
    from lvctx.training.run_training import run_training

    options: dict[str, Any] = {"steps": 3, "batch": 3, "lr": 1e-2, "tower_lr": 0.0, "warmup": 0.0, "max_length": 4096}
    options |= {"lm": str(lm) if lm else None, "tower": str(tower) if tower else None}
    job = resolve_align(AlignConfig(data=data, images=data.parent, out=out, **options | changed))
    memory = {"micro_tokens": micro_tokens, "checkpoint_activations": checkpoint_activations}
    devices = ParallelConfig(device="cpu", **memory, **parallel)
    run_training(align_task(job), devices, RunControl(out=out, on_progress=on_progress))
    return job


def metrics(out: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k in ("step", "loss", "tokens", "lr", "norm")} for row in rows]
