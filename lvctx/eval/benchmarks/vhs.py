"""Visual Haystacks, single needle: yes or no about one image among many (Wu et al. 2024, arXiv:2407.13766).

Chance is 50%. A reply is right if it contains the right word, as in the authors' script. The effective length is the
largest number of images up to which, at every smaller number too, at least 60% are right.
"""

import random
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from lvctx.errors import InputError
from lvctx.eval.benchmarks.answers import Question, is_degenerate
from lvctx.eval.benchmarks.fields import cell_text, parse_list
from lvctx.eval.benchmarks.question_files import QuestionRow, read_question_rows, row_place
from lvctx.eval.statistics import clustered_mean

NAME = "vhs"
STYLES = ("official",)
GROUPS = ("images",)
FREE_ANSWERS = True
COLUMNS = (("conversations", "pos_image", "neg_image"),)
VHS_THRESHOLD = 0.6
_BETWEEN = re.compile(
    r"""[\s«“‘„`»”’;@#$%&?!*\[\](){}<>"\u2012-\u2015]|[:,](?!\d)|--|\.\.+|\.(?=[])}>"'»”’]*(?:\s|$))"""
)
"""What separates the words of nltk's word_tokenize, which the authors' script uses: `yes/no` and `no-one` are one."""


def samples(path: Path) -> list[Question]:
    """Questions from visual_haystack_N.json files; images are shuffled, in the same way for the same question."""
    questions = []
    for number, row in enumerate(read_question_rows(path)):
        question, answer = _turns(row)
        name = f"{Path(row['_file']).stem}-{number}"
        images = [*_images(row, "pos_image"), *_images(row, "neg_image")]
        random.Random(name).shuffle(images)
        questions.append(
            Question(
                id=name,
                video=name,
                images=tuple(images),
                question=question,
                answer=answer,
                groups={"images": str(len(images))},
                released=row,
            )
        )
    return questions


def _turns(row: QuestionRow) -> tuple[str, str]:
    """The question, and `yes` or `no`."""
    turns = row.get("conversations")
    turns = turns[:2] if isinstance(turns, list) else []
    question, reply = ([cell_text(turn.get("value")) for turn in turns if isinstance(turn, dict)] + [None, None])[:2]
    if not question or not reply:
        raise InputError("no question and answer in `conversations`", where=row_place(row))
    answer = reply.strip().rstrip(".!").lower()
    if answer not in ("yes", "no"):
        raise InputError(f"the answer {reply!r:.60} is neither yes nor no", where=row_place(row))
    return question, answer


def _images(row: QuestionRow, name: str) -> list[str]:
    """File names in a column: a list, one written as text, or a single name."""
    value = row.get(name)
    if value is None:
        raise InputError(f"a question without {name}", where=row_place(row), fix="give the questions as released")
    if value in ([], "", "[]"):
        return []
    if isinstance(value, str) and not value.lstrip().startswith(("[", "(", "array(")) and "\n" not in value:
        return [value]
    try:
        return parse_list(value)
    except ValueError as e:
        raise InputError(f"{name} cannot be read as a list ({e})", where=row_place(row)) from None


def prompt(sample: Question, style: str, subtitles: str | None) -> str:
    """The user's turn after the images."""
    return f"You are given a set of images. Please answer the following question in Yes or No: {sample.question}"


def words_of(response: str) -> set[str]:
    """The words of a reply in lower case, as nltk 3.10 separates them; a period before white space ends a sentence."""
    return {word.strip("'").removesuffix("'s") for word in _BETWEEN.split(response.lower())}


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy by number of images, the share of replies with yes or no, and the effective length."""
    for row in rows:
        if not re.fullmatch("[0-9]{1,9}", row["groups"]["images"]):
            raise InputError(f"{row['groups']['images']!r:.60} images", where=f"question {row['id']}")
    response_words = [words_of(row["response"]) for row in rows]
    right = [float(row["answer"] in words) for row, words in zip(rows, response_words, strict=True)]
    by = {}
    for size in sorted({int(row["groups"]["images"]) for row in rows}):
        indices = [i for i, row in enumerate(rows) if int(row["groups"]["images"]) == size]
        estimate = clustered_mean([right[i] for i in indices], [rows[i]["id"] for i in indices])
        by[str(size)] = {
            "words": vars(estimate)
            | {"parsed": sum(bool(response_words[i] & {"yes", "no"}) for i in indices) / len(indices)}
        }
    good = list(takewhile(lambda size: by[size]["words"]["mean"] >= VHS_THRESHOLD, by))
    overall = vars(clustered_mean(right, [row["id"] for row in rows]))
    overall["parsed"] = sum(bool(words & {"yes", "no"}) for words in response_words) / len(rows)
    shares = {word: sum(word in words for words in response_words) / len(rows) for word in ("yes", "no")}
    warnings = [f"{share:.0%} of the replies are {word}" for word, share in shares.items() if share >= 0.9]
    both = sum({"yes", "no"} <= words for words in response_words)
    if both:
        warnings.append(f"{both:,} replies have both yes and no and count as right, as in the authors' script")
    stuck = sum(is_degenerate(row["response"]) for row in rows)
    return {
        "warnings": [*warnings, *([f"{stuck} replies repeat one token"] if stuck else [])],
        "questions": len(rows),
        "videos": len(rows),
        "rules": {"words": overall},
        "by_images": by,
        "effective_length": int(good[-1]) if good else 0,
    }
