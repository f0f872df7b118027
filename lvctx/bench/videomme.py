"""Video-MME: 900 videos, 2,700 questions with four options (Fu et al. 2024, arXiv:2405.21075), and its report.

Three prompts are in use, and the same model scores differently under each: the authors' (`official`), lmms-eval 0.7's
and VLMEvalKit's. Three scorers are in use too: see `choice`. No torch.
"""

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from lvctx.bench.choice import RULES, Reply, Sample, letter, signs_of_trouble, verdict
from lvctx.bench.interval import Estimate, clustered_mean
from lvctx.bench.responses import GROUPS, Responses
from lvctx.bench.tables import need, read_questions

HUB = ("lmms-lab/Video-MME", "videomme/test-00000-of-00001.parquet")
"""Dataset and file that `--questions hub` fetches."""
STYLES = ("official", "lmms-eval", "vlmevalkit")
DURATIONS = ("short", "medium", "long")
ALL = "all"


def samples(path: Path) -> list[Sample]:
    """Questions as released. Raises InputError naming what a row lacks."""
    found = []
    for row in read_questions(path):
        need(row, "video_id", "question_id", "question", "options", "answer", *GROUPS)
        found.append(
            Sample(
                id=str(row["question_id"]),
                video=str(row.get("videoID") or row["video_id"]),
                question=str(row["question"]),
                options=tuple(map(str, row["options"])),
                answer=str(row["answer"]),
                groups={g: str(row[g]) for g in GROUPS},
                released=row,
            )
        )
    return found


ASK = "Select the best answer to the following multiple-choice question based on the video{}. "
ASK += "Respond with only the letter (A, B, C, or D) of the correct option."


def prompt(sample: Sample, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames; `subtitles` is None where the run has none, else the text (perhaps empty)."""
    asked = f"{sample.question}\n" + "\n".join(sample.options)
    if style == "vlmevalkit":
        # The line break that this template begins with is the one that closes our visual block.
        listed = f"This video's subtitles are listed below:\n{subtitles}\n" if subtitles is not None else ""
        return f"These are the frames of a video. {listed}{ASK.format('')}\nQuestion: {asked}\nAnswer: "
    heard = " and the subtitles"
    if style == "lmms-eval":
        if subtitles is None:
            # It speaks of subtitles without showing any, and asks twice for the letter. That is what it does.
            end = "\n\nAnswer with the option's letter from the given choices directly."
            return f"{ASK.format(heard)}\n{asked}{end}"
        shown = subtitles or "No subtitles available"
        return f"This video's subtitles are listed below: \n{shown}\n{ASK.format(heard)}\n{asked}\nThe best answer is:"
    if subtitles is None:
        return f"{ASK.format('')}\n{asked}\nThe best answer is:"
    return f"This video's subtitles are listed below:\n{subtitles}\n{ASK.format(heard)}\n{asked}\nThe best answer is:"


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


def parsed(replies: Sequence[Reply], rule: str) -> float | None:
    """Share of replies in which a rule finds a letter."""
    return sum(bool(letter(r, rule)) for r in replies) / len(replies) if replies else None


def ordered(replies: Iterable[Reply], group: str) -> list[str]:
    """The values of a group that occur: durations by length, others by the alphabet."""
    values = {r.groups[group] for r in replies}
    rank = {name: i for i, name in enumerate(DURATIONS)}
    return sorted(values, key=lambda v: (rank.get(v, len(rank)), v))


def score(responses: Responses) -> dict[str, Any]:
    """Everything the report of one file says: warnings first, three rules, and breakdowns by every group."""
    replies = responses.replies
    return {
        "schema": "lvctx.videomme/1",
        "file": responses.name,
        "warnings": signs_of_trouble(replies),
        "overlooked": responses.leniencies,
        "questions": len(replies),
        "videos": len({r.video for r in replies}),
        "rules": {rule: vars(accuracy(replies, rule)) | {"parsed": parsed(replies, rule)} for rule in RULES},
        **{
            f"by_{group}": {
                value: {rule: vars(accuracy(part, rule)) for rule in RULES}
                for value in ordered(replies, group)
                if (part := [r for r in replies if r.groups[group] == value])
            }
            for group in GROUPS
        },
    }


def cells(responses: Responses) -> list[dict[str, Any]]:
    """Rows of the table duration x domain x task category with all its margins (`all`), for every rule."""
    axes = ("duration", "domain", "task_type")
    replies = responses.replies
    bins: dict[tuple[str, ...], list[Reply]] = {}
    for reply in replies:
        for key in product(*((reply.groups[axis], ALL) for axis in axes)):
            bins.setdefault(key, []).append(reply)
    wanted = product(*([*ordered(replies, axis), ALL] for axis in axes))
    rows = []
    for key in wanted:
        if part := bins.get(key):
            for rule in RULES:
                place = dict(zip(axes, key, strict=True))
                rows.append(
                    {
                        "file": responses.name,
                        **place,
                        "rule": rule,
                        "questions": len(part),
                        **vars(accuracy(part, rule)),
                    }
                )
    return rows
