"""TimeScope: clips of 5 to 10 seconds inserted in one minute to eight hours of other video, three kinds of questions.

`QA` asks about one clip, `OCR` for the words of several clips in their order, `temporal` about what happens in a clip.
Every row has its whole prompt. The scorer is that of the authors' task in lmms-eval.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvctx.eval.benchmarks.accuracy import breakdown, letter_chance, own_rule, sorted_groups, to_reply
from lvctx.eval.benchmarks.answers import PHRASES_WITH_COMMAS, Question, first_letter
from lvctx.eval.benchmarks.question_files import key_field, letters_in, read_question_rows, text_field
from lvctx.eval.statistics import clustered_mean

NAME = "timescope"
STYLES = ("official",)
GROUPS = ("type", "length")
FREE_ANSWERS = False
COLUMNS = (("input", "video", "length", "type"),)


def samples(path: Path) -> list[Question]:
    """Questions from the released rows; `length` is in seconds. Raises InputError naming the row and its problem."""
    questions = []
    for row in read_question_rows(path):
        text = text_field(row, "input")
        options = letters_in(text, "ABCDEF")
        groups = {group: text_field(row, group) for group in GROUPS}
        questions.append(
            Question(
                # Ids count within a kind of question in one version of the data, and over all in another.
                id=f"{groups['type']}-{groups['length']}-{text_field(row, 'id', 'index')}",
                video=text_field(row, "video"),
                question=text,
                options=options,
                answer=key_field(row, "answer", len(options)),
                groups=groups,
                released=row,
            )
        )
    return questions


def prompt(sample: Question, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames: the row's own."""
    return sample.question


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Breakdown by kind and by length, and its own rule by both and by each pair."""
    return score_with(rows, PHRASES_WITH_COMMAS)


def score_with(rows: Sequence[dict[str, Any]], phrases: Sequence[str]) -> dict[str, Any]:
    """`score` with these phrases removed from a reply before its first letter counts."""
    replies = [to_reply(row) for row in rows]
    kinds, lengths = sorted_groups(replies, "type"), sorted_groups(replies, "length")
    parts = {"overall": replies}
    parts |= {kind: [r for r in replies if r.groups["type"] == kind] for kind in kinds}
    parts |= {f"{length} s": [r for r in replies if r.groups["length"] == length] for length in lengths}
    parts |= {
        f"{length} s, {kind}": [r for r in replies if (r.groups["length"], r.groups["type"]) == (length, kind)]
        for length in lengths
        for kind in kinds
    }
    scores = {
        name: clustered_mean(
            [float(first_letter(r.response, "ABCDEF", phrases) == r.answer) for r in part], [r.video for r in part]
        )
        for name, part in parts.items()
        if part
    }
    rule = "the first letter from A to F after stock phrases are removed; a reply without one is wrong"
    official = own_rule(rule, scores, chance=letter_chance(replies))
    return {**breakdown(replies, GROUPS), "official": official}
