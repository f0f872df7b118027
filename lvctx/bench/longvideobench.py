"""LongVideoBench: referred reasoning over up to an hour, two to five options (Wu et al. 2024, arXiv:2407.15754).

Where no letter can be read in a reply its scorer draws one at random. So does this one, from a seed and the question's
id, and says how often: such a score is part luck. Subtitles are not shown (its scripts interleave them with frames).
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lvctx.bench.accuracy import accuracy, breakdown, reply_of
from lvctx.bench.choice import Reply, Sample, first_letter, lettered
from lvctx.bench.tables import need, read_questions

NAME = "longvideobench"
STYLES = ("official",)
GROUPS = ("duration_group", "question_category", "topic_category")
PHRASES = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    *("The best option is", "The correct option is", "Best answer:", "Best option:"),
)


def samples(path: Path) -> list[Sample]:
    """Questions from lvb_val.json (`candidates`) or its Parquet (`option0`...); `correct_choice` counts from 0."""
    found = []
    for row in read_questions(path):
        need(row, "id", "question", "correct_choice", "duration_group", "question_category")
        options = row.get("candidates") or [row.get(f"option{i}") for i in range(5)]
        options = [str(o) for o in options if o not in (None, "N/A")]
        found.append(
            Sample(
                id=str(row["id"]),
                video=str(row.get("video_path") or row.get("video_id")),
                question=str(row["question"]),
                options=lettered(options),
                answer=chr(65 + int(row["correct_choice"])),
                groups={group: str(row.get(group, "unknown")) for group in GROUPS},
                released=row,
            )
        )
    return found


def prompt(sample: Sample, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames."""
    listed = "\n".join(sample.options)
    return f"{sample.question}\n{listed}\nAnswer with the option's letter from the given choices directly.\n"


def score(rows: Sequence[dict[str, Any]], *, seed: int = 0) -> dict[str, Any]:
    """Breakdown under the common rules, and `guessing`: its own rule, with the number of `guessed` replies."""
    replies = [reply_of(row) for row in rows]
    settled = [_settle(reply, seed) for reply in replies]
    guessed = sum(not first_letter(r.response, "ABCDE", PHRASES) for r in replies)
    own = vars(accuracy(settled, "strict"))
    by = {
        value: vars(accuracy([r for r in settled if r.groups["duration_group"] == value], "strict"))
        for value in sorted({r.groups["duration_group"] for r in replies}, key=lambda v: (len(v), v))
    }
    return {
        **breakdown(replies, GROUPS),
        "guessing": {**own, "guessed": guessed, "seed": seed, "by_duration_group": by},
    }


def _settle(reply: Reply, seed: int) -> Reply:
    """The reply as the letter its own scorer takes it for."""
    found = first_letter(reply.response, "ABCDE", PHRASES)
    return replace(reply, response=found or random.Random(f"{seed}:{reply.id}").choice(reply.letters), letters="ABCDE")
