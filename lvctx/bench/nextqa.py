"""NExT-QA, multiple choice: causal, temporal and descriptive questions with five options (Xiao et al. 2021, CVPR)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvctx.bench.accuracy import breakdown, reply_of
from lvctx.bench.choice import Sample, lettered
from lvctx.bench.tables import need, read_questions

NAME = "nextqa"
STYLES = ("official",)
KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}


def samples(path: Path) -> list[Sample]:
    """Questions from the released CSV or its Parquet; `answer` counts from 0, and a question's id holds its video."""
    found = []
    for row in read_questions(path):
        need(row, "video", "question", "answer", "qid", "type", *(f"a{i}" for i in range(5)))
        found.append(
            Sample(
                id=f"{row['video']}-{row['qid']}",
                video=str(row["video"]),
                question=str(row["question"]).strip(),
                options=lettered([str(row[f"a{i}"]).strip() for i in range(5)]),
                answer=chr(65 + int(row["answer"])),
                groups={"kind": KINDS.get(str(row["type"])[:1], "unknown"), "type": str(row["type"])},
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
    return breakdown([reply_of(row) for row in rows], ("kind", "type"))
