"""Run a needle test: plan the grid, walk it with shared prefixes computed once, keep every cell as its own row."""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lvctx.artifacts import schemas
from lvctx.artifacts.frames import Frames, read_frames
from lvctx.artifacts.manifest import MANIFEST, read_manifest
from lvctx.artifacts.rows import RowLog
from lvctx.artifacts.store import fingerprint
from lvctx.bench.grid import THRESHOLD, read_grid
from lvctx.bench.heatmap import write_report
from lvctx.bench.niah import Cell, Niah, TextNiah, VideoNiah, drawn_needles, read_needles, visual_table
from lvctx.bench.prefix import PrefixScorer, Score, common_prefix, walk_order
from lvctx.errors import InputError, UsageError
from lvctx.model.load import (
    VLM_TYPE,
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
    trained_length,
)
from lvctx.model.vlm import embed_frames, newline_embedding, tokens_per_frame
from lvctx.text.needle import read_haystack
from lvctx.vision.draw import COLORS
from lvctx.vision.tower import TowerFiles, load_tower

log = logging.getLogger(__name__)
Scoring = Literal["forced", "generate", "both"]

BATCH = 64
"""Frames that go through the projector at once: before its pooling a frame is four times its tokens."""


@dataclass(frozen=True, kw_only=True)
class NiahConfig:
    """What to test."""

    model: str
    """Directory or hub id."""
    modality: Literal["text", "video"]
    """What the haystack is made of."""
    haystack: tuple[Path, ...]
    """Text files and folders (text), or frames artifacts that follow each other (video)."""
    lengths: tuple[int, ...]
    """Tokens (text) or haystack frames (video)."""
    depths: tuple[float, ...]
    """0 to 1."""
    trials: int
    """Needles a cell; the paper 5."""
    distractors: int
    """Look-alikes in the haystack (text): 0, 3 or 5 in the paper."""
    needles: str
    """`drawn`, or a folder of images with a .jsonl (video)."""
    scoring: Scoring
    """`forced`: first choice at every answer token. `generate`: greedy. `both`."""
    training_length: int | None
    """Tokens of the longest sequence the language model was trained on, where its directory does not know."""
    seed: int
    """Of numbers, cities and pictures."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked grid: everything but the model's weights."""

    config: NiahConfig
    """As asked for."""
    path: Path
    """Resolved model directory."""
    tokenizer: Any
    """The model's."""
    test: Niah
    """Cells and their sequences."""
    cells: list[Cell]
    """In the order they are walked."""
    frames: tuple[Frames, ...]
    """The haystack's artifacts (video)."""
    shown: dict[str, Any]
    """What every row says of the run; `run` in it identifies model, haystack, prompt, scoring and seed."""

    def key(self, cell: Cell) -> str:
        """Sixteen hex digits of the run and the cell: what a result is found by."""
        return _hash({"run": self.shown["run"], "cell": asdict(cell)})

    def facts(self) -> dict[str, Any]:
        """What a dry run shows: the cells, the tokens to read, and the bytes of weights and cache on the device."""
        config = load_config(self.path)
        text = config.get_text_config()
        # One sequence at a time: all of a large grid's together are gigabytes.
        lengths = [len(self.test.sequence(cell)[0]) for cell in self.cells]
        pairs = itertools.pairwise(self.test.sequence(cell)[0] for cell in self.cells)
        shared = sum(common_prefix(a, b) for a, b in pairs)
        tokens, longest = sum(lengths), max(lengths)
        heads = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = torch.finfo(config.dtype or torch.float32).bits // 8
        cached = 2 * text.num_hidden_layers * text.num_key_value_heads * heads * width
        return {
            "cells": len(self.cells),
            "tokens": tokens,
            "tokens_once": tokens - shared,
            "longest_tokens": longest,
            "context": context_length(config),
            "weight_bytes": sum(file.stat().st_size for file in self.path.glob("*.safetensors")),
            "cache_bytes": cached * longest,
        }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def plan_niah(config: NiahConfig) -> Plan:
    """Check everything that can be checked without loading the model's weights.

    Raises UsageError for values out of their range, InputError for inputs that do not exist or do not fit.
    """
    if any(not 0 <= d <= 1 for d in config.depths):
        raise UsageError("--depths are between 0 and 1")
    if any(n < 1 for n in config.lengths):
        raise UsageError("--lengths are at least 1")
    path = resolve_model(config.model)
    tokenizer = load_tokenizer(path)
    test: Niah
    frames: tuple[Frames, ...] = ()
    if config.modality == "text":
        test = TextNiah(tokenizer, read_haystack(config.haystack), distractors=config.distractors, seed=config.seed)
    else:
        frames = _open_frames(config, path)
        test = _video_test(config, path, tokenizer, sum(len(f.pts) for f in frames))
    cells = test.cells(config.lengths, config.depths, config.trials)
    cells = [cells[i] for i in walk_order(test.sequence(cell)[0] for cell in cells)]
    manifest = read_manifest(path) if (path / MANIFEST).is_file() else {}
    trained = config.training_length or trained_length(path)
    made_of = {
        "model": fingerprint(path)[:16],
        "haystack": _hash([fingerprint(p) for p in config.haystack]),
        "prompt": _hash(test.prompt()),
        "scoring": config.scoring,
        "seed": config.seed,
    }
    shown = {
        "schema": schemas.NIAH,
        "run": _hash(made_of),
        "model": config.model,
        "modality": config.modality,
        "made_of": made_of,
        "chance": test.chance,
        "trained_length": trained,
        "longest_sample": int(manifest.get("longest_sample", 0)),
    }
    return Plan(config=config, path=path, tokenizer=tokenizer, test=test, cells=cells, frames=frames, shown=shown)


