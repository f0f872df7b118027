"""Chat samples with images and videos, one after another from a file: LLaVA's rows and OpenAI's messages.

A row is `{"image": PATH or [PATHS], "video": ..., "conversations": [{"from": "human"|"gpt"|"system", "value": TEXT}]}`
or `{"messages": [{"role": ..., "content": TEXT or [parts]}]}`; the keys `images` and `videos` mean the same. `<image>`
and `<video>` in a text stand for the next image and the next video; where a row has videos alone, `<image>` stands for
one of them, as LLaVA-Video writes it. A part is `{"type": "text", "text": ...}`, `{"type": "image", "image": PATH}`,
`{"type": "image_url", "image_url": {"url": PATH}}` or `{"type": "video", "video": PATH}`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lvctx.errors import InputError
from lvctx.text.streams import BROKEN, open_stream
from lvctx.train.chat import ROLES
from lvctx.vision.tokens import Kind


class Media(NamedTuple):
    """An image or video of a sample."""

    kind: Kind
    path: str
    """As the row has it, relative to the folder of media."""


@dataclass(frozen=True, kw_only=True)
class ChatSample:
    """One checked row."""

    where: str
    """File and line (or element), for errors and for what was left out."""
    turns: tuple[tuple[str, tuple[str | Media, ...]], ...]
    """Role, and the content as text and media in their order."""

    @property
    def media(self) -> list[Media]:
        """All of them, in order."""
        return [part for _, parts in self.turns for part in parts if isinstance(part, Media)]


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and parsed JSON of every row of a JSONL file (also .gz, .zst), a line at a time, or of a JSON list, whole.

    A malformed line comes as the InputError that names it. Raises InputError for a file that cannot be read.
    """
    try:
        with open_stream(str(path)) as f:
            head = f.peek(64)[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
            if head.startswith(b"["):
                yield from ((f"{path}[{i}]", row) for i, row in enumerate(json.loads(f.read())))
                return
            for number, line in enumerate(f, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    try:
                        yield where, json.loads(line)
                    except ValueError as e:
                        yield where, InputError(f"malformed JSON ({e})", where=where, fix="mend or remove the line")
    except BROKEN as e:
        raise InputError(f"cannot read ({e})", where=path, fix="is the file whole?") from e
    except ValueError as e:
        raise InputError(f"malformed JSON ({e})", where=path, fix="mend the file") from e


def check_row(row: Any, where: str) -> ChatSample:
    """A row as a sample. Raises InputError for what is no conversation, an unknown role, or marks without media."""
    if isinstance(row, InputError):
        raise row
    turns = row.get("conversations", row.get("messages")) if isinstance(row, dict) else None
    if not isinstance(turns, list):
        raise InputError("no list of `conversations` or `messages`", where=where)
    images, videos = _named(row, "image", where), _named(row, "video", where)
    waiting: dict[str, list[Media]] = {"<image>": images or videos, "<video>": videos}
    marks, given = 0, len(images) + len(videos)
    checked = []
    for turn in turns:
        named = (turn.get("from", turn.get("role")) if isinstance(turn, dict) else turn) or "nobody"
        role = ROLES.get(str(named))
        if role is None:
            raise InputError(f"a turn from {named!r}", where=where, fix="use human, gpt or system")
        parts: list[str | Media] = []
        for part in _parts(turn.get("value", turn.get("content")), where):
            if isinstance(part, Media):
                parts.append(part)
                continue
            for piece in re.split(r"(\n?<image>\n?|\n?<video>\n?)", part):
                mark = piece.strip("\n")
                if mark in waiting:
                    marks += 1
                    parts += waiting[mark][:1]
                    del waiting[mark][:1]
                elif piece:
                    parts.append(piece)
        checked.append((role, tuple(parts)))
    if marks != given or images or videos:
        raise InputError(f"{marks} marks for {given} images and videos", where=where, fix="write <image> or <video>")
    if not any(role == "assistant" and any(str(p).strip() for p in parts) for role, parts in checked):
        raise InputError("no answer to learn from", where=where)
    return ChatSample(where=where, turns=tuple(checked))


def _named(row: dict[str, Any], kind: Kind, where: str) -> list[Media]:
    named = row.get(kind) or row.get(f"{kind}s") or []
    paths = [named] if isinstance(named, str) else named
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        raise InputError(f"`{kind}` is neither a path nor a list of paths", where=where)
    return [Media(kind, path) for path in paths]


def _parts(content: Any, where: str) -> Iterator[str | Media]:
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        value = part if kind is None else part.get(kind)
        if kind == "image_url" and isinstance(value, dict):
            kind, value = "image", value.get("url")
        if not isinstance(value, str) or kind not in (None, "text", "image", "video"):
            raise InputError(f"a turn's content is {json.dumps(part)[:60]}", where=where, fix="give text or parts")
        yield Media(kind, value.removeprefix("file://")) if kind in ("image", "video") else value
