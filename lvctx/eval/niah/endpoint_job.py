"""Needle tests on an OpenAI-compatible server: every cell is one request, scored by what the model generates."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.artifacts import schemas
from lvctx.artifacts.result_log import RESULTS, ResultLog, short_hash
from lvctx.artifacts.store import fingerprint
from lvctx.config import OnProgress
from lvctx.cost import CostMeter
from lvctx.errors import InputError, UsageError
from lvctx.eval.niah.frame_needles import TEMPLATES, FrameNeedles
from lvctx.eval.niah.heatmap import write_report
from lvctx.eval.niah.job import TextTasks, build_text_task, input_facts
from lvctx.eval.niah.needle_sets import find_needles
from lvctx.eval.niah.needle_task import Cell
from lvctx.eval.niah.niah_config import NiahConfig, Scoring, TextNiahConfig, VideoNiahConfig
from lvctx.eval.niah.results import read_needle_results
from lvctx.inference.concurrency import interleave
from lvctx.inference.endpoint_config import TextEndpointConfig, VideoEndpointConfig
from lvctx.inference.endpoint_engine import EndpointEngine
from lvctx.inference.endpoint_frames import Part, frame_parts, image_part, resolve_for_endpoint
from lvctx.inference.engine import AnswerScore, EngineGone, Reply
from lvctx.inference.prefix_scorer import walk_order
from lvctx.inference.sampling_params import SamplingParams
from lvctx.models.loading import load_tokenizer, resolve_model
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.haystack_files import count_haystack_frames, read_haystack_images

CHAT_TOKENS = 64
"""Longest reply in a chat, where a model may say more than the answer."""


@dataclass(frozen=True, kw_only=True)
class EndpointNiahJob:
    """A checked test on a server."""

    engine: EndpointEngine
    """The model; each cell is asked about by an engine of its `fork`."""
    cells: list[Cell]
    """In the order they are walked: neighbours share most, for the server's prefix cache."""
    run_facts: dict[str, Any]
    """Fields of the run in every row."""
    ask: Callable[[EndpointEngine, Cell], Reply]
    """Ask for a cell's answer."""
    scoring: Scoring
    """Resolved: by what is generated, unless the user wants otherwise."""
    score_forced: Callable[[EndpointEngine, Cell], AnswerScore] | None
    """Score a cell's answer by teacher forcing; None where that cannot be done."""
    score_text: Callable[[Cell, str], float]
    """How much of the answer is in a reply, 0 to 1."""
    part: Callable[[int], dict[str, str]]
    """See `FrameNeedles.part`."""

    def key(self, cell: Cell) -> str:
        """Sixteen hex digits of the run and the cell."""
        return short_hash({"run": self.run_facts["run"], "cell": asdict(cell)})


def plan_endpoint_text(config: TextNiahConfig, server: TextEndpointConfig, engine: EndpointEngine) -> EndpointNiahJob:
    """Text needles on a server. Raises InputError for inputs that do not exist or do not fit, UsageError for values."""
    path = resolve_model(server.tokenizer or config.model, weights=False)
    tokenizer = load_tokenizer(path)
    task = build_text_task(config, tokenizer)
    cells = task.cells(config.lengths, config.depths.values, config.trials)
    order = walk_order(task.sequence(cell)[0] for cell in cells)

    def ask(one: EndpointEngine, cell: Cell) -> Reply:
        prompt, answer = text_prompt(task, cell)
        if server.prompt_as == "completion":
            return one.complete(prompt, SamplingParams(max_new_tokens=task.max_new_tokens(answer)))
        one.show_parts([])
        return one.reply([prompt], SamplingParams(max_new_tokens=max(CHAT_TOKENS, task.max_new_tokens(answer))))

    def score_forced(one: EndpointEngine, cell: Cell) -> AnswerScore:
        prompt, _ = text_prompt(task, cell)
        return one.score_continuation(prompt, text_of_ids(task, task.sequence(cell)[0]).removeprefix(prompt))

    can_force = task.can_force and server.prompt_as == "completion"

    return _plan(
        config,
        engine,
        [cells[i] for i in order],
        made_of={
            "prompt": short_hash(task.prompt()),
            "prompt_as": server.prompt_as,
            "tokenizer": short_hash(tokenizer.get_vocab()),
        },
        task=task,
        ask=ask,
        score_forced=score_forced if can_force else None,
        score_text=task.score_text if server.prompt_as == "completion" else task.score_chat,
    )


