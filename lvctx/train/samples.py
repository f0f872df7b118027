"""Rows of chat data, for every command that reads them: LLaVA's, ShareGPT's and OpenAI's, with images and videos.

A row is `{"image": PATH or [PATHS], "video": ..., "conversations": [{"from": "human"|"gpt"|"system", "value": TEXT}]}`
or `{"messages": [{"role": ..., "content": TEXT or [parts]}]}`; the keys `images` and `videos` mean the same, and
`system` is the text of a system turn. `<image>` and `<video>` in a text stand for the next image and the next video;
where a row has videos alone, `<image>` stands for one of them, as LLaVA-Video writes it; where it has neither, both are
text. A part is `{"type": "text", "text": ...}`, `{"type": "image", "image": PATH}`, `{"type": "image_url", "image_url":
{"url": PATH}}` or `{"type": "video", "video": PATH}`; without a path it stands for the next of the row's.

What the assistant says before anybody asks is left out, as LLaVA does. Files are JSON lists or JSON lines, also .gz and
.zst, in UTF-8, UTF-16 or UTF-32 (the last two with their mark), or datasets (`tables`).
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lvctx.errors import InputError
from lvctx.model.template import check_text
from lvctx.text.streams import BROKEN, open_stream
from lvctx.train.tables import is_table, read_table
from lvctx.vision.tokens import Kind

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Media(NamedTuple):
    """An image or video of a sample."""

    kind: Kind
    path: str
    """As the row has it, relative to the folder of media."""


Turn = tuple[str, tuple[str | Media, ...]]
"""Role, and the content as text and media in their order."""


@dataclass(frozen=True, kw_only=True)
class ChatSample:
    """One checked row."""

    where: str
    """File and line (or element), for errors and for what was left out."""
    turns: tuple[Turn, ...]
    """Up to the last answer."""

    @property
    def media(self) -> list[Media]:
        """All of them, in order."""
        return [part for _, parts in self.turns for part in parts if isinstance(part, Media)]


T = TypeVar("T")


def read_checked(path: Path, images: Path, check: Callable[[Any, str], T]) -> list[T]:
    """What `check(row, where)` makes of every row (see `read_rows`).

    All rows are checked before the first bad one is raised, so that its InputError says how many there are.
    """
    found, bad = [], []
    for where, row in read_rows(path, images):
        try:
            found.append(check(row, where))
        except InputError as e:
            bad.append(e)
    if bad:
        more = f" ({len(bad):,} bad rows in all)" if len(bad) > 1 else ""
        raise InputError(bad[0].what + more, where=bad[0].where, fix=bad[0].fix or "mend or remove the row")
    if not found:
        raise InputError("no row", where=path)
    return found


def read_rows(path: Path, media: Path) -> Iterator[tuple[str, Any]]:
    """Place and content of every row of a file, a line at a time (a JSON list whole), or of a dataset.

    A malformed line comes as the InputError that names it. Pictures that lie in a dataset's rows are written to the
    folder `media`. Raises InputError for what cannot be read.
    """
    if is_table(path):
        yield from read_table(path, media)
        return
    if not path.exists():
        raise InputError("no such file", where=path)
    try:
        with open_stream(str(path)) as f:
            if f.peek(64)[:64].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                yield from ((f"{path}[{i}]", row) for i, row in enumerate(json.loads(f.read())))
                return
            # Lines end in "\n" alone: a string may hold U+2028 and U+0085 as they are.
            for number, line in enumerate(f, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    where = f"{path}:{number}"
                    try:
                        yield where, json.loads(line)
                    except (ValueError, RecursionError) as e:
                        yield where, InputError(f"malformed JSON ({e})", where=where, fix="mend or remove the line")
    except (*BROKEN, UnicodeDecodeError) as e:
        raise InputError(f"cannot read ({e})", where=path, fix="is the file whole?") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"malformed JSON ({e})", where=path, fix="mend the file") from e


def check_row(row: Any, where: str) -> ChatSample:
    """A row as a sample. Raises InputError for what is no conversation, an unknown role, or marks without media."""
    row = check_object(row, where)
    turns = next((row[key] for key in ("conversations", "messages") if row.get(key) is not None), None)
    if not isinstance(turns, list):
        raise InputError("no list of `conversations` or `messages`", where=where)
    given = [(role_of(turn, where), turn) for turn in turns]
    media = _RowMedia(row, where)
    checked = [(role, tuple(media.parts(first(turn, "value", "content")))) for role, turn in _kept(given)]
    checked = [*_system(row, checked, where), *checked]
    if not any(role == "assistant" for role, _ in checked):
        raise InputError("no answer to learn from", where=where)
    media.check()
    last = max(i for i, (role, _) in enumerate(checked) if role == "assistant")
    for role, parts in checked:
        if role == "assistant" and not any(isinstance(part, Media) or part.strip() for part in parts):
            raise InputError("an empty answer", where=where)
    if any(isinstance(part, Media) for _, parts in checked[last + 1 :] for part in parts):
        raise InputError("an image or video after the last answer", where=where, fix="remove what follows the answer")
    return ChatSample(where=where, turns=tuple(checked[: last + 1]))


def check_object(row: Any, where: str) -> dict[str, Any]:
    """A row that is a JSON object. Raises InputError, also the one that a malformed line came as."""
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError("not a JSON object", where=where)
    return row


def first(turn: dict[str, Any], *keys: str) -> Any:
    """The value of the first key that has one: a table's row has all keys of all rows."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def role_of(turn: Any, where: str) -> str:
    """user, assistant or system. Raises InputError for a turn of anyone else."""
    named = first(turn, "from", "role") if isinstance(turn, dict) else turn
    role = ROLES.get(named) if isinstance(named, str) and isinstance(turn, dict) else None
    if role is None:
        raise InputError(f"a turn from {str(named)[:60]!r}", where=where, fix="use human, gpt or system")
    return role


