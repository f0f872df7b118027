"""MLVU: long videos, nine tasks (Zhou et al. 2024, arXiv:2406.04264), seven or nine of them multiple choice.

Its M-Avg is a macro average over tasks in lmms-eval and pooled over questions in VLMEvalKit: both are given. The two
generation tasks are scored by a judging model elsewhere: their replies are exported in the form its scripts read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvctx.artifacts.store import write_json
from lvctx.bench.accuracy import breakdown, reply_of
from lvctx.bench.choice import RULES, Sample
from lvctx.bench.tables import need, read_questions

NAME = "mlvu"
STYLES = ("official", "lmms-eval")
GENERATION = {"subPlot": "subplot_all.json", "summary": "summary_all.json"}
"""Generation tasks and the file that each one's judge reads."""
LONGEST = 1000
"""Tokens of a generated answer, as in MLVU's own scripts."""


def samples(path: Path) -> list[Sample]:
    """Questions from the released JSON files (one, or a folder), or lmms-eval's Parquet with its options inlined."""
    found = []
    for number, row in enumerate(read_questions(path)):
        need(row, "question", "answer")
        task = str(row.get("question_type") or row.get("task_type") or Path(row["_file"]).stem.split("_", 1)[-1])
        candidates = list(map(str, row.get("candidates") or ()))
        answer = str(row["answer"])
        if candidates:
            answer = chr(65 + candidates.index(answer)) if answer in candidates else answer[:1]
        inlined = not candidates and task not in GENERATION
        found.append(
            Sample(
                id=str(row.get("question_id") or f"{task}-{number}"),
                video=str(row.get("video") or row.get("video_name")),
                question=str(row["question"]),
                options=tuple(f"({chr(65 + i)}) {c}" for i, c in enumerate(candidates))
                if not inlined
                else tuple("ABCD"),
                answer=answer,
                groups={"task_type": task},
                max_new_tokens=LONGEST if task in GENERATION else None,
                released={**row, "_inlined": inlined},
            )
        )
    return found


WATCH = "Carefully watch this video and pay attention to every detail. Based on your observations, "


def prompt(sample: Sample, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames; MLVU shows no subtitles."""
    if not sample.options:
        return f"{WATCH}answer the given questions.\n{sample.question}"
    asked = sample.question
    if not sample.released.get("_inlined"):
        asked = f"Question: {sample.question}\nOptions:\n" + "\n".join(sample.options)
    before = f"{WATCH}select the best option that accurately addresses the question.\n" if style == "official" else ""
    return f"{before}{asked}\nOnly give the best option.\nBest option: ("


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Breakdown by task, and `m_avg` by rule: `macro` over tasks and `pooled` over questions; generation left out."""
    replies = [reply_of(row) for row in rows if row["letters"]]
    found = breakdown(replies, ("task_type",))
    tasks = found["by_task_type"].values()
    m_avg = {}
    for rule in RULES:
        means = [task[rule]["mean"] for task in tasks if task[rule]["mean"] is not None]
        m_avg[rule] = {"macro": sum(means) / len(means) if means else None, "pooled": found["rules"][rule]["mean"]}
    return {**found, "generated": len(rows) - len(replies), "m_avg": m_avg}


def export(out: Path, answered: Sequence[tuple[Sample, str]]) -> None:
    """Generated answers for their judges: {video_name, Q, A, pred} with the scoring points, one file a task."""
    for task, name in GENERATION.items():
        rows = [
            {
                "video_name": Path(sample.video).name,
                "Q": sample.question,
                "A": sample.answer,
                "pred": said,
                **{k: sample.released[k] for k in ("scoring_points",) if k in sample.released},
            }
            for sample, said in answered
            if sample.groups["task_type"] == task
        ]
        if rows:
            write_json(out / name, rows)
