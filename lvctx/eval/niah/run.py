"""Run a needle test: plan the cells, walk them with shared prefixes computed once, keep each as its own row."""

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvctx.artifacts import schemas
from lvctx.artifacts.result_log import RESULTS, ResultLog, read_results, short_hash
from lvctx.artifacts.store import fingerprint
from lvctx.errors import InputError, UsageError
from lvctx.eval.niah.heatmap import write_report
from lvctx.eval.niah.image_needles import NeedleSet, drawn_needles, read_needles
from lvctx.eval.niah.needle_task import Cell, NeedleTask
from lvctx.eval.niah.niah_config import NiahConfig, Scoring, TextNiahConfig, VideoNiahConfig
from lvctx.eval.niah.results import THRESHOLD, read_needle_results
from lvctx.eval.niah.text_needles import read_haystack
from lvctx.eval.niah.text_task import TextNeedleTask
from lvctx.eval.niah.video_task import VideoNeedleTask
from lvctx.inference.engine_config import CachePlacement
from lvctx.inference.prefix_scorer import PrefixScorer, Score, common_prefix, walk_order
from lvctx.models.adapter import longest_sample
from lvctx.models.loading import (
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
    trained_length,
    try_forward,
)
from lvctx.parallel.context import ParallelContext
from lvctx.parallel.ring_attention import Ring
from lvctx.rope.scaling import choose
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.base import VLM, VisualTokens, sequential_positions

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NiahJob:
    """A checked test: everything but the model's weights."""

    config: NiahConfig
    """As asked for, with one RoPE at most."""
    path: Path
    """Resolved model directory."""
    tokenizer: Any
    """The model's."""
    task: NeedleTask
    """Cells and their sequences."""
    scoring: Scoring
    """Resolved."""
    kv_cache: CachePlacement
    """Where keys and values are kept."""
    cells: list[Cell]
    """In the order they are walked."""
    visual: VisualTokens | None
    """The haystack's frames (video)."""
    images: tuple[Any, ...]
    """What is inserted among them."""
    run_facts: dict[str, Any]
    """Facts of the run in every row; `run` in it identifies model, haystack, prompt, scoring and seed."""

    def key(self, cell: Cell) -> str:
        """Sixteen hex digits of the run and the cell: what a result is found by."""
        return short_hash({"run": self.run_facts["run"], "cell": asdict(cell)})

    def last_position(self, ids_L: np.ndarray) -> int:
        """The largest position of a sequence: for M-RoPE far less than its tokens."""
        return int((self.visual.positions if self.visual else sequential_positions)(ids_L, 0).max())

    def model_config(self) -> Any:
        """The configuration that the model is evaluated with."""
        config = load_config(self.path)
        for scheme, number in self.config.rope:
            text, length = config.get_text_config(), context_length(config)
            theta, factor = (number, None) if scheme == "theta" else (None, number)
            chosen = choose(text, scheme=scheme, theta=theta, factor=factor, context=length, seq_len=0)
            text.rope_parameters = chosen.rope_parameters
        return config

    def costs(self, cp: int = 1) -> dict[str, Any]:
        """What a dry run shows: the cells, the tokens to compute, and a rank's bytes of weights and cache.

        `cp` ranks share a sequence: they divide the cache and each have all weights.
        """
        config = load_config(self.path)
        text = config.get_text_config()
        # One sequence at a time: all of a large grid's together are gigabytes.
        lengths = [len(self.task.sequence(cell)[0]) for cell in self.cells]
        pairs = itertools.pairwise(self.task.sequence(cell)[0] for cell in self.cells)
        shared = sum(common_prefix(a, b) for a, b in pairs)
        tokens, longest = sum(lengths), max(lengths)
        heads = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = torch.finfo(config.dtype or torch.float32).bits // 8
        channel = heads + 4 if self.kv_cache == "int8" else heads * width  # a float32 scale for each head and token
        return {
            "cells": len(self.cells),
            "tokens": tokens,
            "tokens_once": tokens - shared,
            "longest_tokens": longest,
            "last_position": max(self.last_position(self.task.sequence(cell)[0]) for cell in self.cells),
            "context": context_length(config),
            "weight_bytes": sum(file.stat().st_size for file in self.path.glob("*.safetensors")),
            "cache_bytes": 2 * text.num_hidden_layers * text.num_key_value_heads * channel * -(-longest // cp),
            "kv_cache": self.kv_cache,
            "cp": cp,
        }


def plan_text(config: TextNiahConfig, *, kv_cache: CachePlacement = "device") -> NiahJob:
    """Check everything that can be checked without loading the model's weights.

    Raises UsageError for values out of their range, InputError for inputs that do not exist or do not fit.
    """
    path = resolve_model(config.model)
    tokenizer = load_tokenizer(path)
    task = TextNeedleTask(
        tokenizer,
        read_haystack(config.haystack),
        distractors=config.distractors,
        seed=config.seed,
        task=config.task,
        count=config.count,
        nested=config.depths.nested,
        loop=config.loop,
    )
    return _plan(config, path, tokenizer, task, kv_cache=kv_cache)


def plan_video(
    config: VideoNiahConfig, vlm: VLM, sampling: VideoSampling, *, kv_cache: CachePlacement = "device"
) -> NiahJob:
    """The same for a video."""
    tokenizer = load_tokenizer(vlm.path)
    haystack = vlm.haystack(config.haystack, sampling, as_images=config.as_images)
    needles = _needles(config, haystack.image_size)
    seconds = haystack.seconds[: max(config.lengths)]  # the others are not used
    images = tuple(needle.image for needle in (*needles.needles, *needles.distractors))
    visual = haystack.tokens(len(seconds), images)
    task = VideoNeedleTask(
        tokenizer,
        needles,
        visual,
        seconds=seconds,
        question=config.question,
        tolerance=config.tolerance,
        nested=config.depths.nested,
        loop=config.loop,
        seed=config.seed,
    )
    return _plan(config, vlm.path, tokenizer, task, kv_cache=kv_cache, visual=visual, images=images)


def _needles(config: VideoNiahConfig, size: int) -> NeedleSet:
    if config.needles == "drawn":
        drawn = drawn_needles(config.trials, size=size, seed=config.seed, distractors=config.distractors)
        return drawn if config.question == "what" else replace(drawn, chance=None)
    read = read_needles(Path(config.needles))
    if config.distractors > len(read.distractors):
        raise UsageError(
            f"--distractors {config.distractors} with {len(read.distractors)} distractors in {config.needles}",
            fix='give them lines with "distractor": true',
        )
    return replace(read, distractors=read.distractors[: config.distractors])


def _plan(
    config: NiahConfig,
    path: Path,
    tokenizer: Any,
    task: NeedleTask,
    *,
    kv_cache: CachePlacement,
    visual: VisualTokens | None = None,
    images: Sequence[Any] = (),
) -> NiahJob:
    scoring: Scoring = config.scoring or ("forced" if task.can_force else "generate")
    if scoring != "generate" and not task.can_force:
        raise UsageError(f"--scoring {scoring}: this question is scored by what is generated", fix="--scoring generate")
    cells = task.cells(config.lengths, config.depths.values, config.trials)
    if not cells:
        raise UsageError("no depth of these falls into any length")
    cells = [cells[i] for i in walk_order(task.sequence(cell)[0] for cell in cells)]
    made_of = {
        "model": fingerprint(path)[:16],
        "haystack": short_hash([fingerprint(p) for p in config.haystack]),
        "prompt": short_hash(task.prompt()),
        "scoring": scoring,
        "seed": config.seed,
        "kv_cache": "int8" if kv_cache == "int8" else "exact",
        "rope": config.rope,
    }
    run_facts = {
        "schema": schemas.NIAH,
        "run": short_hash(made_of),
        "model": config.model,
        "modality": task.modality,
        "visual": visual.facts if visual else None,
        "made_of": made_of,
        "kv_cache": kv_cache,
        "chance": task.chance,
        "trained_length": config.training_length or trained_length(path),
        "longest_sample": longest_sample(path),
    }
    job = NiahJob(
        config=config,
        path=path,
        tokenizer=tokenizer,
        task=task,
        scoring=scoring,
        kv_cache=kv_cache,
        cells=cells,
        visual=visual,
        images=tuple(images),
        run_facts=run_facts,
    )
    job.model_config()  # a RoPE that the model cannot have is reported here
    return job


@dataclass(frozen=True, kw_only=True)
class NiahRun:
    """How a test is run: nothing that decides a result."""

    parallel: ParallelContext
    """Ranks and the device."""
    dtype: str = "auto"
    """Of the weights in memory; `auto` is the checkpoint's own."""
    prefill_chunk: int = 2048
    """Tokens of one forward."""
    reuse: bool = True
    """Compute what cells share once."""
    resume: str = "auto"
    force: bool = False
    on_progress: Callable[[int, int, str], None] = lambda done, total, note: None
    threshold: float = THRESHOLD
    """Accuracy from which a length counts for the effective length."""


def run_niah(job: NiahJob, out: Path, run: NiahRun) -> Iterator[dict[str, Any]]:
    """Yield a row for every cell as it is done; rows that `out/results.jsonl` has are not run again.

    When all have run, summary.json, heatmap.json and heatmap.png are written from all rows of the file. A cell that
    fails on the way is an error row; it is run again next time. Of several groups of ranks each runs its share of the
    cells; a group's first rank yields them, rank 0 the other groups' at the end. Raises InputError when `out` holds
    another run, or where memory ends on a rank that others wait for.
    """
    parallel, made_of = run.parallel, job.run_facts["made_of"]
    with ExitStack() as stack:
        results: ResultLog | None = None
        if parallel.rank == 0:
            opened = ResultLog.open(out / RESULTS, made_of, resume=run.resume, force=run.force)
            results = stack.enter_context(opened)
        finished = parallel.gather(set(results.rows) if results else set())[0]
        results = results or stack.enter_context(ResultLog.open(out / RESULTS, made_of, shared=True))
        keyed = [(job.key(cell), cell) for cell in job.cells]
        mine = partition_cells(job.cells, parallel.dp)[parallel.dp_rank]
        waiting = [(key, cell) for i, (key, cell) in enumerate(keyed) if i in mine and key not in finished]
        if waiting:
            scorer = load_scorer(job, run, ring=parallel.ring)
        for done, (key, cell) in enumerate(waiting, start=1):
            row = {**job.run_facts, **_run_cell(scorer, job, cell)}
            note = f"{cell.length} at {100 * cell.depth:g}%"
            run.on_progress(len(mine) - len(waiting) + done, len(mine), note)
            if parallel.ring.rank == 0:
                yield results.append(key, row)
        if waiting:
            log.info("%d cells, %d tokens through the model", len(waiting), scorer.tokens_run)
        ran = {key for keys in parallel.gather({key for key, _ in waiting}) for key in keys}
        if parallel.rank == 0:
            latest = {row["key"]: row for row in read_results(out).values()}
            others = ran - {key for key, _ in waiting}
            yield from (latest[key] for key, _ in keyed if key in others)
            if ran or not (out / "summary.json").is_file():
                write_report(out, read_needle_results(out), threshold=run.threshold)


def partition_cells(cells: list[Cell], groups: int) -> list[set[int]]:
    """Indices of the cells that each group of ranks runs.

    Cells of one needle at one place share most and stay together. Those with the most tokens after their needle go
    first, each time to the group that has least: what differs in the end is at most a small one.
    """
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        alike[cell.trial, cell.position].append(i)
    work = {key: max(cells[i].length for i in members) - key[1] for key, members in alike.items()}
    shares: list[set[int]] = [set() for _ in range(groups)]
    loads = [0] * groups
    for key in sorted(alike, key=lambda k: (-work[k], k)):
        group = loads.index(min(loads))
        shares[group].update(alike[key])
        loads[group] += work[key] + 1
    return shares


def load_scorer(job: NiahJob, run: NiahRun, *, ring: Ring) -> PrefixScorer:
    """The model, ready to score the job's sequences."""
    longest = max(job.last_position(job.task.sequence(c)[0]) for c in job.cells) + 1
    context = context_length(load_config(job.path))
    if longest > context:
        log.warning("evaluating %d positions with a model whose config allows %d", longest, context)
    dtype = run.dtype if run.dtype == "auto" else getattr(torch, run.dtype)
    model = load_model(job.path, config=job.model_config(), dtype=dtype, device=run.parallel.device)
    try_forward(model, job.path)
    return PrefixScorer(
        model,
        job.visual.table(model) if job.visual else None,
        chunk=run.prefill_chunk,
        reuse=run.reuse,
        kv_cache=job.kv_cache,
        positions=job.visual.positions if job.visual else sequential_positions,
        ring=ring,
    )


def _run_cell(scorer: PrefixScorer, job: NiahJob, cell: Cell) -> dict[str, Any]:
    """The cell's own part of a row: verdict, answer's log-probability and rank; or what went wrong."""
    ids, answer = job.task.sequence(cell)
    row = {**asdict(cell), "tokens": len(ids), "last_position": job.last_position(ids)}
    try:
        count = answer + job.task.extra_tokens if job.scoring != "forced" else 0
        score = scorer.score(ids, answer, generate=count)
    except (RuntimeError, MemoryError) as e:  # out of memory, above all: this cell is lost, the others need not be
        if scorer.ring.world > 1:  # the other ranks of the group wait for this one
            if isinstance(e, torch.OutOfMemoryError | MemoryError):
                fix = "more --cp, a smaller --prefill-chunk, or --kv-cache host"
                raise InputError("out of memory", where=f"{len(ids)} tokens", fix=fix) from e
            raise
        return {**row, "error": " ".join(f"{e or 'out of memory'}".split())[:300]}
    return {**row, **_verdicts(score, job, cell)}


def _verdicts(score: Score, job: NiahJob, cell: Cell) -> dict[str, Any]:
    verdicts: dict[str, Any] = {"log_prob": round(score.log_prob, 4), "rank": score.rank}
    if job.scoring != "generate":
        verdicts["teacher_forced"] = score.forced
    if score.generated is not None:
        verdicts["generated"] = job.tokenizer.decode(score.generated, skip_special_tokens=True).strip()
        verdicts["share"] = round(job.task.score_text(cell, verdicts["generated"]), 4)
    correct = verdicts["share"] == 1 if job.scoring == "generate" else score.forced
    return {"correct": correct, **verdicts}
