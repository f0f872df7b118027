"""A benchmark's run, a responses file, or answers of `vqa` in the report: scores, and every question with its verdicts.

No rule is implemented here: letters, verdicts and estimates are those of `eval/benchmarks`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

from lvctx.errors import InputError
from lvctx.eval.benchmarks.accuracy import BenchmarkRun, difference, read_benchmark_run, to_reply
from lvctx.eval.benchmarks.answers import RULES, BenchmarkReply, extract_letter, is_correct
from lvctx.eval.benchmarks.responses import read_responses
from lvctx.eval.benchmarks.score_run import as_responses, score_run
from lvctx.eval.report.run_facts import describe_run
from lvctx.eval.report.run_files import RunFile, check_fields
from lvctx.eval.report.thumbnails import Thumbnails

QUESTION_FIELDS = (
    "id",
    "video",
    "file",
    "question",
    "options",
    "answer",
    "response",
    "reasoning",
    "cut",
    "error",
    "cost",
)
"""Fields of a row that its question shows."""
SCORES = ("rules", "rule_sources", "warnings", "questions", "videos")
"""What a benchmark's score has beside breakdowns (`by_...`) and figures of its own."""
COMPARED = 10
"""Number of runs of a kind up to which all pairs are compared."""


def load_benchmark_of(row: Mapping[str, Any], where: object) -> ModuleType:
    """The module of the benchmark that a row is of. Raises InputError for an unknown one."""
    name = str(row.get("bench"))
    module = f"lvctx.eval.benchmarks.{name.replace('-', '_')}"
    try:
        bench = import_module(module) if re.fullmatch("[a-z0-9_-]+", name) else None
    except ModuleNotFoundError:
        bench = None
    if bench is None or getattr(bench, "NAME", None) != name:
        raise InputError(f"no benchmark {name!r:.60}", where=where, fix="give a run of a benchmark of this version")
    return bench


def benchmark_section(run: RunFile, thumbnails: Thumbnails) -> dict[str, Any]:
    """The run with its scores and questions. Raises InputError for rows of another form."""
    first = next(iter(run.rows.values()))
    bench = load_benchmark_of(first, run.path)
    check_fields(run.rows, {"id": str, "video": str})
    section = describe_run(run) | {"bench": bench.NAME}
    scored: dict[str, dict[str, Any]] = {}
    if any("error" not in row for row in run.rows.values()):
        benchmark_run = read_benchmark_run(run.path, bench)
        scored = {row["key"]: row for row in benchmark_run.rows}
        section |= scores_of(score_run(benchmark_run, bench))
        section["cells"] = cells_of(bench, benchmark_run, run.name)
        section["replies"] = [to_reply(row) for row in benchmark_run.rows if row["letters"]]
    rules = list(section.get("rules", {}))
    made_of = first.get("made_of")
    sampling = made_of.get("sampling") if isinstance(made_of, dict) else None
    questions = []
    for row in run.rows.values():
        question = {key: row[key] for key in QUESTION_FIELDS if row.get(key) is not None}
        groups = row.get("groups")
        question["groups"] = {str(k): str(v) for k, v in groups.items()} if isinstance(groups, dict) else {}
        if row.get("key") in scored:
            question["verdicts"] = list(verdicts(row, bench, rules))
        if isinstance(row.get("file"), str):
            question["images"] = thumbnails.of_video(row["file"], sampling=sampling)
        questions.append(question)
    return section | {"questions_list": questions, "rule": headline_rule(made_of, rules)}


