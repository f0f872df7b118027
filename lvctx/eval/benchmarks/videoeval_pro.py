"""VideoEval-Pro: 1,289 questions of four other benchmarks, without their options (Ma et al. 2025, arXiv:2505.14640).

Every question is asked twice, as in the authors' scripts: without options, for a judging model, and with them.
judge.jsonl is the input of their judge. `score` reports the replies with options only.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvctx.artifacts.jsonl_log import write_jsonl
from lvctx.eval.benchmarks.accuracy import breakdown, letter_chance, own_rule, sorted_groups, to_reply
from lvctx.eval.benchmarks.answers import BenchmarkReply, Question
from lvctx.eval.benchmarks.question_files import (
    key_field,
    options_field,
    read_question_rows,
    text_field,
    with_letters,
)
from lvctx.eval.statistics import clustered_mean

NAME = "videoeval-pro"
STYLES = ("official",)
GROUPS = ("qa_type", "qa_subtype", "source")
FREE_ANSWERS = True
COLUMNS = (("answer_text", "qa_type", "source"),)
LONGEST = 512
"""Maximum tokens of a free answer, as in the authors' scripts."""
FIELDS = ("video", "question", "options", "answer", "answer_text", "meta", "source", "qa_type", "qa_subtype")
MARKS = ("the answer is", "answer:", "the option is")


def samples(path: Path) -> list[Question]:
    """Two questions for each released row: `NUMBER-open` and `NUMBER-options`. Raises InputError naming the row."""
    questions = []
    for number, row in enumerate(read_question_rows(path), start=1):
        options = with_letters(options_field(row, "options"))
        asked = Question(
            id=f"{number}-open",
            video=text_field(row, "video"),
            question=text_field(row, "question"),
            answer=text_field(row, "answer_text"),
            groups={group: text_field(row, group) for group in GROUPS},
            max_new_tokens=LONGEST,
            released={**row, "_number": number},
        )
        questions.append(asked)
        questions.append(
            Question(
                id=f"{number}-options",
                video=asked.video,
                question=asked.question,
                options=options,
                answer=key_field(row, "answer", len(options)),
                groups=asked.groups,
                released=asked.released,
            )
        )
    return questions


ASK = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, or D) of the correct option, with no text around it."
)


def prompt(sample: Question, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames."""
    if not sample.options:
        return f"{sample.question} Keep the answer short and concise."
    return f"{ASK}\n{sample.question}\n{' '.join(sample.options)}"


def letter_of(response: str) -> str:
    """The authors' rule: the first letter of any alphabet after a stock phrase, or of the whole reply."""
    text = response.lower()
    mark = next((mark for mark in MARKS if mark in text), None)
    text = text if mark is None else text.split(mark)[-1]
    return next((character.upper() for character in text if character.isalpha()), "")


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Breakdown of the replies to questions with options, also under the authors' rule; free answers are counted."""
    replies = [to_reply(row) for row in rows if row["letters"]]
    parts = {"overall": replies}
    parts |= {kind: [r for r in replies if r.groups["qa_type"] == kind] for kind in sorted_groups(replies, "qa_type")}
    rule = "with options: the first letter of the reply, after a phrase such as `answer:`"
    scores = {name: clustered_mean(*_right(part)) for name, part in parts.items()}
    official = own_rule(rule, scores, chance=letter_chance(replies))
    return {**breakdown(replies, GROUPS), "generated": len(rows) - len(replies), "official": official}


def _right(replies: Sequence[BenchmarkReply]) -> tuple[list[float], list[str]]:
    return [float(letter_of(r.response) == r.answer) for r in replies], [r.video for r in replies]


def export(out: Path, answered: Sequence[tuple[Question, str]]) -> None:
    """judge.jsonl: the released fields with the replies as `textqa_answer` and `mcq_answer`, if both were answered."""
    replies = {sample.id: response for sample, response in answered}
    rows = []
    for sample, response in answered:
        other = replies.get(f"{sample.released['_number']}-options")
        if not sample.options and other is not None:
            fields = {name: sample.released.get(name) for name in FIELDS}
            rows.append({**fields, "textqa_answer": response, "mcq_answer": other})
    write_jsonl(out / "judge.jsonl", rows)
