"""Video-MME's responses file: read leniently, with every leniency counted; written strictly.

A list of videos, each `{"video_id", "duration", "domain", "sub_category", "questions": [{"question_id", "task_type",
"question", "options", "answer", "response"}]}`. The released template has trailing commas, and the released script
reads other names (`duration_category`, `video_category`, `video_subcategory`): both are understood.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvctx.artifacts.store import write_json
from lvctx.bench.choice import Reply, Sample
from lvctx.errors import InputError

GROUPS = ("duration", "domain", "sub_category", "task_type")
ALIASES = {"duration": "duration_category", "domain": "video_category", "sub_category": "video_subcategory"}


@dataclass(frozen=True, kw_only=True)
class Responses:
    """One file, read."""

    name: str
    """What to call it."""
    replies: list[Reply]
    """Questions that can be scored."""
    leniencies: dict[str, int]
    """What was overlooked -> how often: trailing commas, missing fields, questions left out."""


def read_responses(path: Path) -> Responses:
    """Read a responses file, or that of a run's directory.

    Raises InputError for a file that is not JSON even without its trailing commas, or not a list of videos.
    """
    file = path / "responses.json" if path.is_dir() else path
    overlooked: Counter[str] = Counter()
    videos = _parse(file, overlooked)
    if not isinstance(videos, list) or not all(
        isinstance(v, dict) and isinstance(v.get("questions"), list) for v in videos
    ):
        raise InputError("not a list of videos with questions", where=file, fix="give Video-MME's responses format")
    replies: list[Reply] = []
    for number, video in enumerate(videos):
        if video.get("missing") is True:
            overlooked["videos marked missing, left out"] += 1
            continue
        of_video = {g: _field(video, g, overlooked) for g in GROUPS[:3]}
        video_id = str(video.get("video_id") or number)
        overlooked["without video_id"] += "video_id" not in video
        for place, question in enumerate(video["questions"], start=1):
            answer = str(question.get("answer") or "").strip().upper()[:1]
            if not answer:
                overlooked["questions without answer, left out"] += 1
                continue
            if not isinstance(question.get("response"), str):
                overlooked["questions without response, read as empty"] += 1
            overlooked["without question_id"] += "question_id" not in question
            replies.append(
                Reply(
                    id=str(question.get("question_id") or f"{video_id}-{place}"),
                    video=video_id,
                    answer=answer,
                    response=str(question.get("response") or ""),
                    groups={**of_video, "task_type": _field(question, "task_type", overlooked)},
                )
            )
    twice = len(replies) - len({r.id for r in replies})
    overlooked["questions given twice, both counted"] += twice
    name = path.name if path.is_dir() else path.stem
    return Responses(name=name, replies=replies, leniencies={k: n for k, n in overlooked.items() if n})


def _parse(file: Path, overlooked: Counter[str]) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError("no such file", where=file, fix="give a responses file, or a directory with one") from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read ({e})", where=file) from e
    try:
        return json.loads(text)
    except ValueError:
        # A comma before a closing bracket; strings are matched as a whole, so a comma inside one stays.
        mended = re.sub(r'("(?:\\.|[^"\\])*")|,(?=\s*[\]}])', lambda m: m[1] or "", text)
        overlooked["trailing commas"] = len(text) - len(mended)
    try:
        return json.loads(mended)
    except ValueError as e:
        raise InputError(f"malformed JSON ({e})", where=file, fix="mend the file") from e


def _field(row: Mapping[str, Any], name: str, overlooked: Counter[str]) -> str:
    value = row.get(name) or row.get(ALIASES.get(name, name))
    if not value:
        overlooked[f"without {name}"] += 1
    return str(value or "unknown")


def write_responses(target: Path, answered: Iterable[tuple[Sample, str]]) -> None:
    """Write samples and what was said to them, video by video as they come, exactly in the released format."""
    videos: dict[str, dict[str, Any]] = {}
    for sample, response in answered:
        row = sample.released
        video = videos.setdefault(
            str(row["video_id"]), {**{k: str(row[k]) for k in ("video_id", *GROUPS[:3])}, "questions": []}
        )
        said = {k: str(row[k]) for k in ("question_id", "task_type", "question")}
        video["questions"].append(
            {**said, "options": list(sample.options), "answer": sample.answer, "response": response}
        )
    write_json(target, list(videos.values()))
