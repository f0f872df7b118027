"""EgoSchema: five options about three minutes of egocentric video (Mangalam et al. 2023, arXiv:2308.09126).

The answers of 500 questions are public. The full set is scored by a server from the indices in submission.json, which
every run writes. A reply without a letter gets a random one there and in `guessing`, from a seed and the question's id.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lvctx.artifacts.store import write_json
from lvctx.eval.benchmarks.accuracy import accuracy, breakdown, to_reply
from lvctx.eval.benchmarks.answers import Question, first_letter, strip_reasoning
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


def _letter(response: str) -> str:
    return first_letter(strip_reasoning(response), "ABCDE")


def _guess(name: str, letters: str, seed: int) -> str:
    return random.Random(f"{seed}:{name}").choice(letters)


def score(rows: Sequence[dict[str, Any]], *, seed: int = 0) -> dict[str, Any]:
    """The common rules, and `guessing`: a random letter for a reply without one."""
    replies = [to_reply(row) for row in rows]
    settled = [replace(r, response=_letter(r.response) or _guess(r.id, r.letters, seed)) for r in replies]
    guessed = sum(not _letter(r.response) for r in replies)
    return {
        **breakdown(replies, GROUPS),
        "guessing": {**vars(accuracy(settled, "strict")), "guessed": guessed, "seed": seed},
    }


def export(out: Path, answered: Sequence[tuple[Question, str]]) -> None:
    """submission.json for the authors' server: {video: index of the option}."""
    letters = {
        sample.id: _letter(response) or _guess(sample.id, "ABCDE"[: len(sample.options)], 0)
        for sample, response in answered
    }
    write_json(out / "submission.json", {name: ord(letter) - 65 for name, letter in letters.items()})
