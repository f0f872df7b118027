"""LVBench: 103 videos of 30 minutes and more, four options (Wang et al. 2024, arXiv:2406.08035).

A question has one or more of six abilities, and counts in each of them; the overall accuracy counts it once.
The authors publish no prompt: `official` is lmms-eval's.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lvctx.errors import InputError
from lvctx.eval.benchmarks.accuracy import accuracy, breakdown, letter_chance, own_rule, to_reply
from lvctx.eval.benchmarks.answers import RULES, BenchmarkReply, Question, format_options
from lvctx.eval.benchmarks.fields import cell_text, parse_list
from lvctx.eval.benchmarks.question_files import (
    AS_RELEASED,
    QuestionRow,
    has_value,
    key_field,
    letters_in,
    options_field,
    read_question_rows,
    row_place,
    text_field,
)
from lvctx.eval.statistics import clustered_mean

NAME = "lvbench"
HUB = ("zai-org/LVBench", "video_info.meta.jsonl")
STYLES = ("official", "videochat-flash")
GROUPS = ("type", "abilities")
FREE_ANSWERS = False
COLUMNS = (("key", "qa"), ("question", "question_type", "time_reference"))
SEPARATOR = "; "


def samples(path: Path) -> list[Question]:
    """Questions from video_info.meta.jsonl, a video a line, or from one row per question as in its copies.

    Raises InputError naming the row and its problem.
    """
    questions: list[Question] = []
    for row in _question_rows(path):
        video = text_field(row, "key", "video", "video_path")
        options = format_options(options_field(row, "candidates")) if has_value(row, "candidates") else ()
        text = text_field(row, "question")
        questions.append(
            Question(
                id=cell_text(row.get("uid")) or f"{video}-{len(questions)}",
                video=video,
                question=text if not options else "\n".join([text, *options]),
                options=options or letters_in(text),
                answer=key_field(row, "answer", len(options or letters_in(text))),
                groups={"type": cell_text(row.get("type")) or "unknown", "abilities": SEPARATOR.join(_abilities(row))},
                released=row,
            )
        )
    return questions


def _question_rows(path: Path) -> Iterator[QuestionRow]:
    for row in read_question_rows(path):
        asked = row.get("qa", [{}])
        if not isinstance(asked, list) or not all(isinstance(one, dict) for one in asked):
            raise InputError("qa is not a list of questions", where=row_place(row), fix=AS_RELEASED)
        yield from ({**row, **one} for one in asked)


def _abilities(row: QuestionRow) -> list[str]:
    value = row.get("question_type")
    try:
        return parse_list(value) if value else ["unknown"]
    except ValueError:
        return [text_field(row, "question_type")]


def prompt(sample: Question, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames; the options are in the question's text."""
    if style == "videochat-flash":
        return f"{sample.question}\nAnswer with the option's letter from the given choices directly."
    return f"{sample.question}\nAnswer the question with the option letter"


def letter_of(response: str) -> str:
    """The authors' rule: what is before the first `)` and, if there is one, after a `(`; its first character."""
    head = response.strip().partition(")")[0].strip()
    if "(" in head:
        head = head.split("(")[1].strip()
    return head[:1]


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Breakdown by type of video and by ability, and both under the authors' rule."""
    replies = [to_reply(row) for row in rows]
    by_ability: dict[str, list[BenchmarkReply]] = defaultdict(list)
    for reply in replies:
        for ability in reply.groups["abilities"].split(SEPARATOR):
            by_ability[ability].append(reply)
    parts = {"overall": replies, **dict(sorted(by_ability.items()))}
    scores = {
        name: clustered_mean([float(letter_of(r.response) == r.answer) for r in part], [r.video for r in part])
        for name, part in parts.items()
    }
    rule = "the first character of what is in the brackets, or of the reply"
    return {
        **breakdown(replies, ("type",)),
        "by_ability": {
            name: {rule: vars(accuracy(part, rule)) for rule in RULES} for name, part in sorted(by_ability.items())
        },
        "official": own_rule(rule, scores, chance=letter_chance(replies)),
    }
