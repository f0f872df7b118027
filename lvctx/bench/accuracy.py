"""Accuracy of replies under the rules of `choice`: whole, by group, and of two runs against each other. No torch."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lvctx.artifacts.rows import read_rows
from lvctx.bench.choice import RULES, Reply, letter, signs_of_trouble, verdict
from lvctx.bench.interval import Estimate, clustered_mean
from lvctx.errors import InputError

DURATIONS = ("short", "medium", "long")


def accuracy(replies: Iterable[Reply], rule: str) -> Estimate:
    """Share of right answers under a rule, with its interval clustered by video."""
    counted = [(float(v), r.video) for r in replies if (v := verdict(r, rule)) is not None]
    return clustered_mean([v for v, _ in counted], [video for _, video in counted])


def difference(first: Sequence[Reply], second: Sequence[Reply], rule: str) -> Estimate:
    """First minus second on the questions that both have and the rule counts in both; paired, clustered by video."""
    others = {r.id: verdict(r, rule) for r in second}
    pairs = [
        (float(a) - float(b), r.video)
        for r in first
        if (a := verdict(r, rule)) is not None and (b := others.get(r.id)) is not None
    ]
    return clustered_mean([d for d, _ in pairs], [video for _, video in pairs], lowest=-1.0)


def ordered(replies: Iterable[Reply], group: str) -> list[str]:
    """The values of a group that occur: durations by length, others by the alphabet."""
    values = {r.groups[group] for r in replies}
    rank = {name: i for i, name in enumerate(DURATIONS)}
    return sorted(values, key=lambda v: (rank.get(v, len(rank)), v))


def breakdown(replies: Sequence[Reply], groups: Sequence[str]) -> dict[str, Any]:
    """Warnings, every rule over all replies, and every rule by every value of `groups`."""
    found: dict[str, Any] = {
        "warnings": signs_of_trouble(replies),
        "questions": len(replies),
        "videos": len({r.video for r in replies}),
        "rules": {
            rule: vars(accuracy(replies, rule))
            | {"parsed": sum(bool(letter(r, rule)) for r in replies) / max(len(replies), 1)}
            for rule in RULES
        },
    }
    for group in groups:
        found[f"by_{group}"] = {
            value: {rule: vars(accuracy([r for r in replies if r.groups[group] == value], rule)) for rule in RULES}
            for value in ordered(replies, group)
        }
    return found


def read_run(directory: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows of a run's questions that were answered, and how many were not. Raises InputError where there is no run."""
    results = directory / "results.jsonl" if directory.is_dir() else directory
    if not results.is_file():
        raise InputError("no results.jsonl", where=directory, fix="give a directory that a run wrote")
    last = {row["key"]: row for row in read_rows(results)}  # a question that failed and was asked again counts once
    answered = [row for row in last.values() if "error" not in row]
    if not answered:
        raise InputError("no question was answered", where=directory)
    return answered, len(last) - len(answered)


def reply_of(row: dict[str, Any]) -> Reply:
    """The reply in a row of results.jsonl."""
    return Reply(
        id=row["id"],
        video=row["video"],
        answer=row["answer"],
        response=row["response"],
        letters=row["letters"],
        groups=row["groups"],
    )
