"""Run a needle test: plan the grid, walk it with shared prefixes computed once, keep every cell as its own row."""

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from lvctx.artifacts import schemas
from lvctx.artifacts.result_log import RESULTS, ResultLog, read_results, short_hash
from lvctx.artifacts.store import fingerprint
from lvctx.bench.cache import Kept
from lvctx.bench.eyes import Eyes, open_eyes
from lvctx.bench.grid import THRESHOLD, read_grid
from lvctx.bench.heatmap import write_report
from lvctx.bench.niah import Cell, Niah
from lvctx.bench.prefix import PrefixScorer, Score, common_prefix, count_up, walk_order
from lvctx.bench.text_niah import TextNiah
from lvctx.bench.video_niah import Question, VideoNiah, chance_of, drawn_needles, read_needles
from lvctx.dist.context import SHARED_WORK_TIMEOUT, ParallelContext, open_context
from lvctx.dist.ring import Ring
from lvctx.errors import InputError, UsageError
from lvctx.model.adapter import longest_sample
from lvctx.model.load import (
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
    trained_length,
    try_forward,
)
from lvctx.positions.choose import SCHEMES, Scheme, choose
from lvctx.text.needle import Task, read_haystack
from lvctx.vision.hybrid import Hybrid

__all__ = ["SHARED_WORK_TIMEOUT", "NiahConfig", "Plan", "open_context", "plan_niah", "run_niah"]
log = logging.getLogger(__name__)
Scoring = Literal["forced", "generate", "both"]