def _asked(given: list[tuple[str, Any]]) -> int:
    """The number of the first turn of a user."""
    return next((i for i, (role, _) in enumerate(given) if role == "user"), len(given))


def _kept(given: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The turns without the assistant's before anybody asked."""
    asked = _asked(given)
    return [(role, turn) for i, (role, turn) in enumerate(given) if i >= asked or role == "system"]


def _system(row: dict[str, Any], turns: list[Turn], where: str) -> list[Turn]:
    """The system turn that the row's own key holds."""
    text = row.get("system")
    if text is None or text == "":
        return []
    if not isinstance(text, str):
        raise InputError("`system` is not text", where=where)
    check_text(text, where)
    present = [parts for role, parts in turns if role == "system"]
    if present and present != [(text,)]:
        raise InputError("a system turn and the key `system`", where=where, fix="keep one")
    return [] if present else [("system", (text,))]


class _RowMedia:
    """Images and videos of a row, handed out to the marks of its turns."""

    def __init__(self, row: dict[str, Any], where: str) -> None:
        self.where = where
        self._given: dict[Kind, list[Media]] = {kind: _named(row, kind, where) for kind in ("image", "video")}
        self._used: dict[Kind, int] = {"image": 0, "video": 0}

    def _kind(self, mark: str) -> Kind:
        """What a mark stands for: in a row with videos alone, a video."""
        return "image" if mark == "image" and (self._given["image"] or not self._given["video"]) else "video"

    def _next(self, kind: Kind) -> list[Media]:
        self._used[kind] += 1
        return self._given[kind][self._used[kind] - 1 : self._used[kind]]

    def parts(self, content: Any) -> Iterator[str | Media]:
        """A turn's text and media in their order."""
        for part in content if isinstance(content, list) else [content]:
            kind = part.get("type") if isinstance(part, dict) else None
            value = part if kind is None else part.get(kind) if isinstance(kind, str) else None
            if kind == "image_url" and isinstance(value, dict):
                kind, value = "image", value.get("url")
            if kind in ("image", "video") and value is None and self._given[self._kind(kind)]:
                yield from self._next(self._kind(kind))
            elif not isinstance(value, str) or kind not in (None, "text", "image", "video"):
                shown = json.dumps(part, default=str)[:60]
                raise InputError(f"a turn's content is {shown}", where=self.where, fix="give text or parts")
            elif kind in ("image", "video"):
                yield Media(kind, value.removeprefix("file://"))
            else:
                yield from self._text(value)

    def _text(self, text: str) -> Iterator[str | Media]:
        check_text(text, self.where)
        marks = [kind for kind in ("image", "video") if self._given[self._kind(kind)]]
        # The visual block closes with its own "\n", so the newline around a mark would be a second one.
        pieces = re.split(rf"\n?<({'|'.join(marks)})>\n?", text) if marks else [text]
        for i, piece in enumerate(pieces):
            if i % 2:
                yield from self._next(self._kind(piece))
            elif piece:
                yield piece

    def check(self) -> None:
        """Raises InputError where there were more marks than media, or fewer."""
        for kind, given in self._given.items():
            if self._used[kind] != len(given):
                raise InputError(
                    f"{self._used[kind]} <{kind}> marks for {len(given)} {kind}s",
                    where=self.where,
                    fix=f"write <{kind}> where each belongs",
                )


def _named(row: dict[str, Any], kind: Kind, where: str) -> list[Media]:
    named = row.get(kind) or row.get(f"{kind}s") or []
    paths = [named] if isinstance(named, str) else named
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        raise InputError(f"`{kind}` is neither a path nor a list of paths", where=where)
    return [Media(kind, path) for path in paths]
