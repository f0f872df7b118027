"""LongVideo-Reason, its evaluation set: reasoning about long video, the answer in tags (Chen et al. 2025).

arXiv:2507.07966. A reply is right if what is between its <answer> tags, or all of it where there are none, is exactly
the key. The authors' script first compares both as mathematics, which accepts no further reply: the keys are letters,
and math_verify 0.9.0 finds nothing mathematical in a bare letter.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvctx.eval.benchmarks.accuracy import breakdown, letter_chance, own_rule, sorted_groups, to_reply
from lvctx.eval.benchmarks.answers import Question
from lvctx.eval.benchmarks.fields import cell_text, parse_key
from lvctx.eval.benchmarks.question_files import letters_in, read_question_rows, text_field
from lvctx.eval.statistics import clustered_mean

NAME = "longvideo-reason"
STYLES = ("official",)
GROUPS = ("problem_type",)
FREE_ANSWERS = False
COLUMNS = (("problem", "videos", "problem_type"),)
_ANSWER = re.compile("<answer>(.*?)</answer>")
_STOCK = "Therefore the final answer is:"


def samples(path: Path) -> list[Question]:
    """Questions from test.jsonl. Some released rows have a malformed key: they are asked, and cannot be scored.

    Raises InputError naming the row and its problem.
    """
    questions = []
    for number, row in enumerate(read_question_rows(path), start=1):
        problem = text_field(row, "problem")
        options = letters_in(problem)
        key = _ANSWER.search(cell_text(row.get("answer")) or "")
        questions.append(
            Question(
                id=cell_text(row.get("problem_id")) or str(number),
                video=text_field(row, "videos"),
                question=problem,
                options=options,
                answer=parse_key(key[1].strip() if key else row.get("answer"), len(options)) or "",
                groups={"problem_type": text_field(row, "problem_type")},
                released=row,
            )
        )
    return questions


LEAD = (
    "You are a helpful assistant. The user asks a question, and then you solves it.\n\nPlease first think deeply about "
    "the question based on the given video, and then provide the final answer. The reasoning process and answer are "
    "enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here "
    "</think> <answer> answer here </answer>.\n\n Question: "
)


def prompt(sample: Question, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames."""
    return f"{LEAD}{sample.question}"


def answer_of(response: str) -> str:
    """What is between the first tags, without a stock phrase; the whole reply if there are none."""
    pattern = re.compile(f"<answer>{_STOCK} (.*?)</answer>") if _STOCK in response else _ANSWER
    found = pattern.search(response)
    return (found[1] if found else response).strip()


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Breakdown by type of problem under the common rules, and its own."""
    replies = [to_reply(row) for row in rows]
    parts = {"overall": replies}
    kinds = sorted_groups(replies, "problem_type")
    parts |= {kind: [r for r in replies if r.groups["problem_type"] == kind] for kind in kinds}
    scores = {
        name: clustered_mean([float(answer_of(r.response) == r.answer) for r in part], [r.video for r in part])
        for name, part in parts.items()
    }
    rule = "what is between the answer tags is exactly the letter"
    return {**breakdown(replies, GROUPS), "official": own_rule(rule, scores, chance=letter_chance(replies))}