def text_prompt(task: TextTasks, cell: Cell) -> tuple[str, int]:
    """A cell's prompt as text, which the server tokenizes again, and how many tokens its answer has."""
    ids, answer = task.sequence(cell)
    return text_of_ids(task, ids[: len(ids) - answer]), answer


def text_of_ids(task: TextTasks, ids_L: np.ndarray) -> str:
    """Tokens as text, without those that a server adds."""
    return str(task.tokenizer.decode(ids_L, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def plan_endpoint_video(
    config: VideoNiahConfig, server: VideoEndpointConfig, sampling: VideoSampling, engine: EndpointEngine
) -> EndpointNiahJob:
    """Video needles on a server: the haystack's frames are decoded here and sent as images. Raises as for text."""
    if server.send not in ("auto", "images"):
        raise UsageError(f"--send {server.send}: needles are inserted among images", fix="--send images")
    if sampling.frames is not None or sampling.max_frames is not None or sampling.frames_from is not None:
        raise UsageError("a haystack is sampled at a rate", where="--frames, --max-frames", fix="give --fps")
    sampled = VideoSampling(**{**vars(resolve_for_endpoint(server, sampling)), "max_frames": None})
    assert sampled.fps is not None
    if sampled.fps == "native":
        raise UsageError("a haystack is sampled at a rate", where="--fps native", fix="give --fps a number")
    counts = [count_haystack_frames(file, sampled) for file in config.haystack]
    total = min(sum(count.frames for count in counts), max(config.lengths))
    task = FrameNeedles(
        find_needles(config, min(counts[0].width, counts[0].height)),
        seconds=np.arange(total) / float(sampled.fps),
        question=config.question,
        tolerance=config.tolerance,
        nested=config.depths.nested,
        loop=config.loop,
        seed=config.seed,
    )
    cells = task.cells(config.lengths, config.depths.values, config.trials)
    parts: list[Part] = []
    loading = threading.Lock()

    def load_parts(meter: CostMeter) -> None:
        """JPEG images of the haystack's frames, then of the needles and distractors."""
        images = chain.from_iterable(read_haystack_images(file, sampled, meter) for file in config.haystack)
        with meter.phase("encode"):
            made = [image_part(image, server) for image in islice(images, total)]
        if len(made) < total:
            raise InputError(f"ends before frame {total}", where=config.haystack[-1], fix="is the file whole?")
        parts.extend(made + [image_part(needle.image, server) for needle in (*task.needles, *task.distractors)])

    def ask(one: EndpointEngine, cell: Cell) -> Reply:
        with loading:
            if not parts:
                load_parts(one.meter)
        frames = [parts[int(number)] for number in task.order(cell)]
        one.show_parts(frame_parts(list(zip(task.times(cell), frames, strict=True)), server))
        return one.reply([cell.question], SamplingParams(max_new_tokens=CHAT_TOKENS))

    identity = engine.identity(sampled, images=False)
    return _plan(
        config,
        engine,
        [cells[i] for i in walk_order(task.order(cell) for cell in cells)],
        made_of={
            "prompt": short_hash({"question": TEMPLATES[config.question], **task.facts()}),
            "sampling": identity["sampling"],
            "endpoint": identity["endpoint"],
        },
        task=task,
        ask=ask,
        score_text=task.score_text,
    )


def _plan(
    config: NiahConfig,
    engine: EndpointEngine,
    cells: list[Cell],
    *,
    made_of: dict[str, Any],
    task: TextTasks | FrameNeedles,
    ask: Callable[[EndpointEngine, Cell], Reply],
    score_text: Callable[[Cell, str], float],
    score_forced: Callable[[EndpointEngine, Cell], AnswerScore] | None = None,
) -> EndpointNiahJob:
    scoring: Scoring = config.scoring or "generate"
    if scoring in ("longvila", "videochat-flash") or (scoring != "generate" and score_forced is None):
        raise UsageError(f"--scoring {scoring}: here a server's replies are scored", fix="--scoring generate")
    if not cells:
        raise UsageError("no depth of these falls into any length")
    made_of = {
        "model": config.model,
        "haystack": short_hash([fingerprint(path) for path in config.haystack]),
        "scoring": scoring,
        "seed": config.seed,
        **made_of,
        **({"extra_body": engine.config.extra_body} if engine.config.extra_body else {}),
    }
    run_facts = {
        "schema": schemas.NIAH,
        "run": short_hash(made_of),
        "model": config.model,
        "modality": task.modality,
        "made_of": made_of,
        **input_facts(config, task),
        "chance": task.chance,
        "trained_length": config.training_length,
        "longest_sample": None,
    }
    return EndpointNiahJob(
        engine=engine,
        cells=cells,
        run_facts=run_facts,
        ask=ask,
        scoring=scoring,
        score_forced=score_forced,
        score_text=score_text,
        part=task.part if isinstance(task, FrameNeedles) else lambda trial: {},
    )


def run_endpoint_niah(
    job: EndpointNiahJob,
    out: Path,
    *,
    resume: str,
    force: bool,
    threshold: float,
    on_progress: OnProgress,
) -> Iterator[dict[str, Any]]:
    """Yield a row for every cell as it is done; rows that `out/results.jsonl` has are not run again.

    At the end summary and heatmap are written from all rows. A cell that fails is an error row. Raises InputError when
    `out` holds another run, EngineGone where no further cell can be run.
    """
    made_of = job.run_facts["made_of"]
    with ResultLog.open(out / RESULTS, made_of, resume=resume, force=force) as results:
        pending = [cell for cell in job.cells if job.key(cell) not in results]
        if pending:
            job.engine.check()
        done = len(job.cells) - len(pending)

        def run(cell: Cell) -> Sequence[tuple[Cell, dict[str, Any]]]:
            return [(cell, run_endpoint_cell(job, job.engine.fork(), cell))]

        with closing(interleave(pending, run, jobs=job.engine.jobs)) as finished:
            for cell, row in finished:
                done += 1
                on_progress(done, len(job.cells), cell.place)
                yield results.append(job.key(cell), {**job.run_facts, **row})
        if pending or not (out / "summary.json").is_file():
            write_report(out, read_needle_results(out), threshold=threshold)


def run_endpoint_cell(job: EndpointNiahJob, engine: EndpointEngine, cell: Cell) -> dict[str, Any]:
    """The cell's own part of a row."""
    row: dict[str, Any] = {**asdict(cell), **job.part(cell.trial), "tokens": None}
    correct = False
    try:
        if job.scoring != "forced":
            reply = job.ask(engine, cell)
            share = round(job.score_text(cell, reply.text), 4)
            correct = share == 1
            row |= {"generated": reply.text, "share": share, **reply.facts}
        if job.scoring != "generate":
            assert job.score_forced is not None
            score = job.score_forced(engine, cell)
            correct = score.is_greedy
            row |= {"log_prob": round(score.log_prob, 4), "teacher_forced": score.is_greedy}
    except EngineGone:
        raise
    except InputError as e:
        return {**row, "error": str(e)[:300], **engine.meter.take()}
    return {**row, "correct": correct, **engine.meter.take()}