@dataclass(frozen=True, kw_only=True)
class NiahConfig:
    """What to test."""

    model: str
    """Directory or hub id."""
    modality: Literal["text", "video"]
    """What the haystack is made of."""
    haystack: tuple[Path, ...]
    """Text files and folders (text); frames artifacts, or for Qwen-VL video files and folders of pictures (video)."""
    lengths: tuple[int, ...]
    """Tokens (text) or haystack frames (video)."""
    depths: tuple[float, ...]
    """0 to 1."""
    trials: int
    """Needles a cell; the paper 5."""
    distractors: int
    """Look-alikes in the haystack; for text 0, 3 or 5 in the paper."""
    needles: str
    """`drawn`, or a folder of images with a .jsonl (video)."""
    scoring: Scoring | None
    """`forced`: first choice at every answer token. `generate`: greedy. `both`. None: forced where that can be."""
    training_length: int | None
    """Tokens of the longest sequence the language model was trained on, where its directory does not know."""
    seed: int
    """Of numbers, cities and pictures."""
    nested: bool = False
    """Insertion points that all lengths share (see `lvctx.bench.niah`)."""
    loop: bool = False
    """Repeat a haystack that is shorter than a length."""
    task: Task = "single"
    """What is hidden in a text."""
    count: int = 4
    """Keys, values, queries or hops of a task; RULER's 4."""
    question: Question = "what"
    """Of a video: what the needle shows, or when it is shown."""
    tolerance: float = 2.0
    """Seconds that the answer to `when` may be off."""
    kept: Kept = "device"
    """Where the KV cache lives."""
    rope: tuple[str, float] | None = None
    """Positions to read with in place of the model's own, without training (LongVA figure 4): `theta` and a base, or
    `pi`, `ntk` or `yarn` and a factor."""
    fps: float | None = None
    """Frames a second of a video file; None is 1, as V-NIAH's."""
    hybrid: Hybrid | None = None
    """Resolution of a video file's frames; None is uniform."""
    allow_partial: bool = False
    """Whether a video file that is cut short or damaged is taken for what is left of it."""
    apart: bool = False
    """Every frame is a picture by itself, as in Visual Haystacks, instead of all being one film (Qwen-VL)."""


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
    scoring: Scoring
    """Resolved."""
    cells: list[Cell]
    """In the order they are walked."""
    eyes: Eyes | None
    """How the model sees the haystack (video)."""
    shown: dict[str, Any]
    """What every row says of the run; `run` in it identifies model, haystack, prompt, scoring and seed."""

    def key(self, cell: Cell) -> str:
        """Sixteen hex digits of the run and the cell: what a result is found by."""
        return short_hash({"run": self.shown["run"], "cell": asdict(cell)})

    def facts(self, cp: int = 1) -> dict[str, Any]:
        """What a dry run shows: the cells, the tokens to read, and a rank's bytes of weights and cache.

        `cp` ranks share a sequence: they divide the cache and each have all weights.
        """
        config = load_config(self.path)
        text = config.get_text_config()
        # One sequence at a time: all of a large grid's together are gigabytes.
        lengths = [len(self.test.sequence(cell)[0]) for cell in self.cells]
        pairs = itertools.pairwise(self.test.sequence(cell)[0] for cell in self.cells)
        shared = sum(common_prefix(a, b) for a, b in pairs)
        tokens, longest = sum(lengths), max(lengths)
        last = max(last_position(self, self.test.sequence(cell)[0]) for cell in self.cells)
        heads = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = torch.finfo(config.dtype or torch.float32).bits // 8
        channel = heads + 4 if self.config.kept == "int8" else heads * width  # a float32 scale for each head and token
        return {
            "cells": len(self.cells),
            "tokens": tokens,
            "tokens_once": tokens - shared,
            "longest_tokens": longest,
            "last_position": last,
            "context": context_length(config),
            "weight_bytes": sum(file.stat().st_size for file in self.path.glob("*.safetensors")),
            "cache_bytes": 2 * text.num_hidden_layers * text.num_key_value_heads * channel * -(-longest // cp),
            "kv": self.config.kept,
            "cp": cp,
        }


def last_position(plan: Plan, ids_L: np.ndarray) -> int:
    """The largest position of a sequence: for M-RoPE far less than its tokens."""
    return int((plan.eyes.positions if plan.eyes else count_up)(ids_L, 0).max())


def plan_niah(config: NiahConfig) -> Plan:
    """Check everything that can be checked without loading the model's weights.

    Raises UsageError for values out of their range, InputError for inputs that do not exist or do not fit.
    """
    if any(not 0 <= d <= 1 for d in config.depths):
        raise UsageError("--depths are between 0 and 1")
    if any(n < 1 for n in config.lengths):
        raise UsageError("--lengths are at least 1")
    path = resolve_model(config.model)
    _with_rope(load_config(path), config.rope)
    tokenizer = load_tokenizer(path)
    test: Niah
    eyes: Eyes | None = None
    layout: dict[str, Any] | None = None
    if config.modality == "text":
        test = TextNiah(
            tokenizer,
            read_haystack(config.haystack),
            distractors=config.distractors,
            seed=config.seed,
            task=config.task,
            count=config.count,
            nested=config.nested,
            loop=config.loop,
        )
    else:
        eyes = open_eyes(
            path,
            name=config.model,
            tokenizer=tokenizer,
            files=config.haystack,
            fps=config.fps,
            hybrid=config.hybrid,
            apart=config.apart,
            allow_partial=config.allow_partial,
        )
        video = test = _video_test(config, eyes, tokenizer)
        layout = video.layout.facts
    scoring: Scoring = config.scoring or ("forced" if test.forcible else "generate")
    if scoring != "generate" and not test.forcible:
        raise UsageError(f"--score {scoring}: this question is scored by what is written", fix="--score generate")
    cells = test.cells(config.lengths, config.depths, config.trials)
    if not cells:
        raise UsageError("no depth of these falls into any length")
    cells = [cells[i] for i in walk_order(test.sequence(cell)[0] for cell in cells)]
    made_of = {
        "model": fingerprint(path)[:16],
        "haystack": short_hash([fingerprint(p) for p in config.haystack]),
        "prompt": short_hash(test.prompt()),
        "scoring": scoring,
        "seed": config.seed,
        "kv": "int8" if config.kept == "int8" else "exact",
        "rope": config.rope,
    }
    shown = {
        "schema": schemas.NIAH,
        "run": short_hash(made_of),
        "model": config.model,
        "modality": config.modality,
        "layout": layout,
        "made_of": made_of,
        "kv": config.kept,
        "chance": test.chance,
        "trained_length": config.training_length or trained_length(path),
        "longest_sample": longest_sample(path),
    }
    return Plan(
        config=config,
        path=path,
        tokenizer=tokenizer,
        test=test,
        scoring=scoring,
        cells=cells,
        eyes=eyes,
        shown=shown,
    )


def _video_test(config: NiahConfig, eyes: Eyes, tokenizer: Any) -> VideoNiah:
    if config.needles == "drawn":
        needles, lookalikes = drawn_needles(
            config.trials, size=eyes.image_size, seed=config.seed, lookalikes=config.distractors
        )
        chance = chance_of(config.distractors) if config.question == "what" else None
    else:
        needles, lookalikes = read_needles(Path(config.needles))
        chance = None
        if config.distractors > len(lookalikes):
            raise UsageError(
                f"--distractors {config.distractors} with {len(lookalikes)} look-alikes in {config.needles}",
                fix='give them lines with "distractor": true',
            )
    lookalikes = lookalikes[: config.distractors]
    frames = min(len(eyes.seconds), max(config.lengths))  # the others are not looked at
    return VideoNiah(
        tokenizer,
        needles,
        layout=eyes.layout(frames, len(needles) + len(lookalikes)),
        frames=frames,
        chance=chance,
        lookalikes=lookalikes,
        seconds=eyes.seconds,
        question=config.question,
        tolerance=config.tolerance,
        nested=config.nested,
        loop=config.loop,
        seed=config.seed,
    )


def run_niah(
    plan: Plan,
    out: Path,
    *,
    world: ParallelContext,
    chunk: int,
    reuse: bool,
    resume: str,
    force: bool,
    report: Callable[[int, int, str], None],
    threshold: float = THRESHOLD,
) -> Iterator[dict[str, Any]]:
    """Yield a row for every cell of the grid as it is done; rows that stand in `out/results.jsonl` are not run again.

    When all have run, summary.json, heatmap.json and heatmap.png are written from all rows of the file. A cell that
    fails on the way is an error row; it is run again next time. Of several groups in `world` each runs its share of the
    cells; a group's first rank yields them, rank 0 the other groups' at the end. Raises InputError when `out` holds
    another run, or where memory ends on a rank that others wait for.
    """
    made_of = plan.shown["made_of"]
    with ExitStack() as stack:
        results: ResultLog | None = None
        if world.rank == 0:
            opened = ResultLog.open(out / RESULTS, made_of, resume=resume, force=force)
            results = stack.enter_context(opened)
        finished = world.gather(set(results.rows) if results else set())[0]
        results = results or stack.enter_context(ResultLog.open(out / RESULTS, made_of, shared=True))
        keyed = [(plan.key(cell), cell) for cell in plan.cells]
        mine = partition_cells(plan.cells, world.dp)[world.dp_rank]
        waiting = [(key, cell) for i, (key, cell) in enumerate(keyed) if i in mine and key not in finished]
        if waiting:
            scorer = load_scorer(plan, device=world.device, chunk=chunk, reuse=reuse, ring=world.ring)
        for done, (key, cell) in enumerate(waiting, start=1):
            row = {**plan.shown, **_run_cell(scorer, plan, cell)}
            report(len(mine) - len(waiting) + done, len(mine), f"{cell.length} at {100 * cell.depth:g}%")
            if world.ring.rank == 0:
                yield results.append(key, row)
        if waiting:
            log.info("%d cells, %d tokens through the model", len(waiting), scorer.tokens_run)
        ran = {key for keys in world.gather({key for key, _ in waiting}) for key in keys}
        if world.rank == 0:
            latest = {row["key"]: row for row in read_results(out).values()}
            others = ran - {key for key, _ in waiting}
            yield from (latest[key] for key, _ in keyed if key in others)
            if ran or not (out / "summary.json").is_file():
                write_report(out, read_grid(out), threshold=threshold)


def partition_cells(cells: list[Cell], groups: int) -> list[set[int]]:
    """Indices of the cells that each group of ranks runs.

    Cells of one needle at one place read the same and stay together. Those that read most after their needle go first,
    each time to the group that has least to read: what differs in the end is at most a small one.
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


def load_scorer(plan: Plan, *, device: str, chunk: int, reuse: bool, ring: Ring) -> PrefixScorer:
    """The model, ready to score the plan's sequences."""
    longest = max(last_position(plan, plan.test.sequence(c)[0]) for c in plan.cells) + 1
    context = context_length(load_config(plan.path))
    if longest > context:
        log.warning("up to %d positions are read by a model that promises %d", longest, context)
    model = load_model(plan.path, config=_with_rope(load_config(plan.path), plan.config.rope), device=device)
    try_forward(model, plan.path)
    table = None
    if plan.eyes is not None:
        assert isinstance(plan.test, VideoNiah)
        images = [needle.image for needle in (*plan.test.needles, *plan.test.lookalikes)]
        table = plan.eyes.table(model, min(len(plan.eyes.seconds), max(plan.config.lengths)), images)
    positions = plan.eyes.positions if plan.eyes else count_up
    return PrefixScorer(model, table, chunk=chunk, reuse=reuse, kept=plan.config.kept, positions=positions, ring=ring)


def _with_rope(config: Any, rope: tuple[str, float] | None) -> Any:
    """A model's configuration with other positions. Raises UsageError for an unknown scheme or a number below 1."""
    if rope is not None:
        scheme, number = rope
        if scheme not in SCHEMES:
            raise UsageError(f"--rope {scheme} is unknown", fix=f"one of {', '.join(SCHEMES)}, then : and a number")
        if number < 1:
            raise UsageError(f"--rope {scheme}:{number:g} is less than 1")
        text, length = config.get_text_config(), context_length(config)
        theta, factor = (number, None) if scheme == "theta" else (None, number)
        chosen = choose(text, scheme=cast(Scheme, scheme), theta=theta, factor=factor, context=length, seq_len=0)
        text.rope_parameters = chosen.rope_parameters
    return config


def _run_cell(scorer: PrefixScorer, plan: Plan, cell: Cell) -> dict[str, Any]:
    """The cell's own part of a row: verdict, answer's log-probability and rank; or what went wrong."""
    ids, answer = plan.test.sequence(cell)
    row = {**asdict(cell), "tokens": len(ids), "last_position": last_position(plan, ids)}
    try:
        score = scorer.score(ids, answer, write=answer + plan.test.spare if plan.scoring != "forced" else 0)
    except (RuntimeError, MemoryError) as e:  # out of memory, above all: this cell is lost, the others need not be
        if scorer.ring.world > 1:  # the other ranks of the group wait for this one
            if isinstance(e, torch.OutOfMemoryError | MemoryError):
                fix = "more --cp, a smaller --chunk, or --kv host"
                raise InputError("out of memory", where=f"{len(ids)} tokens", fix=fix) from e
            raise
        return {**row, "error": " ".join(f"{e or 'out of memory'}".split())[:300]}
    return {**row, **_verdicts(score, plan, cell)}


def _verdicts(score: Score, plan: Plan, cell: Cell) -> dict[str, Any]:
    shown: dict[str, Any] = {"log_prob": round(score.log_prob, 4), "rank": score.rank}
    if plan.scoring != "generate":
        shown["forced"] = score.forced
    if score.written is not None:
        text = plan.tokenizer.decode(score.written, skip_special_tokens=True).strip()
        shown["written"] = text
        shown["share"] = round(plan.test.judge(cell, text), 4)
        shown["generated"] = shown["share"] == 1
    return {"correct": shown["generated"] if plan.scoring == "generate" else shown["forced"], **shown}
