"""LongVideoBench: referred reasoning over up to an hour, two to five options (Wu et al. 2024, arXiv:2407.15754).

For a reply without a letter its scorer (in lmms-eval, so on replies without their reasoning) draws one at random. This
is done here from a seed and the question's id, and the number of such replies is reported, since they score by chance.
Subtitles are not used (the original scripts interleave them with frames).
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from lvctx.errors import InputError
from lvctx.eval.benchmarks.accuracy import accuracy, breakdown, to_reply
from lvctx.eval.benchmarks.answers import (
    PHRASES_WITH_COMMAS,
    BenchmarkReply,
    Question,
    first_letter,
    format_options,
    strip_reasoning,
)
from lvctx.eval.benchmarks.fields import cell_text
from lvctx.eval.benchmarks.question_files import (
    QuestionRow,
    check_options,
    has_value,
    key_field,
    options_field,
    read_question_rows,
    row_place,
    text_field,
)

NAME = "longvideobench"
STYLES = ("official",)
FREE_ANSWERS = False
COLUMNS = (("correct_choice", "question_category"),)
SEEDED = True
GROUPS = ("duration_group", "question_category", "topic_category")


def samples(path: Path) -> list[Question]:
    """Questions from lvb_val.json (`candidates`) or its Parquet (`option0`...); `correct_choice` counts from 0."""
    questions = []
    for row in read_question_rows(path):
        options = options_field(row, "candidates") if has_value(row, "candidates") else _columns(row)
        questions.append(
            Question(
                id=text_field(row, "id"),
                video=text_field(row, "video_path", "video_id"),
                question=text_field(row, "question"),
                options=format_options(options),
                answer=key_field(row, "correct_choice", len(options), indexed=True),
                groups={
                    **{group: text_field(row, group) for group in GROUPS[:2]},
                    GROUPS[2]: cell_text(row.get(GROUPS[2])) or "unknown",
                },
                released=row,
            )
        )
    return questions


def _columns(row: QuestionRow) -> list[str]:
    """Options from columns `option0` to `option4`; unused ones are N/A or empty."""
    cells = [cell_text(row.get(f"option{i}")) or "" for i in range(5)]
    options = list(takewhile(lambda cell: cell.strip() not in ("", "N/A"), cells))
    if any(cell.strip() not in ("", "N/A") for cell in cells[len(options) :]):
        raise InputError(f"option{len(options)} is missing, but a later one is not", where=row_place(row))
    return check_options(row, options)


def prompt(sample: Question, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames."""
    options = "\n".join(sample.options)
    return f"{sample.question}\n{options}\nAnswer with the option's letter from the given choices directly.\n"


def score(rows: Sequence[dict[str, Any]], *, seed: int = 0) -> dict[str, Any]:
    """Breakdown under the common rules, and `guessing`: its own rule, with the number of `guessed` replies."""
    replies = [to_reply(row) for row in rows]
    settled = [_settle(reply, seed) for reply in replies]
    guessed = sum(not _official_letter(reply) for reply in replies)
    guessing = vars(accuracy(settled, "strict"))
    by = {
        value: vars(accuracy([r for r in settled if r.groups["duration_group"] == value], "strict"))
        for value in sorted({r.groups["duration_group"] for r in replies}, key=lambda v: (len(v), v))
    }
    return {
        **breakdown(replies, GROUPS),
        "guessing": {**guessing, "guessed": guessed, "seed": seed, "by_duration_group": by},
    }


def _official_letter(reply: BenchmarkReply) -> str:
    return first_letter(strip_reasoning(reply.response), "ABCDE", PHRASES_WITH_COMMAS)


def _settle(reply: BenchmarkReply, seed: int) -> BenchmarkReply:
    """The reply replaced by the letter that the official scorer uses."""
    letter = _official_letter(reply) or random.Random(f"{seed}:{reply.id}").choice(reply.letters)
    return replace(reply, response=letter, letters="ABCDE")
