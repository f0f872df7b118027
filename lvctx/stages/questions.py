"""Ask a model a benchmark's questions about videos: frames encoded once a video, read once for all its questions.

Every question is a row of results.jsonl that carries all that decided it. A video that is missing or broken makes error
rows: a model is never asked about a video that it does not see.
"""

import itertools
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lvctx.artifacts import schemas
from lvctx.artifacts.result_log import RESULTS, ResultLog, short_hash
from lvctx.artifacts.store import fingerprint
from lvctx.bench.answers import Question
from lvctx.bench.subtitles import NONE, find_subtitles, read_subtitles
from lvctx.errors import InputError, LvctxError
from lvctx.model.load import DeviceMap, load_config, resolve_model
from lvctx.stages.looking import Look
from lvctx.vision.images import open_image

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset((
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".h265", ".hevc", ".ivf", ".m1v",
    ".m2t", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mpv", ".mts",
    ".mxf", ".nut", ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".wtv", ".y4m",
))  # fmt: skip
"""In lower case; those of FFmpeg's demuxers that users meet."""


@dataclass(frozen=True, kw_only=True)
class AskConfig:
    """What to ask whom, and how."""

    model: str
    """VLM: directory or hub id."""
    videos: Path
    """Folder of the videos (or images), searched recursively for names without their folder."""
    questions: Path
    """As released."""
    style: str
    """Which prompt; one of the benchmark's STYLES."""
    subtitles: Path | None
    """Folder of .srt or .vtt files named as the videos; None shows no subtitles."""
    max_new_tokens: int
    """Longest reply; lmms-eval 16."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked run: everything but the model's weights."""

    config: AskConfig
    """As asked for."""
    bench: ModuleType
    """The benchmark: samples(), prompt(), STYLES."""
    path: Path
    """Resolved model directory."""
    samples: tuple[Question, ...]
    """All of them, grouped by video in the order in which videos first appear."""
    look: Look
    """How frames are sampled and seen."""
    shown: dict[str, Any]
    """What every row says of the run; `run` in it identifies all that decides a reply but the video."""

    def key(self, sample: Question) -> str:
        """Sixteen hex digits of the run and the question."""
        return short_hash({"run": self.shown["run"], "id": sample.id})


def plan_questions(bench: ModuleType, config: AskConfig, look: Look) -> Plan:
    """Check everything that can be checked without weights or videos.

    Raises InputError for questions that cannot be read or are of another benchmark.
    """
    path = resolve_model(config.model)
    hf = load_config(path)
    if not config.videos.is_dir():
        raise InputError("no such folder of videos", where=config.videos)
    if config.subtitles is not None and not config.subtitles.is_dir():
        raise InputError("no such folder of subtitles", where=config.subtitles)
    samples = bench.samples(config.questions)
    first = {name: i for i, name in reversed(list(enumerate(s.video for s in samples)))}
    samples = sorted(samples, key=lambda s: first[s.video])
    counts = Counter(s.id for s in samples)
    if twice := [name for name, count in counts.items() if count > 1]:
        first_one = f"{twice[0]!r:.60}"
        raise InputError(f"{len(twice)} question ids are given twice, the first {first_one}", where=config.questions)
    probe = Question(id="", video="", question="{question}", options=("{options}",), answer="")
    listing = None if config.subtitles is None else "{subtitles}"
    dtype = str(hf.dtype or torch.float32).removeprefix("torch.")
    made_of = {
        "bench": bench.NAME,
        "model": fingerprint(path)[:16],
        "questions": fingerprint(config.questions)[:16],
        "prompt": short_hash(bench.prompt(probe, config.style, listing)),
        "style": config.style,
        "subtitles": config.subtitles is not None,
        "sampler": look.pictures if any(s.images for s in samples) else look.sampler,
        "dtype": dtype,
        "max_new_tokens": config.max_new_tokens,
    }
    shown = {
        "schema": schemas.QUESTIONS,
        "bench": bench.NAME,
        "run": short_hash(made_of),
        "model": config.model,
        "made_of": made_of,
    }
    return Plan(config=config, bench=bench, path=path, samples=tuple(samples), look=look, shown=shown)


def run_questions(
    plan: Plan,
    out: Path,
    *,
    device: str,
    device_map: DeviceMap | None,
    chunk: int,
    reuse: bool,
    resume: str,
    force: bool,
    report: Callable[[int, int, str], None],
) -> Iterator[dict[str, Any]]:
    """Yield a row for every question as it is answered; rows that stand in `out/results.jsonl` are not asked again.

    Raises InputError when `out` holds another run, MissingError for a `device_map` without accelerate.
    """
    with ResultLog.open(out / RESULTS, plan.shown["made_of"], resume=resume, force=force) as results:
        waiting = [s for s in plan.samples if plan.key(s) not in results]
        total, done = len(plan.samples), len(plan.samples) - len(waiting)
        asker: Any = None
        for video, group in itertools.groupby(waiting, key=lambda s: s.video):
            asker = asker or plan.look.open(plan.path, device=device, device_map=device_map, chunk=chunk, reuse=reuse)
            for sample, row in _ask_about(plan, asker, list(group)):
                stored = results.append(plan.key(sample), row)
                done += 1
                report(done, total, video)
                yield stored
        if hasattr(plan.bench, "export"):
            responses = {row["id"]: row["response"] for row in results.rows.values()}
            plan.bench.export(out, [(s, responses[s.id]) for s in plan.samples if s.id in responses])
        if asker:
            log.info("%d questions, %d tokens through the model", len(waiting), asker.reader.tokens_run)


