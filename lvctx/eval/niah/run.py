"""Run a needle test: score its cells, with shared prefixes computed once, and write a row for each."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.artifacts.result_log import RESULTS, ResultLog, read_results
from lvctx.errors import OutOfMemory, UsageError, memory_errors
from lvctx.eval.niah.frame_needles import FrameNeedles
from lvctx.eval.niah.heatmap import write_report
from lvctx.eval.niah.job import NiahJob
from lvctx.eval.niah.needle_task import Cell, is_same_text
from lvctx.eval.niah.results import THRESHOLD, read_needle_results
from lvctx.inference.open_engine import Scorer, is_forward_only, open_scorer
from lvctx.inference.prefix_scorer import Score
from lvctx.models.loading import (
    context_length,
    load_config,
    load_model,
    try_forward,
)
from lvctx.parallel.context import ParallelContext
from lvctx.parallel.ring_attention import Ring
from lvctx.parallel.work_shares import divide_work

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NiahRun:
    """Settings of a run that do not affect results."""

    parallel: ParallelContext
    """Ranks and device."""
    prefill_chunk: int | None = None
    """Tokens per forward; None chooses them from the free memory."""
    reuse: bool = True
    """Compute common prefixes of cells once."""
    resume: str = "auto"
    force: bool = False
    on_progress: Callable[[int, int, str], None] = lambda done, total, note: None
    threshold: float = THRESHOLD
    """Minimum accuracy of a length for the effective length."""


def run_niah(job: NiahJob, out: Path, run: NiahRun) -> Iterator[dict[str, Any]]:
    """Yield a row for every cell when it is done; cells in `out/results.jsonl` are not run again.

    When all have run, summary.json, heatmap.json and heatmap.png are written from all rows of the file. A failed cell
    is an error row, and is run again next time. Each of several groups of ranks runs its share of the cells; a group's
    first rank yields them, rank 0 those of other groups at the end. Raises InputError if `out` has another run, or if a
    rank that others wait for runs out of memory.
    """
    parallel, made_of = run.parallel, job.run_facts["made_of"]
    with ExitStack() as stack:
        results: ResultLog | None = None
        if parallel.rank == 0:
            opened = ResultLog.open(out / RESULTS, made_of, resume=run.resume, force=run.force)
            results = stack.enter_context(opened)
        finished = parallel.gather(results.keys if results else set())[0]
        results = results or stack.enter_context(ResultLog.open(out / RESULTS, made_of, shared=True))
        keyed = [(job.key(cell), cell) for cell in job.cells]
        assigned = partition_cells(job.cells, parallel.dp)[parallel.dp_rank]
        pending = [(key, cell) for i, (key, cell) in enumerate(keyed) if i in assigned and key not in finished]
        if pending:
            scorer = load_scorer(job, run, ring=parallel.ring)
        for done, (key, cell) in enumerate(pending, start=1):
            row = {**job.run_facts, **_run_cell(scorer, job, cell)}
            note = cell.place
            run.on_progress(len(assigned) - len(pending) + done, len(assigned), note)
            if parallel.ring.rank == 0:
                yield results.append(key, row)
        if pending:
            log.info("%d cells, %d tokens through the model", len(pending), scorer.tokens_run)
        new_keys = {key for keys in parallel.gather({key for key, _ in pending}) for key in keys}
        if parallel.rank == 0:
            latest = {row["key"]: row for row in read_results(out).values()}
            other_keys = new_keys - {key for key, _ in pending}
            yield from (latest[key] for key, _ in keyed if key in other_keys)
            if new_keys or not (out / "summary.json").is_file():
                write_report(out, read_needle_results(out), threshold=run.threshold)


def partition_cells(cells: list[Cell], groups: int) -> list[set[int]]:
    """Indices of the cells that each group of ranks runs.

    Cells with the same needle and position have the longest common prefix and stay together; their size is the tokens
    after their needle.
    """
    members_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        members_of[cell.trial, cell.position].append(i)
    sizes = {key: max(cells[i].length for i in members) - key[1] for key, members in sorted(members_of.items())}
    return [{i for key in share for i in members_of[key]} for share in divide_work(sizes, groups)]


def load_scorer(job: NiahJob, run: NiahRun, *, ring: Ring) -> Scorer:
    """The model, prepared to score the job's sequences. Raises UsageError for a ring or cache that it cannot have."""
    if is_forward_only(job.visual) and (ring.world > 1 or job.kv_cache != "device"):
        what = "this class of models runs by its own forward"
        raise UsageError(what, where="--cp, --kv-cache", fix="drop them")
    longest = max(job.last_position(job.task.sequence(c)[0]) for c in job.cells) + 1
    context = context_length(load_config(job.path))
    if longest > context:
        log.warning("evaluating %d positions with a model whose config allows %d", longest, context)
    model = load_model(job.path, config=job.model_config(), dtype=job.dtype, device=run.parallel.device)
    if not is_forward_only(job.visual):
        try_forward(model, job.path)
    return open_scorer(
        model,
        job.visual,
        chunk=run.prefill_chunk,
        reuse=run.reuse,
        kv_cache=job.kv_cache,
        meter=job.meter,
        ring=ring,
    )


def _run_cell(scorer: Scorer, job: NiahJob, cell: Cell) -> dict[str, Any]:
    """The cell's part of a row: result, the answer's log-probability and rank; or an error."""
    ids, answer = job.task.sequence(cell)
    part = job.task.part(cell.trial) if isinstance(job.task, FrameNeedles) else {}
    row = {**asdict(cell), **part, "tokens": len(ids), "last_position": job.last_position(ids)}
    try:
        count = job.task.max_new_tokens(answer) if job.scoring in ("generate", "both") else 0
        with memory_errors(where=f"{len(ids)} tokens", fix="use --cp, --kv-cache host or a smaller --prefill-chunk"):
            score = scorer.score(ids, answer, generate=count)
    except OutOfMemory as e:
        if scorer.ring.world > 1:  # the other ranks of the group wait for this one
            raise
        return {**row, "error": str(e), **job.meter.take()}
    job.meter.add(tokens_in=len(ids), tokens_out=len(score.generated or ()))
    if isinstance(job.task, FrameNeedles):
        job.meter.add(frames_shown=len(job.task.order(cell)))
    return {**row, **_verdicts(score, job, cell, ids[len(ids) - answer :]), **job.meter.take()}


def _verdicts(score: Score, job: NiahJob, cell: Cell, answer_A: np.ndarray) -> dict[str, Any]:
    verdicts: dict[str, Any] = {"log_prob": round(score.log_prob, 4), "rank": score.rank}
    if job.scoring != "generate":
        verdicts["teacher_forced"] = score.forced
    if score.generated is not None:
        verdicts["generated"] = job.tokenizer.decode(score.generated, skip_special_tokens=True).strip()
        verdicts["share"] = round(job.task.score_text(cell, verdicts["generated"]), 4)
    correct = verdicts["share"] == 1 if job.scoring == "generate" else score.forced
    if job.scoring in ("longvila", "videochat-flash"):
        verdicts["predicted"] = job.tokenizer.decode(score.predicted)
        correct = is_same_text(job.scoring, verdicts["predicted"], job.tokenizer.decode(answer_A.tolist()))
    return {"correct": correct, **verdicts}
