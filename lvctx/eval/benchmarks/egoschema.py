"""EgoSchema: five options about three minutes of egocentric video (Mangalam et al. 2023, arXiv:2308.09126).

The answers of 500 questions are public. The full set is scored by a server from the indices in submission.json, which
every run writes. The authors publish no way to read a reply: the letter there and in `guessing` is that of lmms-eval's
task, which is MMMU's. A reply without one gets a random letter, from a seed and the question's id.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lvctx.artifacts.store import write_json
from lvctx.eval.benchmarks.accuracy import accuracy, breakdown, to_reply
from lvctx.eval.benchmarks.answers import Question, strip_reasoning
from lvctx.eval.benchmarks.question_files import (
    has_value,
    key_field,
    options_field,
    read_question_rows,
    text_field,
    with_letters,
)

NAME = "egoschema"
STYLES = ("official",)
GROUPS: tuple[str, ...] = ()
FREE_ANSWERS = False
COLUMNS = (("video_idx", "option"),)
SEEDED = True
LETTERS = "ABCDE"


def samples(path: Path) -> list[Question]:
    """Questions from the hub's Parquet; `answer` counts from 0, and is empty in the full set.

    Raises InputError naming the row and its problem.
    """
    questions = []
    for row in read_question_rows(path):
        options = with_letters(options_field(row, "option"))
        video = text_field(row, "video_idx")
        questions.append(
            Question(
                id=video,
                video=video,
                question=text_field(row, "question"),
                options=options,
                answer=key_field(row, "answer", len(options), indexed=True) if has_value(row, "answer") else "",
                released=row,
            )
        )
    return questions


def prompt(sample: Question, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames, as in lmms-eval: the authors publish none."""
    options = "\n".join(sample.options)
    return f"{sample.question}\n{options}\nAnswer with the option's letter from the given choices directly."


def _letter(response: str, options: Sequence[str]) -> str:
    """`(A)`, `A ` or `A.`, of several the one whose last place is first; else a whole option, with over five words."""
    text = strip_reasoning(response)
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    forms = [form for letter in LETTERS for form in (f"({letter})", f"{letter} ", f"{letter}.") if form in text]
    if forms:
        return min(forms, key=text.rfind).strip("(). ")
    lower = text.lower()
    found = {
        letter: option.lower() for letter, option in zip(LETTERS, options, strict=False) if option.lower() in lower
    }
    return min(found, key=lambda letter: lower.rfind(found[letter])) if found and len(text.split()) > 5 else ""


def _guess(name: str, letters: str, seed: int) -> str:
    return random.Random(f"{seed}:{name}").choice(letters)


def score(rows: Sequence[dict[str, Any]], *, seed: int = 0) -> dict[str, Any]:
    """The common rules, and `guessing`: a random letter for a reply without one."""
    replies = [to_reply(row) for row in rows]
    letters = [_letter(row["response"], row.get("options", ())) for row in rows]
    settled = [
        replace(reply, response=letter or _guess(reply.id, reply.letters, seed), letters=LETTERS)
        for reply, letter in zip(replies, letters, strict=True)
    ]
    guessed = letters.count("")
    return {
        **breakdown(replies, GROUPS),
        "guessing": {**vars(accuracy(settled, "strict")), "guessed": guessed, "seed": seed},
    }


def export(out: Path, answered: Sequence[tuple[Question, str]]) -> None:
    """submission.json for the authors' server: {video: index of the option}."""
    letters = {
        sample.id: _letter(response, sample.options) or _guess(sample.id, "ABCDE"[: len(sample.options)], 0)
        for sample, response in answered
    }
    write_json(out / "submission.json", {name: ord(letter) - 65 for name, letter in letters.items()})