def _open_frames(config: NiahConfig, path: Path) -> tuple[Frames, ...]:
    hf = load_config(path)
    if hf.model_type != VLM_TYPE:
        raise UsageError(f"{config.model} is a language model and cannot see", fix="give a model that align wrote")
    tower = TowerFiles.find(path).fingerprint
    frames = []
    for file in config.haystack:
        one = read_frames(file)
        if one.provenance["inputs"].get("tower") != tower:
            raise InputError(
                "frames of another tower", where=file, fix=f"lvctx encode-video VIDEO --model {config.model}"
            )
        frames.append(one)
    return tuple(frames)


def _video_test(config: NiahConfig, path: Path, tokenizer: Any, frames: int) -> VideoNiah:
    hf = load_config(path)
    if config.needles == "drawn":
        needles = drawn_needles(config.trials, size=hf.vision_config.image_size, seed=config.seed)
        chance = 1 / len(COLORS)
    else:
        needles, chance = read_needles(Path(config.needles)), None
    return VideoNiah(
        tokenizer,
        needles,
        vocabulary=hf.get_text_config().vocab_size,
        frames=min(frames, max(config.lengths)),  # the others are not projected
        per_frame=tokens_per_frame(hf),
        chance=chance,
    )


def run_niah(
    plan: Plan,
    out: Path,
    *,
    device: str,
    chunk: int,
    reuse: bool,
    resume: str,
    force: bool,
    report: Callable[[int, int, str], None],
    threshold: float = THRESHOLD,
) -> Iterator[dict[str, Any]]:
    """Yield a row for every cell of the grid as it is done; rows that stand in `out/results.jsonl` are not run again.

    When all have run, summary.json, heatmap.json and heatmap.png are written from all rows of the file. A cell that
    fails on the way is an error row; it is run again next time. Raises InputError when `out` holds another run.
    """
    results = out / "results.jsonl"
    if resume == "must" and not results.is_file():
        raise InputError("nothing to resume", where=out, fix="drop --resume must")
    if resume == "never" and results.is_file() and not force:
        raise InputError("holds results already", where=out, fix="drop --resume never, or --force to start anew")
    with RowLog(results, fresh=force) as rows:
        for row in rows.rows.values():
            if row.get("run") != plan.shown["run"]:
                old, new = row.get("made_of", {}), plan.shown["made_of"]
                differs = ", ".join(sorted(key for key in new if old.get(key) != new[key]))
                raise InputError(
                    f"holds results of another run (other {differs})",
                    where=out,
                    fix="choose another -o, or --force to start anew",
                )
        keyed = [(plan.key(cell), cell) for cell in plan.cells]
        waiting = [(key, cell) for key, cell in keyed if key not in rows]
        if waiting:
            scorer = load_scorer(plan, device=device, chunk=chunk, reuse=reuse)
        for done, (key, cell) in enumerate(waiting, start=1):
            row = {"key": key, **plan.shown, **_run_cell(scorer, plan, cell)}
            rows.append(row)
            report(len(keyed) - len(waiting) + done, len(keyed), f"{cell.length} at {100 * cell.depth:g}%")
            yield row
        if waiting:
            log.info("%d cells, %d tokens through the model", len(waiting), scorer.tokens_run)
    if waiting or not (out / "summary.json").is_file():
        write_report(out, read_grid(out), threshold=threshold)


