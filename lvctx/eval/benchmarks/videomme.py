"""Video-MME: 900 videos, 2,700 questions with four options (Fu et al. 2024, arXiv:2405.21075), and its report.

Three prompts are in use, and the same model scores differently under each: the authors' (`official`), lmms-eval 0.7's
and VLMEvalKit's. Three scorers are in use too: see `answers`. No torch.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from lvctx.artifacts.schemas import SCORE
from lvctx.eval.benchmarks.accuracy import accuracy, breakdown, sorted_groups
from lvctx.eval.benchmarks.answers import RULES, BenchmarkReply, Question
from lvctx.eval.benchmarks.question_files import key_field, options_field, read_question_rows, text_field, with_letters
from lvctx.eval.benchmarks.responses import GROUPS, Responses, write_responses

NAME = "videomme"
HUB = ("lmms-lab/Video-MME", "videomme/test-00000-of-00001.parquet")
"""Dataset and file that `--questions hub` fetches."""
STYLES = ("official", "lmms-eval", "vlmevalkit")
FREE_ANSWERS = False
COLUMNS = (("duration", "sub_category", "task_type", "options"),)
SUBTITLES = True
ALL = "all"


def samples(path: Path) -> list[Question]:
    """The released questions. Raises InputError naming the row and the missing value."""
    questions = []
    for row in read_question_rows(path):
        options = with_letters(options_field(row, "options"))
        questions.append(
            Question(
                id=text_field(row, "question_id"),
                video=text_field(row, "videoID", "video_id"),
                question=text_field(row, "question"),
                options=options,
                answer=key_field(row, "answer", len(options)),
                groups={g: text_field(row, g) for g in GROUPS},
                released={**row, "video_id": text_field(row, "video_id")},
            )
        )
    return questions


ASK = "Select the best answer to the following multiple-choice question based on the video{}. "
ASK += "Respond with only the letter (A, B, C, or D) of the correct option."


def prompt(sample: Question, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames; `subtitles` is None if the run has none, else the text (possibly empty)."""
    question = f"{sample.question}\n" + "\n".join(sample.options)
    if style == "vlmevalkit":
        # The line break at the start of this template is the one that closes our visual block.
        subtitle_block = f"This video's subtitles are listed below:\n{subtitles}\n" if subtitles is not None else ""
        return f"These are the frames of a video. {subtitle_block}{ASK.format('')}\nQuestion: {question}\nAnswer: "
    ask = ASK.format(" and the subtitles")
    if style == "lmms-eval":
        if subtitles is None:
            # The template mentions subtitles without having any, and asks for the letter twice, exactly as here.
            end = "\n\nAnswer with the option's letter from the given choices directly."
            return f"{ask}\n{question}{end}"
        text = subtitles or "No subtitles available"
        return f"This video's subtitles are listed below: \n{text}\n{ask}\n{question}\nThe best answer is:"
    if subtitles is None:
        return f"{ASK.format('')}\n{question}\nThe best answer is:"
    return f"This video's subtitles are listed below:\n{subtitles}\n{ask}\n{question}\nThe best answer is:"


def score(responses: Responses) -> dict[str, Any]:
    """The report of a file: warnings first, every rule, and breakdowns by every group."""
    summary = breakdown(responses.replies, GROUPS)
    summary["warnings"] = [*responses.warnings, *summary["warnings"]]
    return {"schema": SCORE, "file": responses.name, "overlooked": responses.leniencies, **summary}


def export(out: Path, answered: Sequence[tuple[Question, str]]) -> None:
    """responses.json in the official format; without failed questions."""
    write_responses(out / "responses.json", answered)


def cells(responses: Responses, rules: Sequence[str] = RULES) -> list[dict[str, Any]]:
    """Rows of the table duration x domain x task category with all totals (`all`), for every one of `rules`."""
    axes = ("duration", "domain", "task_type")
    replies = responses.replies
    bins: dict[tuple[str, ...], list[BenchmarkReply]] = {}
    for reply in replies:
        for key in product(*((reply.groups[axis], ALL) for axis in axes)):
            bins.setdefault(key, []).append(reply)
    ranks = [{value: i for i, value in enumerate([*sorted_groups(replies, axis), ALL])} for axis in axes]
    rows = []
    for key in sorted(bins, key=lambda key: [rank[value] for rank, value in zip(ranks, key, strict=True)]):
        for rule in rules:
            cell = {"file": responses.name, **dict(zip(axes, key, strict=True)), "rule": rule}
            rows.append({**cell, "questions": len(bins[key]), **vars(accuracy(bins[key], rule))})
    return rows
