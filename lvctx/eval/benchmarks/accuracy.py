"""Accuracy of replies under the rules of `answers`: overall, by group, and for two runs compared. No torch."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lvctx.artifacts.result_log import read_results
from lvctx.errors import InputError
from lvctx.eval.benchmarks.answers import (
    RULE_SOURCES,
    RULES,
    BenchmarkReply,
    extract_letter,
    is_correct,
    response_warnings,
)
from lvctx.eval.benchmarks.fields import check_unicode
from lvctx.eval.statistics import DETECT, Difference, Estimate, clustered_mean, paired_difference

DURATIONS = ("short", "medium", "long")


def accuracy(replies: Iterable[BenchmarkReply], rule: str) -> Estimate:
    """Share of right answers under a rule, with its interval clustered by video."""
    counted = [(float(v), r.video) for r in replies if (v := is_correct(r, rule)) is not None]
    return clustered_mean([v for v, _ in counted], [video for _, video in counted])


def difference(
    first: Sequence[BenchmarkReply], second: Sequence[BenchmarkReply], rule: str, *, detect: float = DETECT
) -> Difference:
    """First minus second on the questions that the rule counts in both; paired, clustered by video."""
    second_correct = {r.id: is_correct(r, rule) for r in second}
    pairs = [
        (float(a) - float(b), r.video)
        for r in first
        if (a := is_correct(r, rule)) is not None and (b := second_correct.get(r.id)) is not None
    ]
    return paired_difference([d for d, _ in pairs], [video for _, video in pairs], detect=detect)


def sorted_groups(replies: Iterable[BenchmarkReply], group: str) -> list[str]:
    """The existing values of a group: durations and numbers by size, others alphabetically."""
    values = {r.groups[group] for r in replies}
    rank = {name: i for i, name in enumerate(DURATIONS)}
    return sorted(values, key=lambda v: (rank.get(v, len(rank)), len(v) if v.isdecimal() else 0, v))


def breakdown(replies: Sequence[BenchmarkReply], groups: Sequence[str]) -> dict[str, Any]:
    """Warnings, every rule over all replies, and every rule by every value of `groups`."""
    summary: dict[str, Any] = {
        "warnings": response_warnings(replies),
        "questions": len(replies),
        "videos": len({r.video for r in replies}),
        "rules": {
            rule: vars(accuracy(replies, rule))
            | {"parsed": sum(bool(extract_letter(r, rule)) for r in replies) / max(len(replies), 1)}
            for rule in RULES
        },
        "rule_sources": RULE_SOURCES,
    }
    for group in groups:
        parts: dict[str, list[BenchmarkReply]] = {value: [] for value in sorted_groups(replies, group)}
        for reply in replies:
            parts[reply.groups[group]].append(reply)
        summary[f"by_{group}"] = {
            value: {rule: vars(accuracy(part, rule)) for rule in RULES} for value, part in parts.items()
        }
    return summary


def own_rule(rule: str, scores: Mapping[str, Estimate], *, chance: float) -> dict[str, Any]:
    """What `score` gives as `official`: the scores of a benchmark's own scorer, and what random letters would get."""
    return {"rule": rule, "chance": chance, "scores": {name: vars(estimate) for name, estimate in scores.items()}}


def letter_chance(replies: Sequence[BenchmarkReply]) -> float:
    """The expected accuracy of random letters."""
    return sum(1 / len(r.letters) for r in replies) / max(len(replies), 1)


@dataclass(frozen=True, kw_only=True)
class BenchmarkRun:
    """The results of a run."""

    rows: list[dict[str, Any]]
    """Rows of the questions that were answered and can be scored."""
    failed: int
    """Number of questions that were not answered."""
    warnings: list[str]
    """Notes on values that were left out or read as empty, with the first question of each kind."""


def read_benchmark_run(directory: Path, bench: ModuleType) -> BenchmarkRun:
    """Rows of a run of `bench`. Raises InputError if there is no such run, or a row is invalid."""
    stored = read_results(directory)
    answered = [row for row in stored.values() if "error" not in row]
    for where, row in stored.items():
        if "error" not in row:
            _check_row(row, bench, where)
    if not answered:
        raise InputError("no question was answered", where=directory)
    notes = Notes()
    rows = []
    for row in answered:
        if not isinstance(row.get("response"), str):
            notes.add(NO_TEXT, row["id"], row.get("response"))
            row = {**row, "response": ""}
        lettered = bool(row["letters"])
        if (lettered and row["answer"] and row["answer"] in row["letters"]) or (not lettered and bench.FREE_ANSWERS):
            rows.append(row)
        else:
            notes.add(NO_KEY if row["answer"] else NO_ANSWER, row["id"], row["answer"])
    if not rows:
        raise InputError(f"nothing can be scored: {notes.lines()[0]}", where=directory)
    warnings = [*failure_warnings(stored.values()), *notes.lines()]
    if cut := sum(bool(row.get("cut")) for row in rows):
        warnings.append(CUT.format(cut=cut))
    return BenchmarkRun(rows=rows, failed=len(stored) - len(answered), warnings=warnings)


def failure_warnings(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """How many of a run's questions failed, with the most frequent error; nothing where none did."""
    errors = ["" if "error" not in row else str(row["error"]) or "no reason" for row in rows]
    counts = Counter(error for error in errors if error)
    if not counts:
        return []
    ((error, count),) = counts.most_common(1)
    failed = f"{counts.total():,} of {len(errors):,} questions failed and are left out"
    return [f"{failed}; {count:,} of them: {error:.200}"]


def _check_row(row: Mapping[str, Any], bench: ModuleType, location: str) -> None:
    if row.get("bench") != bench.NAME:
        name = f"{row.get('bench')!s:.60}"
        raise InputError(f"the run is of {name}", where=location, fix=f"lvctx bench {name} score")
    groups = row.get("groups")
    fits = {name: isinstance(row.get(name), str) for name in ("id", "video", "answer", "letters")}
    fits["letters"] = fits["letters"] and re.fullmatch("[A-Z]{0,26}", row["letters"]) is not None
    fits["groups"] = isinstance(groups, dict) and all(isinstance(groups.get(name), str) for name in bench.GROUPS)
    wrong = [name for name, fit in fits.items() if not fit]
    if wrong:
        raise InputError(f"missing or invalid {', '.join(wrong)}", where=location)
    try:
        check_unicode(row)
    except ValueError as e:
        raise InputError(str(e), where=location) from None


CUT = "{cut:,} replies were cut at their largest number of tokens"
NO_ANSWER = "questions whose answer is not public or not readable, left out"
NO_KEY = "answers that are not among their question's options, left out"
NO_TEXT = "responses that are not text, read as empty"


class Notes:
    """Unusable values by kind: their number, and the first as an example."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, name: str, value: object) -> None:
        """Count a value of `kind` in the question `name`."""
        self.counts[kind] += 1
        self._first.setdefault(kind, f"{name}: {value!r:.60}")

    def lines(self) -> list[str]:
        """A line for each kind."""
        return [f"{count:,} {kind}; the first is {self._first[kind]}" for kind, count in self.counts.items()]


def to_reply(row: dict[str, Any]) -> BenchmarkReply:
    """The reply in a row of results.jsonl."""
    return BenchmarkReply(
        id=row["id"],
        video=row["video"],
        answer=row["answer"],
        response=row["response"],
        letters=row["letters"],
        groups=row["groups"],
    )