def load_scorer(plan: Plan, *, device: str, chunk: int, reuse: bool) -> PrefixScorer:
    """The model, ready to score the plan's sequences."""
    longest, context = max(len(plan.test.sequence(c)[0]) for c in plan.cells), context_length(load_config(plan.path))
    if longest > context:
        log.warning("up to %d tokens are read by a model that promises %d", longest, context)
    model = load_model(plan.path, device=device)
    table = _see(plan, model) if isinstance(plan.test, VideoNiah) else None
    return PrefixScorer(model, table, chunk=chunk, reuse=reuse)


@torch.inference_mode()
def _see(plan: Plan, model: Any) -> torch.Tensor:
    """The visual embeddings that the ids of a video's cells point into."""
    assert isinstance(plan.test, VideoNiah)
    wanted = max(plan.config.lengths)
    hay = []
    for frames in plan.frames:
        features = frames.features[:wanted]
        wanted -= len(features)
        hay += [embed_frames(model, batch) for batch in features.split(BATCH)]
    # Needles become squares the way the haystack's frames did.
    mode = plan.frames[0].provenance["config"].get("frame_mode", "pad")
    tower = load_tower(plan.path, dtype=model.dtype, device=str(model.device))
    squares = [tower.preprocess.square(needle.image, mode) for needle in plan.test.needles]
    needles = embed_frames(model, tower.see(squares))
    return visual_table(torch.cat(hay), needles, newline_embedding(model))


def _run_cell(scorer: PrefixScorer, plan: Plan, cell: Cell) -> dict[str, Any]:
    """The cell's own part of a row: verdict, answer's log-probability and rank; or what went wrong."""
    ids, answer = plan.test.sequence(cell)
    row = {**asdict(cell), "tokens": len(ids)}
    try:
        score = scorer.score(ids, answer, write=answer + 2 if plan.config.scoring != "forced" else 0)
    except RuntimeError as e:  # out of memory, above all: this cell is lost, the others need not be
        return {**row, "error": " ".join(str(e).split())[:300]}
    return {**row, **_verdicts(score, plan.tokenizer, cell.answer, plan.config.scoring)}


def _verdicts(score: Score, tokenizer: Any, answer: str, scoring: Scoring) -> dict[str, Any]:
    shown: dict[str, Any] = {"log_prob": round(score.log_prob, 4), "rank": score.rank}
    if scoring != "generate":
        shown["forced"] = score.forced
    if score.written is not None:
        text = tokenizer.decode(score.written, skip_special_tokens=True).strip()
        shown["written"] = text
        shown["generated"] = normalize(text).startswith(normalize(answer))
    return {"correct": shown["generated"] if scoring == "generate" else shown["forced"], **shown}


def normalize(text: str) -> str:
    """Lower case, single spaces, no space at the ends: what an answer is compared by."""
    return " ".join(text.lower().split())
