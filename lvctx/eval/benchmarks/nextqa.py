"""NExT-QA, multiple choice: causal, temporal and descriptive questions with five options (Xiao et al. 2021, CVPR)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvctx.eval.benchmarks.accuracy import breakdown, to_reply
from lvctx.eval.benchmarks.answers import Question, format_options
from lvctx.eval.benchmarks.fields import cell_text
from lvctx.eval.benchmarks.question_files import check_options, key_field, read_question_rows, text_field

NAME = "nextqa"
STYLES = ("official",)
GROUPS = ("kind", "type")
FREE_ANSWERS = False
COLUMNS = (("a0", "a4", "qid", "type"),)
QUESTION_KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}


def samples(path: Path) -> list[Question]:
    """Questions from the released CSV or its Parquet; `answer` counts from 0, and its id includes its video."""
    questions = []
    for row in read_question_rows(path):
        options = check_options(row, [(cell_text(row.get(f"a{i}")) or "").strip() for i in range(5)])
        kind = text_field(row, "type")
        video = text_field(row, "video")
        questions.append(
            Question(
                id=f"{video}-{text_field(row, 'qid')}",
                video=video,
                question=text_field(row, "question").strip(),
                options=format_options(options),
                answer=key_field(row, "answer", len(options), indexed=True),
                groups={"kind": QUESTION_KINDS.get(kind[:1], "unknown"), "type": kind},
                released=row,
            )
        )
    return questions


def prompt(sample: Question, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames, as in lmms-eval's tasks of this kind."""
    options = "\n".join(sample.options)
    return f"{sample.question}\n{options}\nAnswer with the option's letter from the given choices directly."


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Breakdown by kind of question and by its two-letter type."""
    return breakdown([to_reply(row) for row in rows], GROUPS)
