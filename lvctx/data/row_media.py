"""The images and videos of a row of chat data, assigned to the marks in its turns."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from lvctx.errors import InputError
from lvctx.models.chat_template import check_text

MediaKind = Literal["image", "video"]
MEDIA_KINDS: tuple[MediaKind, ...] = ("image", "video")


class Media(NamedTuple):
    """An image or video of a conversation."""

    kind: MediaKind
    path: str
    """Path in the row, relative to the folder of media."""


class RowMedia:
    """Images and videos of a row, assigned to the marks in its turns."""

    def __init__(self, row: dict[str, Any], where: str, *, lone_first: bool) -> None:
        """`lone_first` moves the only image or video of a turn to the front of the turn."""
        self.where, self._lone_first = where, lone_first
        self._media = {kind: media_of(row, kind, where) for kind in MEDIA_KINDS}
        self._used = dict.fromkeys(MEDIA_KINDS, 0)
        marks = [kind for kind in MEDIA_KINDS if self._media[self._kind(kind)]]
        self._mark = re.compile(rf"<({'|'.join(marks)})>" if marks else "((?!))")

    def _kind(self, mark: str) -> MediaKind:
        """The media kind of a mark: a video for any mark in a row with videos only."""
        return "image" if mark == "image" and (self._media["image"] or not self._media["video"]) else "video"

    def _next(self, kind: MediaKind) -> list[Media]:
        self._used[kind] += 1
        return self._media[kind][self._used[kind] - 1 : self._used[kind]]

    def turn(self, content: Any) -> tuple[str | Media, ...]:
        """A turn's text and media in order."""
        if self._lone_first and isinstance(content, str) and len(self._mark.findall(content)) == 1:
            before, mark, after = self._mark.split(content)
            if before:
                content = f"<{mark}>{(before + after).strip()}"
        parts = tuple(self._parts(content))
        media = [part for part in parts if isinstance(part, Media)]
        if not self._lone_first or len(media) != 1 or media[0] is parts[0]:
            return parts
        text = "".join(part for part in parts if isinstance(part, str)).strip()
        return (media[0], text) if text else (media[0],)

    def _parts(self, content: Any) -> Iterator[str | Media]:
        """A turn's text and media in order."""
        for part in content if isinstance(content, list) else [content]:
            kind = part.get("type") if isinstance(part, dict) else None
            value = part if kind is None else part.get(kind) if isinstance(kind, str) else None
            if kind == "image_url" and isinstance(value, dict):
                kind, value = "image", value.get("url")
            if kind in MEDIA_KINDS and value is None and self._media[self._kind(kind)]:
                yield from self._next(self._kind(kind))
            elif not isinstance(value, str) or kind not in (None, "text", *MEDIA_KINDS):
                excerpt = json.dumps(part, default=str)[:60]
                raise InputError(f"a turn's content is {excerpt}", where=self.where, fix="give text or parts")
            elif kind in MEDIA_KINDS:
                yield Media(kind, value.removeprefix("file://"))
            else:
                yield from self._text(value)

    def _text(self, text: str) -> Iterator[str | Media]:
        check_text(text, self.where)
        # The visual block closes with its own "\n", so a newline beside a mark would be a second one.
        pieces = re.split(rf"\n?{self._mark.pattern}\n?", text)
        for i, piece in enumerate(pieces):
            if i % 2:
                yield from self._next(self._kind(piece))
            elif piece:
                yield piece

    def check(self) -> None:
        """Raises InputError if there were more marks than media, or fewer."""
        for kind, media in self._media.items():
            if self._used[kind] != len(media):
                what = f"{self._used[kind]} <{kind}> marks for {len(media)} {kind}s"
                raise InputError(what, where=self.where, fix=f"write <{kind}> at the position of each")


def media_of(row: dict[str, Any], kind: MediaKind, where: str) -> list[Media]:
    """The images or videos in a row's own keys. Raises InputError for other values than paths."""
    paths = row.get(kind) or row.get(f"{kind}s") or []
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise InputError(f"`{kind}` is neither a path nor a list of paths", where=where)
    return [Media(kind, path) for path in paths]


def first_value(row: dict[str, Any], *keys: str) -> Any:
    """The first value that is not empty: a table's row has all keys of all rows."""
    return next((row[key] for key in keys if row.get(key) is not None), None)