def responses_section(run: RunFile) -> dict[str, Any]:
    """A responses file in Video-MME's format: scores and replies; it may lack the questions' text."""
    from lvctx.eval.benchmarks import videomme

    responses = read_responses(run.path)
    section = describe_run(run) | {"bench": videomme.NAME} | scores_of(videomme.score(responses))
    rules = list(section["rules"])
    questions = [
        {
            "id": reply.id,
            "video": reply.video,
            "answer": reply.answer,
            "response": reply.response,
            "groups": dict(reply.groups),
            "verdicts": [_verdict(reply, rule) for rule in rules],
        }
        for reply in responses.replies
    ]
    return section | {
        "samples": len(questions),
        "questions_list": questions,
        "rule": rules[0],
        "cells": videomme.cells(responses),
        "replies": responses.replies,
    }


def answers_section(run: RunFile, thumbnails: Thumbnails) -> dict[str, Any]:
    """A file of answers of `vqa`, which nothing scores."""
    check_fields(run.rows, {"path": str})
    questions = []
    for row in run.rows.values():
        renamed = {"id": Path(row["path"]).name, "video": row["path"], "response": row.get("answer")}
        kept = {key: row[key] for key in ("question", "reasoning", "cut", "error", "cost") if row.get(key) is not None}
        times = row.get("pts")
        pts = times if isinstance(times, list) and all(isinstance(t, int | float) for t in times) else []
        images = thumbnails.of_video(row["path"], pts=pts)
        questions.append({**renamed, **kept, "groups": {}, "images": images})
    return describe_run(run) | {"questions_list": questions}


def scores_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The score of a benchmark, its breakdowns in `by`, and figures of its own in `more`."""
    known = {*SCORES, "schema", "bench", "failed", "protocol", "file", "overlooked", "cost"}
    scores = {key: result[key] for key in SCORES if key in result}
    overlooked = [f"overlooked: {count:,} {what}" for what, count in result.get("overlooked", {}).items()]
    scores["warnings"] = [*result["warnings"], *overlooked]
    scores["by"] = {key[3:]: value for key, value in result.items() if key.startswith("by_")}
    scores["more"] = {k: v for k, v in result.items() if k not in known and not k.startswith("by_") and v is not None}
    return scores


def cells_of(bench: ModuleType, run: BenchmarkRun, name: str) -> list[dict[str, Any]]:
    """The table duration x domain x task of benchmarks that have these groups."""
    found: list[dict[str, Any]] = bench.cells(as_responses(run, name)) if hasattr(bench, "cells") else []
    return found


def verdicts(row: dict[str, Any], bench: ModuleType, rules: Sequence[str]) -> Iterator[dict[str, Any]]:
    """For each rule: `correct` (None if it does not count the reply), and `letter`, empty if the reply has none."""
    alone: dict[str, Any] | None = None
    for rule in rules:
        if rule in RULES and row["letters"]:
            yield _verdict(to_reply(row), rule)
            continue
        alone = bench.score([row])["rules"] if alone is None else alone
        mean, parsed = alone[rule]["mean"], alone[rule].get("parsed", 1)
        yield {"correct": None if mean is None else mean == 1, **({} if parsed or mean is None else {"letter": ""})}


def _verdict(reply: BenchmarkReply, rule: str) -> dict[str, Any]:
    return {"correct": is_correct(reply, rule), "letter": extract_letter(reply, rule)}


def headline_rule(made_of: Any, rules: Sequence[str]) -> str | None:
    """The rule of the run's protocol, else the first one."""
    protocol = made_of.get("protocol") if isinstance(made_of, dict) else None
    values = protocol.get("values") if isinstance(protocol, dict) else None
    stated = values.get("rule") if isinstance(values, dict) else None
    return stated if stated in rules else next(iter(rules), None)


def compare_runs(sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Paired differences of every two runs of one benchmark, on the questions that both answered."""
    chosen = [section for section in sections if section.get("replies")][:COMPARED]
    pairs = []
    for a, b in combinations(chosen, 2):
        if a["bench"] == b["bench"]:
            rules = {rule: vars(difference(a["replies"], b["replies"], rule)) for rule in RULES}
            pairs.append({"first": a["name"], "second": b["name"], "bench": a["bench"], "rules": rules})
    return pairs
