"""Run a needle test: plan the grid, walk it with shared prefixes computed once, keep every cell as its own row."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lvctx.artifacts import schemas
from lvctx.artifacts.frames import read_frames
from lvctx.artifacts.manifest import MANIFEST, read_manifest
from lvctx.artifacts.rows import RowLog
from lvctx.artifacts.store import fingerprint
from lvctx.bench.grid import build_grid
from lvctx.bench.heatmap import write_report
from lvctx.bench.niah import (
    Cell,
    Niah,
    TextNiah,
    VideoNiah,
    drawn_needles,
    read_needles,
    visual_table,
)
from lvctx.bench.prefix import PrefixScorer, Score
from lvctx.errors import InputError, UsageError
from lvctx.model.load import VLM_TYPE, load_config, load_model, load_tokenizer, resolve_model, trained_length
from lvctx.model.vlm import embed_frames, newline_embedding, tokens_per_frame
from lvctx.text.needle import read_haystack
from lvctx.vision.draw import COLORS
from lvctx.vision.tower import load_tower

log = logging.getLogger(__name__)
Scoring = Literal["forced", "generate", "both"]


@dataclass(frozen=True, kw_only=True)
class NiahConfig:
    """What to test."""

    model: str
    """Directory or hub id."""
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
    chunk: int
    """Tokens of one forward."""
    reuse: bool
    """Compute shared prefixes once."""
    seed: int
    """Of numbers, cities and pictures."""


def run_niah(
    config: NiahConfig,
    modality: Literal["text", "video"],
    out: Path,
    *,
    device: str,
    force: bool,
    report: Callable[[int, int, str], None],
) -> Iterator[dict[str, Any]]:
    """Yield a row for every cell of the grid as it is done; rows that stand in `out/results.jsonl` are not run again.

    When all have run, summary.json, heatmap.json and heatmap.png are written. Raises InputError for inputs that do not
    fit, before anything runs; a cell that fails on the way is an error row.
    """
    if any(not 0 <= d <= 1 for d in config.depths):
        raise UsageError("--depths are between 0 and 1")
    path = resolve_model(config.model)
    sees = load_config(path).model_type == VLM_TYPE
    if modality == "video" and not sees:
        raise UsageError(f"{config.model} is a language model and cannot see", fix="give a model that align wrote")
    tokenizer = load_tokenizer(path)
    model, visual = None, None
    test: Niah
    if modality == "text":
        test = TextNiah(tokenizer, read_haystack(config.haystack), distractors=config.distractors, seed=config.seed)
    else:
        model = load_model(path, device=device)
        test, visual = _video(config, path, model, tokenizer)
    cells = test.cells(config.lengths, config.depths, config.trials)
    base = _base_row(config, path, test)
    keyed = [(row_key(base, config, cell), cell) for cell in cells]
    with RowLog(out / "results.jsonl", fresh=force) as rows:
        waiting = [(key, cell) for key, cell in keyed if key not in rows]
        if waiting:
            model = model or load_model(path, device=device)
            scorer = PrefixScorer(model, visual, chunk=config.chunk, reuse=config.reuse)
            for done, (key, cell) in enumerate(waiting, start=1):
                row = {"key": key, **base["shown"], **_run_cell(scorer, test, tokenizer, cell, config.scoring)}
                rows.append(row)
                report(len(cells) - len(waiting) + done, len(cells), f"{cell.length} at {100 * cell.depth:g}%")
                yield row
            log.info("%d cells, %d tokens through the model", len(waiting), scorer.tokens_run)
        found = [rows.rows[key] for key, _ in keyed]
    write_report(out, build_grid(found, out.name))


def _video(config: NiahConfig, path: Path, model: Any, tokenizer: Any) -> tuple[VideoNiah, torch.Tensor]:
    """The video test and the visual embeddings its ids point into."""
    hay, mode = [], None
    for file in config.haystack:
        frames = read_frames(file)
        mode = mode or frames.provenance["config"].get("frame_mode")
        with torch.inference_mode():
            try:
                hay.append(embed_frames(model, frames.features))
            except InputError as e:
                raise InputError(e.what, where=file, fix=e.fix) from None
    size = model.config.vision_config.image_size
    if config.needles == "drawn":
        needles, chance = drawn_needles(config.trials, size=size, seed=config.seed), 1 / len(COLORS)
    else:
        needles = read_needles(Path(config.needles))
        chance = 0.0  # an open question has no chance level that we know
    tower = load_tower(path, dtype=model.dtype, device=str(model.device))
    squares = [tower.preprocess.square(n.image, mode or "pad") for n in needles]
    with torch.inference_mode():
        seen = embed_frames(model, tower.see(squares))
        table = visual_table(torch.cat(hay), seen, newline_embedding(model))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    per_frame = tokens_per_frame(model.config)
    frames_in_all = (len(table) - 1) // per_frame - len(needles)
    return VideoNiah(tokenizer, vocabulary, frames_in_all, per_frame, needles, chance), table


def _base_row(config: NiahConfig, path: Path, test: Niah) -> dict[str, Any]:
    """What all rows share: `shown` in them, `hashed` into their keys."""
    manifest = read_manifest(path) if (path / MANIFEST).is_file() else {}
    shown = {
        "schema": schemas.NIAH,
        "model": config.model,
        "modality": test.modality,
        "chance": test.chance,
        "trained_length": trained_length(path),
        "longest_sample": int(manifest.get("longest_sample", 0)),
        "seed": config.seed,
    }
    hashed = {
        "model": fingerprint(path),
        "haystack": [fingerprint(p) for p in config.haystack],
        "needles": config.needles if config.needles == "drawn" else fingerprint(Path(config.needles)),
        "prompt": test.prompt(),
    }
    return {"shown": shown, "hashed": hashed}


def row_key(base: dict[str, Any], config: NiahConfig, cell: Cell) -> str:
    """Sixteen hex digits that change with model, haystack, needles, prompt, scoring or cell."""
    decided = {**base["hashed"], "scoring": config.scoring, "seed": config.seed, "cell": asdict(cell)}
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


def _run_cell(scorer: PrefixScorer, test: Niah, tokenizer: Any, cell: Cell, scoring: Scoring) -> dict[str, Any]:
    """The cell's own part of a row: verdict, answer's log-probability and rank; or what went wrong."""
    ids, answer = test.sequence(cell)
    row = {**asdict(cell), "tokens": len(ids)}
    try:
        score = scorer.score(ids, answer, write=answer + 2 if scoring != "forced" else 0)
    except RuntimeError as e:  # out of memory, above all: this cell is lost, the others need not be
        return {**row, "error": " ".join(str(e).split())[:300]}
    return {**row, **_verdicts(score, tokenizer, cell.answer, scoring)}


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
