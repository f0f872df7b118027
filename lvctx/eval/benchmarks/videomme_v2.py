"""Video-MME-v2: 800 videos with four questions each and eight options, scored by groups of four.

The questions about a video are one group. In a group of kind `relevance` k right answers are worth (k / 4)^2. In one of
kind `logic` only the leading run of right answers counts, by a table of the group's structure: which
questions build on which. The group's level, second and third head are those of its last question. A reply without a
letter is wrong, as in lmms-eval; the authors' script gives it -1, which its logic counts as right.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from lvctx.errors import InputError
from lvctx.eval.benchmarks.accuracy import breakdown, own_rule, to_reply
from lvctx.eval.benchmarks.answers import PHRASES_WITH_COMMAS, Question, first_letter
from lvctx.eval.benchmarks.fields import cell_text
from lvctx.eval.benchmarks.question_files import (
    QuestionRow,
    key_field,
    options_field,
    read_question_rows,
    row_place,
    text_field,
    with_letters,
)
from lvctx.eval.statistics import Estimate, clustered_mean

NAME = "videomme-v2"
HUB = ("MME-Benchmarks/Video-MME-v2", "test.parquet")
STYLES = ("official", "reasoning", "lmms-eval")
AXES = ("level", "second_head", "third_head")
GROUPS = ("group_type", "group_structure", "place", *AXES)
FREE_ANSWERS = False
COLUMNS = (("group_type", "group_structure", "options"),)
SUBTITLES = True
WHOLE_SUBTITLES = True
"""All words of the subtitles are in the prompt, not only those at the frames."""
PHRASES = ("Final Answer:", *PHRASES_WITH_COMMAS, "Answer:", "Option:")
SQUARES = (0.0, 1 / 16, 4 / 16, 9 / 16, 1.0)
LOGIC = {
    "[1,2,3,4]": SQUARES,
    "[1,[2,3],4]": (0.0, 1 / 12, 4 / 12, 7 / 12, 1.0),
    "[[1,2],3,4]": (0.0, 0.1, 0.2, 0.5, 1.0),
}
"""Structure -> score by the number of right answers in the leading run."""


def samples(path: Path) -> list[Question]:
    """Questions from the released Parquet. Raises InputError naming the row and its problem."""
    questions = []
    places: Counter[str] = Counter()
    for row in read_question_rows(path):
        video = text_field(row, "video_id")
        places[video] += 1
        options = with_letters(options_field(row, "options"))
        questions.append(
            Question(
                id=text_field(row, "question_id"),
                video=video,
                question=text_field(row, "question"),
                options=options,
                answer=key_field(row, "answer", len(options)),
                groups={
                    "group_type": text_field(row, "group_type"),
                    "group_structure": _structure(row),
                    "place": str(places[video]),
                    **{axis: cell_text(row.get(axis)) or "None" for axis in AXES},
                },
                released=row,
            )
        )
    return questions


def _structure(row: QuestionRow) -> str:
    """The structure without white space; that of a relevance group does not count and may be anything."""
    structure = (cell_text(row.get("group_structure")) or "").replace(" ", "")
    kind = text_field(row, "group_type")
    if kind not in ("relevance", "logic") or (kind == "logic" and structure not in LOGIC):
        raise InputError(f"a group of kind {kind!r:.40} and structure {structure!r:.40}", where=row_place(row))
    return structure


ASK = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, D, E, F, G, or H) of the correct option."
)
REASON = (
    "Please perform a detailed reasoning based on the provided video frames to answer the following multiple-choice "
    "question selecting the best option from A through H and providing your final response strictly in the format: "
    "'Final Answer: <letter>."
)


def prompt(sample: Question, style: str, subtitles: str | None) -> str:
    """The user's turn after the frames; `subtitles` has all words, None if the run has no subtitles."""
    listing = "" if subtitles is None else f"This video's subtitles are listed below:\n{subtitles}\n"
    if style == "lmms-eval":
        begin = f"{listing}\n" if listing else ""
    else:
        begin = f"These are the frames of a video.{' ' if listing else ''}{listing}"
    options = "\n".join(sample.options)
    return f"{begin}Question: {sample.question}\n{options}\n{REASON if style == 'reasoning' else ASK}"


def group_score(kind: str, structure: str, right: Sequence[bool]) -> float:
    """The score of a group, 0 to 1, of which questions are answered right, in the order of the questions."""
    if kind == "relevance":
        return SQUARES[sum(right)]
    leading = next((i for i, correct in enumerate(right) if not correct), len(right))
    # Questions that do not build on one another: the later one of two may stand for the earlier.
    if (structure == "[1,[2,3],4]" and leading == 1 and right[2]) or (
        structure == "[[1,2],3,4]" and leading == 0 and right[1]
    ):
        leading += 1
    return LOGIC[structure][leading]


def _chance(kind: str, structure: str, letters: Sequence[str]) -> float:
    """The expected score of a group whose letters are random."""
    return sum(
        group_score(kind, structure, right)
        * prod(1 / len(of) if correct else 1 - 1 / len(of) for of, correct in zip(letters, right, strict=True))
        for right in product((False, True), repeat=4)
    )


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Breakdown under the common rules, and the group scores; groups with questions that failed are left out."""
    for row in rows:
        groups = row["groups"]
        if groups["group_type"] != "relevance" and groups["group_structure"] not in LOGIC:
            raise InputError(f"unknown structure {groups['group_structure']!r:.40}", where=f"question {row['id']}")
    summary = breakdown([to_reply(row) for row in rows], AXES)
    by_video: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_video[row["video"]][row["groups"]["place"]] = row
    whole = [[of[place] for place in "1234"] for of in by_video.values() if set(of) >= set("1234")]
    if left_out := len(by_video) - len(whole):
        summary["warnings"].append(f"{left_out:,} of {len(by_video):,} groups have fewer than four answers, left out")
    return {**summary, "official": _official(rows, whole)}


def _official(rows: Sequence[Mapping[str, Any]], whole: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    values: dict[str, list[tuple[float, str]]] = defaultdict(list)
    chances = []
    for group in whole:
        last, right = group[-1]["groups"], [_is_right(row) for row in group]
        kind, structure, video = last["group_type"], last["group_structure"], group[-1]["video"]
        names = ["total", "relevance (consistency)" if kind == "relevance" else "logic (coherence)"]
        names += [f"{axis.replace('_', ' ')} {last[axis]}" for axis in AXES if last[axis] != "None"]
        for name in names:
            values[name].append((group_score(kind, structure, right), video))
        if kind == "relevance":
            values["relevance, linear"].append((sum(right) / 4, video))
        chances.append(_chance(kind, structure, [row["letters"] for row in group]))
    values["questions"] = [(float(_is_right(row)), row["video"]) for row in rows]
    first = ["total", "relevance (consistency)", "relevance, linear", "logic (coherence)", "questions"]
    names = [name for name in first if name in values] + sorted(set(values) - set(first))
    scores: dict[str, Estimate] = {name: clustered_mean(*zip(*values[name], strict=True)) for name in names}
    chance = sum(chances) / len(chances) if chances else 0.0
    return own_rule("mean over groups of four questions, the first letter of a reply counts", scores, chance=chance)


def _is_right(row: Mapping[str, Any]) -> bool:
    return first_letter(row["response"], "ABCDEFGH", PHRASES) == row["answer"]
