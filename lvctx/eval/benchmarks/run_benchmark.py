"""Run a benchmark: every question is asked about its video, whose frames are computed once for all its questions.

Every question is a row of results.jsonl with everything that decided the reply. A missing or broken video makes
error rows: no question is asked without its video.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from lvctx.artifacts import schemas
from lvctx.artifacts.result_log import RESULTS, ResultLog, read_results, short_hash
from lvctx.artifacts.store import fingerprint
from lvctx.errors import DiskError, InputError, LvctxError
from lvctx.eval.benchmarks.answers import Question
from lvctx.eval.benchmarks.input_checks import check_subtitles, check_videos, read_questions
from lvctx.eval.benchmarks.subtitles import NONE, find_subtitles, read_subtitles
from lvctx.eval.benchmarks.video_files import find_video, video_stem
from lvctx.inference.concurrency import interleave, read_ahead
from lvctx.inference.engine import Engine, EngineGone, Shown
from lvctx.inference.reply_batches import finish_in_batches
from lvctx.inference.sampling_params import SamplingParams
from lvctx.models.image_processing import open_image
from lvctx.parallel.context import ParallelContext
from lvctx.video.sampling import VideoSampling

Asked = tuple[Question, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """The model, videos and questions."""

    model: str
    """VLM: directory or hub id, or its name on a server."""
    videos: Path
    """Folder of the videos (or images), searched recursively for names without their folder."""
    questions: Path
    """As released."""
    prompt: str
    """Prompt template; one of the benchmark's STYLES."""
    subtitles: Path | None
    """Folder of .srt, .vtt or .jsonl files with the videos' names; None: no subtitles."""
    params: SamplingParams
    """How replies are generated; lmms-eval's are greedy and of 16 tokens."""
    protocol: dict[str, Any] | None = None
    """The published evaluation that the run follows, see `EvalProtocol.facts`."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkJob:
    """A checked run: everything except the model's weights."""

    config: BenchmarkConfig
    """The given configuration."""
    bench: ModuleType
    """Module of the benchmark: samples(), prompt(), STYLES."""
    sampling: VideoSampling
    """How videos are sampled."""
    samples: tuple[Question, ...]
    """All questions, grouped by video in order of first appearance."""
    run_facts: dict[str, Any]
    """Facts of the run for every row; their `run` identifies everything that decides a reply except the video."""

    def key(self, sample: Question) -> str:
        """Key of a question in this run: sixteen hex digits."""
        return short_hash({"run": self.run_facts["run"], "id": sample.id})


def plan_benchmark(bench: ModuleType, config: BenchmarkConfig, engine: Engine, sampling: VideoSampling) -> BenchmarkJob:
    """Check everything that can be checked without weights or videos.

    Raises InputError for questions that cannot be read or are of another benchmark, UsageError for sampling that the
    model does not support.
    """
    identity = engine.identity(sampling, images=False)
    if not config.videos.is_dir():
        raise InputError("no such folder of videos", where=config.videos)
    if config.subtitles is not None and not config.subtitles.is_dir():
        raise InputError("no such folder of subtitles", where=config.subtitles)
    samples = read_questions(bench, config.questions)
    first = {name: i for i, name in reversed(list(enumerate(s.video for s in samples)))}
    samples = sorted(samples, key=lambda s: first[s.video])
    counts = Counter(s.id for s in samples)
    if twice := [name for name, count in counts.items() if count > 1]:
        first_one = f"{twice[0]!r:.60}"
        raise InputError(f"{len(twice)} question ids occur twice, the first is {first_one}", where=config.questions)
    if any(s.images for s in samples):
        identity = engine.identity(sampling, images=True)
    probe = Question(id="", video="", question="{question}", options=("{options}",), answer="")
    listing = None if config.subtitles is None else "{subtitles}"
    made_of = {
        "bench": bench.NAME,
        **identity,
        "questions": fingerprint(config.questions)[:16],
        "prompt": short_hash(bench.prompt(probe, config.prompt, listing)),
        "style": config.prompt,
        "subtitles": config.subtitles is not None,
        "sampling_params": config.params.facts,
        **({"protocol": config.protocol} if config.protocol else {}),
    }
    run_facts = {
        "schema": schemas.QUESTIONS,
        "bench": bench.NAME,
        "run": short_hash(made_of),
        "model": config.model,
        "made_of": made_of,
    }
    return BenchmarkJob(config=config, bench=bench, sampling=sampling, samples=tuple(samples), run_facts=run_facts)


