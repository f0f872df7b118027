"""Shards of a benchmark run: each asks about every n-th video in a directory of its own, and merging makes one run.

A shard's directory has shard.json beside its rows: the whole run's questions, so that any shard knows what is missing.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lvctx.artifacts import schemas
from lvctx.artifacts.jsonl_log import write_jsonl
from lvctx.artifacts.lock import only_writer
from lvctx.artifacts.result_log import RESULTS, differing, read_results, short_hash
from lvctx.artifacts.store import read_json, write_json
from lvctx.errors import InputError, UsageError
from lvctx.eval.benchmarks.answers import Question
from lvctx.eval.benchmarks.run_benchmark import BenchmarkJob

SHARD_FILE = "shard.json"
"""File name in the directory of a shard."""


@dataclass(frozen=True)
class Shard:
    """One of `count` shares of a run."""

    number: int
    """From 1."""
    count: int
    """How many there are."""

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`2/4`. Raises UsageError."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UsageError(f"--shard {text!r}: no share of a run", fix="give 1/4, 2/4, 3/4 and 4/4 for four shards")
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, samples: Sequence[Question]) -> tuple[Question, ...]:
        """Its questions: those about every n-th video, in order of first appearance."""
        place = {video: i for i, video in enumerate(dict.fromkeys(s.video for s in samples))}
        return tuple(s for s in samples if place[s.video] % self.count == self.number - 1)


def start_shard(job: BenchmarkJob, shard: Shard, out: Path, *, force: bool, dry_run: bool = False) -> BenchmarkJob:
    """The shard's part of a run, which is noted in `out`. Raises InputError where `out` holds another shard."""
    file = out / SHARD_FILE
    if file.is_file() and not force and (held := read_json(file).get("shard")) != str(shard):
        raise InputError(f"holds shard {held}", where=out, fix="give every shard its own -o, or --force to start over")
    if dry_run:
        return replace(job, samples=shard.of(job.samples))
    out.mkdir(parents=True, exist_ok=True)
    facts = {key: job.run_facts[key] for key in ("bench", "run", "made_of")}
    questions = json.loads(json.dumps([asdict(s) for s in job.samples], default=str))
    write_json(file, {"schema": schemas.SHARD, "shard": str(shard), **facts, "questions": questions})
    return replace(job, samples=shard.of(job.samples))


@dataclass(kw_only=True)
class MergedRun:
    """The shards of one run as one."""

    bench: str
    """Name of the benchmark."""
    made_of: dict[str, Any]
    """What identifies the run."""
    questions: list[Question]
    """Of the whole run, in its order."""
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The row of each question that was asked, by its id: its reply if any shard has one, else an error."""

    @property
    def missing(self) -> list[str]:
        """Ids of questions that no shard was asked."""
        return [q.id for q in self.questions if q.id not in self.rows]

    @property
    def failed(self) -> list[str]:
        """Ids of questions that have an error alone."""
        return [q.id for q in self.questions if "error" in self.rows.get(q.id, {})]

    def missing_of_shards(self, count: int) -> list[str]:
        """Which of `count` shards were asked nothing, such as `2/4`."""
        missing = set(self.missing)
        shards = [Shard(number, count) for number in range(1, count + 1)]
        parts = [(str(shard), [q.id for q in shard.of(self.questions)]) for shard in shards]
        return [name for name, ids in parts if ids and missing.issuperset(ids)]


def read_shards(paths: Sequence[Path]) -> tuple[MergedRun, int]:
    """The run that these directories are shards of, and into how many it was cut.

    Raises InputError for a directory that is no shard, shards of different runs (naming what differs), or different
    replies to one question.
    """
    merged: MergedRun | None = None
    counts: Counter[int] = Counter()
    origin: dict[str, Path] = {}
    for path in paths:
        held = _read_shard(path)
        counts[Shard.parse(held["shard"]).count] += 1
        if merged is None:
            questions = [Question(**q) for q in held["questions"]]
            merged = MergedRun(bench=held["bench"], made_of=held["made_of"], questions=questions)
        elif held["run"] != short_hash(merged.made_of):
            what = f"is of another run than {paths[0]} (other {differing(held['made_of'], merged.made_of)})"
            raise InputError(what, where=path, fix="merge shards of one run")
        known = {q.id for q in merged.questions}
        for place, row in read_results(path).items():
            if row.get("run") != held["run"] or row.get("id") not in known:
                raise InputError("a row of another run", where=place, fix="run the shard again with --force")
            first = merged.rows.get(row["id"])
            if first is None or "error" in first:
                merged.rows[row["id"]], origin[row["id"]] = row, path
            elif "error" not in row and row.get("response") != first.get("response"):
                what = f"question {row['id']} has another reply in {origin[row['id']]}"
                raise InputError(what, where=place, fix="leave one of the two directories out")
    assert merged is not None
    return merged, max(counts)


def _read_shard(path: Path) -> dict[str, Any]:
    if not (path / SHARD_FILE).is_file():
        raise InputError(f"no {SHARD_FILE}", where=path, fix="give directories that a run with --shard wrote")
    held = read_json(path / SHARD_FILE)
    kinds = {"shard": str, "bench": str, "run": str, "made_of": dict, "questions": list}
    if wrong := [key for key, kind in kinds.items() if not isinstance(held.get(key), kind)]:
        raise InputError(f"missing or invalid {', '.join(wrong)}", where=path / SHARD_FILE)
    return held


def write_merged(merged: MergedRun, bench: ModuleType, out: Path, *, force: bool) -> None:
    """Write the one run: results.jsonl in the order of the questions, and the files for the benchmark's own scorer.

    Raises InputError where `out` holds another run.
    """
    run = short_hash(merged.made_of)
    with only_writer(out):
        if (out / RESULTS).is_file() and not force:
            for row in read_results(out).values():
                if row.get("run") != run:
                    what = f"holds results of another run (other {differing(row.get('made_of'), merged.made_of)})"
                    raise InputError(what, where=out, fix="choose another -o, or --force to start over")
        write_jsonl(out / RESULTS, [merged.rows[q.id] for q in merged.questions if q.id in merged.rows])
        if hasattr(bench, "export"):
            answered = [q for q in merged.questions if "error" not in merged.rows.get(q.id, {"error": ""})]
            bench.export(out, [(q, merged.rows[q.id]["response"]) for q in answered])
