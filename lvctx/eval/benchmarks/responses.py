"""Video-MME's responses file: read leniently, with every tolerated deviation counted; written strictly.

A list of videos, each `{"video_id", "duration", "domain", "sub_category", "questions": [{"question_id", "task_type",
"question", "options", "answer", "response"}]}`. The released template has trailing commas, and the released script
reads other names (`duration_category`, `video_category`, `video_subcategory`): both are understood.
"""

import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvctx.artifacts.store import write_json
from lvctx.data.records import json_records
from lvctx.data.streams import read_text
from lvctx.errors import InputError
from lvctx.eval.benchmarks.accuracy import NO_KEY, NO_TEXT, Notes
from lvctx.eval.benchmarks.answers import BenchmarkReply, Question
from lvctx.eval.benchmarks.fields import MOST_OPTIONS, cell_text, check_unicode, parse_key, parse_list

GROUPS = ("duration", "domain", "sub_category", "task_type")
ALIASES = {"duration": "duration_category", "domain": "video_category", "sub_category": "video_subcategory"}


@dataclass(frozen=True, kw_only=True)
class Responses:
    """The content of a responses file."""

    name: str
    """Display name."""
    replies: list[BenchmarkReply]
    """Questions that can be scored."""
    leniencies: dict[str, int]
    """Tolerated deviation -> its number: trailing commas, missing fields, questions left out."""
    warnings: list[str]
    """Deviations that may change a score: unreadable keys and responses, with the first of each kind."""


def read_responses(path: Path) -> Responses:
    """Read a responses file, or that of a run's directory.

    One video per line is accepted too. Raises InputError for a file that is not JSON even without its trailing commas,
    not a list of videos, or without any question that can be scored.
    """
    file = path / "responses.json" if path.is_dir() else path
    overlooked: Counter[str] = Counter()
    notes = Notes()
    replies: list[BenchmarkReply] = []
    for number, video in enumerate(_videos(file, overlooked)):
        if str(video.get("missing")).lower() in ("true", "1"):
            overlooked["videos marked missing, left out"] += 1
            continue
        of_video = {g: _field(video, g, overlooked) for g in GROUPS[:3]}
        video_id = cell_text(video.get("video_id")) or str(number)
        overlooked["without video_id"] += "video_id" not in video
        for position, question in enumerate(video["questions"], start=1):
            key, response = question.get("answer"), question.get("response")
            name = cell_text(question.get("question_id")) or f"{video_id}-{position}"
            if key is None or key == "":
                overlooked["questions without answer, left out"] += 1
                continue
            count = _count_options(question)
            answer = parse_key(key, count)
            if answer is None:
                notes.add(NO_KEY, name, key)
                continue
            overlooked["answers in another form than their letter"] += answer != key
            if response is None:
                overlooked["questions without response, read as empty"] += 1
            elif not isinstance(response, str):
                notes.add(NO_TEXT, name, response)
            overlooked["without question_id"] += "question_id" not in question
            replies.append(
                BenchmarkReply(
                    id=name,
                    video=video_id,
                    answer=answer,
                    response=response if isinstance(response, str) else "",
                    letters="".join(chr(65 + i) for i in range(max(count, 4))),
                    groups={**of_video, "task_type": _field(question, "task_type", overlooked)},
                )
            )
    if not replies:
        raise InputError("; ".join(["no question with an answer", *notes.lines()]), where=file)
    twice = len(replies) - len({r.id for r in replies})
    overlooked["questions given twice, both counted"] += twice
    name = os.fsencode(path.name if path.is_dir() else path.stem).decode("utf-8", "replace")
    return Responses(
        name=name,
        replies=replies,
        leniencies={k: n for k, n in (overlooked + notes.counts).items() if n},
        warnings=notes.lines(),
    )


def _count_options(question: Mapping[str, Any]) -> int:
    """Number of options of a question; Video-MME's four if it does not list them."""
    try:
        count = len(parse_list(question.get("options")))
    except ValueError:
        return 4
    return count if 2 <= count <= MOST_OPTIONS else 4


# Matches a whole string, even an unclosed one, so that a comma inside it is kept; else a comma before a bracket.
_SPARE_COMMA = re.compile(r'("(?:[^"\\]|\\.)*+"?)|,(?=\s*+[\]}])', re.DOTALL)


def _videos(file: Path, overlooked: Counter[str]) -> list[dict[str, Any]]:
    text = read_text(file)
    try:
        videos = list(_parse(text, file))
    except InputError:
        mended = _SPARE_COMMA.sub(lambda m: m[1] or "", text)
        overlooked["trailing commas"] = len(text) - len(mended)
        videos = list(_parse(mended, file))
    return videos


def _parse(text: str, file: Path) -> Iterator[dict[str, Any]]:
    """Videos in JSON. Raises InputError naming a value that is not a video."""
    for record in json_records(io.BufferedReader(io.BytesIO(text.encode())), str(file)):
        questions = record.fields().get("questions")
        if not isinstance(questions, list) or not all(isinstance(q, dict) for q in questions):
            fix = "give Video-MME's responses format"
            raise InputError("not a list of videos with questions", where=record.where, fix=fix)
        try:
            check_unicode(record.value)
        except ValueError as e:
            raise InputError(str(e), where=record.where) from None
        yield record.value


def _field(row: Mapping[str, Any], name: str, overlooked: Counter[str]) -> str:
    value = cell_text(row.get(name)) or cell_text(row.get(ALIASES.get(name, name)))
    if not value:
        overlooked[f"without {name}"] += 1
    return value or "unknown"


def write_responses(target: Path, answered: Iterable[tuple[Question, str]]) -> None:
    """Write samples and their responses, video by video in order, exactly in the released format."""
    videos: dict[str, dict[str, Any]] = {}
    for sample, response in answered:
        row = sample.released
        video = videos.setdefault(
            row["video_id"], {"video_id": row["video_id"], **{k: sample.groups[k] for k in GROUPS[:3]}, "questions": []}
        )
        fields = {"question_id": sample.id, "task_type": sample.groups["task_type"], "question": sample.question}
        video["questions"].append(
            {**fields, "options": list(sample.options), "answer": sample.answer, "response": response}
        )
    write_json(target, list(videos.values()))