def _ask_about(plan: Plan, asker: Any, samples: list[Question]) -> Iterator[tuple[Question, dict[str, Any]]]:
    """One video's questions, each with its row."""
    base = {s.id: {**plan.shown, **_described(s)} for s in samples}
    try:
        seen = _look(plan, asker, samples[0])
    except (LvctxError, torch.OutOfMemoryError) as e:
        yield from ((s, {**base[s.id], "error": str(e)}) for s in samples)
        return
    for sample in samples:
        text = plan.bench.prompt(sample, plan.config.style, seen.subtitles)
        ids = asker.ids(text)
        row = {**base[sample.id], **seen.facts, "tokens": len(ids), "last_position": asker.last_position(ids)}
        row["prompt_sha256"] = short_hash(text)
        try:
            written = asker.reply(ids, sample.max_new_tokens or plan.config.max_new_tokens)
        except (
            InputError,
            RuntimeError,
        ) as e:  # too long, or out of memory: this question is lost, the others need not be
            yield sample, {**row, "error": " ".join(str(e).split())[:300]}
        else:
            yield sample, {**row, "response": asker.text(written), "reply_tokens": len(written)}


def _described(sample: Question) -> dict[str, Any]:
    return {
        "id": sample.id,
        "video": sample.video,
        "answer": sample.answer,
        "letters": "".join(chr(65 + i) for i in range(len(sample.options))),
        "groups": dict(sample.groups),
    }


@dataclass(frozen=True, kw_only=True)
class _Seen:
    subtitles: str | None
    facts: dict[str, Any]


def _look(plan: Plan, asker: Any, sample: Question) -> _Seen:
    """Show the model a sample's video or images. Raises InputError where they are missing or broken."""
    if sample.images:
        return _look_at_images(plan, asker, sample)
    file = find_video(plan.config.videos, sample.video)
    watched = plan.look.video(asker, file)
    facts = {"file": str(file), **watched.facts}
    if plan.config.subtitles is None:
        return _Seen(subtitles=None, facts=facts)
    listing = find_subtitles(plan.config.subtitles, video_stem(sample.video))
    found = read_subtitles(listing) if listing else NONE
    shown = found.at(watched.pts)
    said = {"subtitle_lines": shown.count("\n") + 1 if shown else 0, "bad_subtitles": found.bad}
    return _Seen(subtitles=shown, facts={**facts, **said})


def _look_at_images(plan: Plan, asker: Any, sample: Question) -> _Seen:
    images = [open_image(plan.config.videos / name) for name in sample.images]
    plan.look.images(asker, images)
    return _Seen(subtitles=None, facts={"images": len(images), "visual_tokens": len(asker.block)})


def video_stem(name: str) -> str:
    """A video's name without its folder and a video's suffix; other dots stay, as in `talk.part2`."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    return stem if suffix.lower() in VIDEO_SUFFIXES else f"{stem}{suffix}"


def find_video(folder: Path, name: str) -> Path:
    """The file called `name` in `folder` or anywhere below it, hidden folders left out.

    Next best is the same suffix in other case, then the same stem with any video's suffix. Of equals, those in the
    folder that `name` says come first, then those directly in `folder`. Raises InputError where there is none, or where
    two fit as well.
    """
    name = unicodedata.normalize("NFC", name)  # macOS writes file names the other way
    wanted, parents = os.path.basename(name), [part for part in Path(name).parts[:-1] if part not in ("/", "..")]
    suffix = os.path.splitext(wanted)[1].lower()
    ranked: dict[tuple[bool, int, bool], list[Path]] = {}
    for at, folders, files in os.walk(folder):
        folders[:] = [one for one in folders if not one.startswith(".")]
        here = Path(at).relative_to(folder).parts
        elsewhere = list(here[len(here) - len(parents) :]) != parents
        for file in files:
            called = unicodedata.normalize("NFC", file)
            its = os.path.splitext(called)[1].lower()
            if called == wanted:
                fit = 0
            elif its in VIDEO_SUFFIXES and video_stem(called) == video_stem(wanted):
                fit = 1 if its == suffix else 2
            else:
                continue
            ranked.setdefault((elsewhere, fit, bool(here)), []).append(Path(at, file))
    if not ranked or not wanted:
        raise InputError(f"no video {name}", where=folder, fix="put it there; its questions count as failed")
    best = sorted(ranked[min(ranked)])
    if len(best) > 1:
        both = " and ".join(str(file.relative_to(folder)) for file in best[:2])
        raise InputError(f"two videos for {name}: {both}", where=folder, fix="keep one; its questions count as failed")
    return best[0]