def run_benchmark(
    job: BenchmarkJob,
    out: Path,
    engine: Engine,
    *,
    parallel: ParallelContext,
    resume: str,
    force: bool,
    on_progress: Callable[[int, int, str], None],
) -> Iterator[dict[str, Any]]:
    """Yield a row for every question as it is answered; those in `out/results.jsonl` are not asked again.

    Of several groups of ranks each is asked about its share of the videos, and a group's ranks compute every reply
    together; its first rank writes and yields them, rank 0 the other groups' at the end. An engine that holds several
    conversations at once is asked about as many videos, and rows come as they are done. Raises InputError when `out`
    holds another run, where memory ends on a rank that others wait for, or where no further question can be answered.
    """
    made_of = job.run_facts["made_of"]
    with ExitStack() as stack:
        results: ResultLog | None = None
        if parallel.rank == 0:
            opened = ResultLog.open(out / RESULTS, made_of, resume=resume, force=force)
            results = stack.enter_context(opened)
        finished = parallel.gather(results.keys if results else set())[0]
        results = results or stack.enter_context(ResultLog.open(out / RESULTS, made_of, shared=True))
        pending = [s for s in job.samples if job.key(s) not in finished]
        by_video = [list(group) for _, group in itertools.groupby(pending, key=lambda s: s.video)]
        assigned = by_video[parallel.dp_rank :: parallel.dp]
        done = len(job.samples) - len(pending)
        total = done + sum(map(len, assigned))
        if pending:
            check_videos(job.config.videos, job.samples)
            if job.config.subtitles is not None:
                check_subtitles(job.config.subtitles, [s.video for s in job.samples])
        if assigned:
            engine.check()

        if engine.jobs == 1:
            rows: Generator[Asked, None, None] = _ask(job, engine, assigned)
        else:
            rows = interleave(assigned, lambda one: _ask(job, engine.fork(), [one]), jobs=engine.jobs)
        with closing(rows) as answered:
            for sample, row in answered:
                done += 1
                on_progress(done, total, sample.video)
                if parallel.ring.rank == 0:
                    yield results.append(job.key(sample), row)
        parallel.barrier()
        if parallel.rank == 0:
            stored = {row["key"]: row for row in read_results(out).values()}
            of_others = {job.key(s) for group in by_video for s in group} - {job.key(s) for g in assigned for s in g}
            yield from (stored[key] for s in pending if (key := job.key(s)) in of_others)
            if hasattr(job.bench, "export"):
                answered_samples = [s for s in job.samples if "error" not in stored[job.key(s)]]
                job.bench.export(out, [(s, stored[job.key(s)]["response"]) for s in answered_samples])


def _ask(job: BenchmarkJob, engine: Engine, by_video: Sequence[list[Question]]) -> Generator[Asked, None, None]:
    """Ask the questions about each video in order; yields each with its row."""
    with closing(_start(job, engine, by_video)) as started:
        for (sample, row), outcome in finish_in_batches(engine, started):
            if not isinstance(outcome, Exception):
                yield sample, {**row, "response": outcome.text, **outcome.facts, **engine.meter.take()}
                continue
            yield sample, {**row, "error": str(outcome), **engine.meter.take()}


def _start(
    job: BenchmarkJob, engine: Engine, by_video: Sequence[list[Question]]
) -> Generator[tuple[Asked, Any], None, None]:
    """Each question and what its row has without the reply, with its started reply or an error."""
    videos = read_ahead(by_video, partial(_load, job, engine), partial(_show, job, engine), engine)
    for samples, show in videos:
        base = {s.id: {**job.run_facts, **_described(s)} for s in samples}
        try:
            subtitles, facts = show()
        except (DiskError, EngineGone):
            raise
        except LvctxError as e:
            yield from (((s, base[s.id]), e) for s in samples)
            continue
        for sample in samples:
            text = job.bench.prompt(sample, job.config.prompt, subtitles)
            row = {**base[sample.id], **facts, "prompt_sha256": short_hash(text)}
            params = job.config.params
            if sample.max_new_tokens:
                params = replace(params, max_new_tokens=sample.max_new_tokens)
                row["max_new_tokens"] = sample.max_new_tokens
            started: Any
            try:
                started = engine.start_reply([text], params)
            except EngineGone:
                raise
            except InputError as e:  # too long, or out of memory: only this question fails
                started = e
            yield (sample, row), started


def _described(sample: Question) -> dict[str, Any]:
    return {
        "id": sample.id,
        "video": sample.video,
        "question": sample.question,
        "options": list(sample.options),
        "answer": sample.answer,
        "letters": "".join(chr(65 + i) for i in range(len(sample.options))),
        "groups": dict(sample.groups),
    }


def _load(job: BenchmarkJob, engine: Engine, samples: Sequence[Question]) -> tuple[Question, Path | None, Any]:
    """A sample's video or images, as the engine reads them. Raises InputError if they are missing or broken."""
    sample = samples[0]
    if sample.images:
        images = [open_image(job.config.videos / name) for name in sample.images]
        return sample, None, engine.load(images, VideoSampling())
    file = find_video(job.config.videos, sample.video)
    return sample, file, engine.load([file], job.sampling)


def _show(
    job: BenchmarkJob, engine: Engine, loaded: tuple[Question, Path | None, Any]
) -> tuple[str | None, dict[str, Any]]:
    """Give the model what was read; returns subtitles and facts for the rows."""
    sample, file, visual = loaded
    shown = engine.show_loaded(visual)
    if file is None:
        return None, {"images": len(sample.images), **shown.facts}
    subtitles, facts = _subtitles(job, sample, shown)
    if job.sampling.frames_from is not None:
        facts["frame_times"] = list(shown.pts)
    return subtitles, {"file": str(file), **shown.facts, **facts}


def _subtitles(job: BenchmarkJob, sample: Question, shown: Shown) -> tuple[str | None, dict[str, Any]]:
    if job.config.subtitles is None:
        return None, {}
    listing = find_subtitles(job.config.subtitles, video_stem(sample.video))
    subtitles = read_subtitles(listing) if listing else NONE
    lines = subtitles.text if getattr(job.bench, "WHOLE_SUBTITLES", False) else subtitles.at(list(shown.pts))
    return lines, {"subtitle_lines": lines.count("\n") + 1 if lines else 0, "bad_subtitles": subtitles.bad}
