"""NExT-QA, multiple choice: causal, temporal and descriptive questions with five options (Xiao et al. 2021, CVPR)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvctx.bench.accuracy import breakdown, reply_of
from lvctx.bench.choice import Sample, lettered
from lvctx.bench.tables import check_options, letter_of, read_questions, text_of
from lvctx.bench.values import plain

NAME = "nextqa"
STYLES = ("official",)
GROUPS = ("kind", "type")
FREE_ANSWERS = False
KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}


def samples(path: Path) -> list[Sample]:
    """Questions from the released CSV or its Parquet; `answer` counts from 0, and a question's id holds its video."""
    found = []
    for row in read_questions(path):
        options = check_options(row, [(plain(row.get(f"a{i}")) or "").strip() for i in range(5)])
        kind = text_of(row, "type")
        video = text_of(row, "video")
        found.append(
            Sample(
                id=f"{video}-{text_of(row, 'qid')}",
                video=video,
                question=text_of(row, "question").strip(),
                options=lettered(options),
                answer=letter_of(row, "answer", len(options), indexed=True),
                groups={"kind": KINDS.get(kind[:1], "unknown"), "type": kind},
                released=row,
            )
        )
    return found


def prompt(sample: Sample, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames, as in lmms-eval's tasks of this kind."""
    listed = "\n".join(sample.options)
    return f"{sample.question}\n{listed}\nAnswer with the option's letter from the given choices directly."


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Breakdown by kind of question and by its two-letter type."""
    return breakdown([reply_of(row) for row in rows], GROUPS)
