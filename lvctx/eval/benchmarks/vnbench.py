"""VNBench (VideoNIAH): needles to retrieve, order and count in videos of 10 to 180 seconds (Zhao et al. 2024).

arXiv:2406.09367. Every question is asked four times with its options in another order, and is right only if all four
replies are. The score is the mean over nine tasks. In the data the tasks ret_insert1 and ret_insert2 have each other's
label; the authors' script swaps them in its report, and so does `official`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lvctx.eval.benchmarks.accuracy import breakdown, own_rule, to_reply
from lvctx.eval.benchmarks.answers import Question, format_options
from lvctx.eval.benchmarks.question_files import (
    QuestionRow,
    key_field,
    options_field,
    read_question_rows,
    text_field,
)
from lvctx.eval.benchmarks.video_files import video_stem
from lvctx.eval.statistics import Estimate, clustered_mean, macro_mean

NAME = "vnbench"
STYLES = ("official",)
GROUPS = ("type", "try")
FREE_ANSWERS = False
COLUMNS = (("gt", "try", "options"),)
TRIES = 4
SWAPPED = {"ret_insert1": "ret_insert2", "ret_insert2": "ret_insert1"}
KINDS = {"ret": "retrieval", "ord": "ordering", "cnt": "counting"}


def samples(path: Path) -> list[Question]:
    """Questions from VNBench-main-4try.json; `gt` is the text of the right option. Raises InputError naming the row."""
    questions = []
    for row in read_question_rows(path):
        options = options_field(row, "options")
        video = text_field(row, "video")
        groups = {group: text_field(row, group) for group in GROUPS}
        questions.append(
            Question(
                id=f"{video_stem(video)}-{groups['type']}-{groups['try']}",
                video=video,
                question=text_field(row, "question"),
                options=format_options(options),
                answer=_answer(row, options),
                groups=groups,
                released=row,
            )
        )
    return questions


def _answer(row: QuestionRow, options: Sequence[str]) -> str:
    """The letter of the right option, of which `gt` is the text, or the letter in the authors' files of results."""
    gt = text_field(row, "gt").strip()
    fits = [i for i, option in enumerate(options) if option.strip() == gt]
    return chr(65 + fits[0]) if len(fits) == 1 else key_field(row, "gt", len(options))


def prompt(sample: Question, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames."""
    options = "\n".join(sample.options)
    return f"{sample.question}\n{options}\nAnswer with the option's letter from the given choices directly."


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Breakdown of single tries by the data's label, and its own rule, for questions whose four tries were answered."""
    replies = [to_reply(row) for row in rows]
    summary = breakdown(replies, ("type",))
    tries: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        tries[row["groups"]["type"], row["video"]].append(row)
    whole = {key: of for key, of in tries.items() if len({row["groups"]["try"] for row in of}) == TRIES}
    if left_out := len(tries) - len(whole):
        summary["warnings"].append(f"{left_out:,} of {len(tries):,} questions have fewer than four answers, left out")
    by_task: dict[str, tuple[list[float], list[str]]] = defaultdict(lambda: ([], []))
    for (task, video), of in whole.items():
        values, videos = by_task[SWAPPED.get(task, task)]
        values.append(float(all(row["response"].strip()[:1] == row["answer"] for row in of)))
        videos.append(video)
    scores: dict[str, Estimate] = {"overall": macro_mean(list(by_task.values()))}
    for prefix, kind in KINDS.items():
        if of_kind := [stratum for task, stratum in by_task.items() if task.startswith(prefix)]:
            scores[kind] = macro_mean(of_kind)
    scores |= {task: clustered_mean(*stratum) for task, stratum in sorted(by_task.items())}
    chances = [1 / len(row["letters"]) for of in whole.values() for row in of]
    chance = (sum(chances) / len(chances)) ** TRIES if chances else 0.0
    rule = "right if the first character of all four replies is; mean over tasks"
    return {**summary, "official": own_rule(rule, scores, chance=chance)}
