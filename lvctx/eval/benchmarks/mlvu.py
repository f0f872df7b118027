"""MLVU: long videos, nine tasks (Zhou et al. 2024, arXiv:2406.04264), seven or nine of them multiple choice.

Its M-Avg is a macro average over tasks in lmms-eval and pooled over questions in VLMEvalKit: both are reported. Its own
rule reads the character before the first closing bracket. The two generation tasks are scored by a judging model
elsewhere: their replies are exported in the format of its scripts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvctx.artifacts.store import write_json
from lvctx.errors import InputError
from lvctx.eval.benchmarks.accuracy import breakdown, letter_chance, own_rule, to_reply
from lvctx.eval.benchmarks.answers import RULES, BenchmarkReply, Question, format_options
from lvctx.eval.benchmarks.fields import cell_text
from lvctx.eval.benchmarks.question_files import (
    QuestionRow,
    has_value,
    key_field,
    letters_in,
    options_field,
    read_question_rows,
    row_place,
    text_field,
)
from lvctx.eval.statistics import clustered_mean, macro_mean

NAME = "mlvu"
STYLES = ("official", "lmms-eval")
GROUPS = ("task_type",)
FREE_ANSWERS = True
COLUMNS = (("question_type", "candidates"), ("question_type", "video", "answer"), ("task_type", "video_name"))
GENERATION = {"subPlot": "subplot_all.json", "summary": "summary_all.json"}
"""Generation tasks, and the input file of each one's judge."""
LONGEST = 1000
"""Maximum tokens of a generated answer, as in MLVU's own scripts."""


def samples(path: Path) -> list[Question]:
    """Questions from the released JSON files (one, or a folder), or lmms-eval's Parquet with options in the question.

    Raises InputError naming the row and its problem.
    """
    questions = []
    for number, row in enumerate(read_question_rows(path)):
        question = text_field(row, "question")
        task = cell_text(row.get("question_type")) or cell_text(row.get("task_type"))
        task = task or Path(row["_file"]).stem.split("_", 1)[-1]
        candidates = options_field(row, "candidates") if has_value(row, "candidates") else []
        inlined = not candidates and task not in GENERATION
        letters = letters_in(question) if inlined else format_options(candidates)
        questions.append(
            Question(
                id=cell_text(row.get("question_id")) or f"{task}-{number}",
                video=text_field(row, "video", "video_name"),
                question=question,
                options=letters if inlined else tuple(f"({chr(65 + i)}) {c}" for i, c in enumerate(candidates)),
                answer=_answer(row, candidates, len(letters)),
                groups={"task_type": task},
                max_new_tokens=LONGEST if task in GENERATION else None,
                released={**row, "_inlined": inlined},
            )
        )
    return questions


def _answer(row: QuestionRow, candidates: Sequence[str], count: int) -> str:
    """The letter of the right option: MLVU stores its text, others its letter. Generation tasks: the answer itself.

    Raises InputError if it matches no option, or several.
    """
    answer = text_field(row, "answer")
    if not count:
        return answer
    for normalize in (str, str.strip, lambda text: text.strip().casefold()):
        fits = [i for i, candidate in enumerate(candidates) if normalize(candidate) == normalize(answer)]
        if len(fits) > 1:
            raise InputError(f"answer {answer!r:.60} matches several of its options", where=row_place(row))
        if fits:
            return chr(65 + fits[0])
    return key_field(row, "answer", count)


WATCH = "Carefully watch this video and pay attention to every detail. Based on your observations, "


def prompt(sample: Question, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames; MLVU uses no subtitles."""
    if not sample.options:
        return f"{WATCH}answer the given questions.\n{sample.question}"
    question = sample.question
    if not sample.released.get("_inlined"):
        question = f"Question: {sample.question}\nOptions:\n" + "\n".join(sample.options)
    instruction = (
        f"{WATCH}select the best option that accurately addresses the question.\n" if style == "official" else ""
    )
    return f"{instruction}{question}\nOnly give the best option.\nBest option: ("


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Breakdown by task and `m_avg` by rule: `macro` (by task) and `pooled` over questions; no generation."""
    replies = [to_reply(row) for row in rows if row["letters"]]
    summary = breakdown(replies, GROUPS)
    tasks = summary["by_task_type"].values()
    m_avg = {}
    for rule in RULES:
        means = [task[rule]["mean"] for task in tasks if task[rule]["mean"] is not None]
        m_avg[rule] = {"macro": sum(means) / len(means) if means else None, "pooled": summary["rules"][rule]["mean"]}
    return {**summary, "generated": len(rows) - len(replies), "m_avg": m_avg, "official": _official(replies)}


def _official(replies: Sequence[BenchmarkReply]) -> dict[str, Any]:
    strata: dict[str, tuple[list[float], list[str]]] = {}
    for reply in replies:
        values, videos = strata.setdefault(reply.groups["task_type"], ([], []))
        values.append(float(letter_of(reply.response) == reply.answer))
        videos.append(reply.video)
    scores = {"M-Avg": macro_mean(list(strata.values()))}
    scores |= {task: clustered_mean(*stratum) for task, stratum in sorted(strata.items())}
    rule = "the character before the first closing bracket, or the whole reply; M-Avg is the mean over tasks"
    return own_rule(rule, scores, chance=letter_chance(replies))


def letter_of(response: str) -> str:
    """The authors' rule: the character before the first `)`; the whole reply if there is none."""
    head, bracket, _ = response.partition(")")
    return head[-1:] if bracket else response


def export(out: Path, answered: Sequence[tuple[Question, str]]) -> None:
    """Generated answers for their judges: {video_name, Q, A, pred} with the scoring points, one file per task."""
    for task, name in GENERATION.items():
        rows = [
            {
                "video_name": Path(sample.video).name,
                "Q": sample.question,
                "A": sample.answer,
                "pred": response,
                **{k: sample.released[k] for k in ("scoring_points",) if k in sample.released},
            }
            for sample, response in answered
            if sample.groups["task_type"] == task
        ]
        if rows:
            write_json(out / name, rows)
