"""Conversations with images and videos: the parser of LLaVA's, OpenAI's and other rows, and of preference pairs.

A row is `{"image": PATH or [PATHS], "video": ..., "conversations": [{"from": "human"|"gpt"|"system", "value": TEXT}]}`
or `{"messages": [{"role": ..., "content": TEXT or [parts]}]}`; the keys `images` and `videos` mean the same, and
`system` is the text of a system turn. `<image>` and `<video>` in a text mark the next image and the next video; in a
row with videos only, `<image>` marks a video, as in LLaVA-Video; in a row without media, both are plain text. A part is
`{"type": "text", "text": ...}`, `{"type": "image", "image": PATH}`, `{"type": "image_url", "image_url": {"url": PATH}}`
or `{"type": "video", "video": PATH}`; a part without a path is the next of the row's. Assistant turns before the first
user turn are left out, as in LLaVA.

LongAlpaca's rows are `{"instruction": TEXT, "input": TEXT, "output": TEXT}`, M3IT's `{"instruction": TEXT, "inputs":
TEXT, "outputs": TEXT, "image_base64_str": [TEXT]}`: a question with its images first, and its answer.

A pair is `{"prompt": TEXT, "chosen": TEXT, "rejected": TEXT, "image" or "images": PATH or [PATHS]}`, or TRL's format
with lists of messages; `conversations` in LLaVA's format, ending in a human turn, may replace `prompt`, and the lists
`chosen` and `rejected` may begin with the prompt.

Files and datasets are those of `records`; images in them become files (`row_images`).
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from lvctx.data.records import Record
from lvctx.data.row_images import chat_records
from lvctx.errors import InputError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MediaKind = Literal["image", "video"]
MEDIA_KINDS: tuple[MediaKind, ...] = ("image", "video")
ParsedT = TypeVar("ParsedT")


class Media(NamedTuple):
    """An image or video of a conversation."""

    kind: MediaKind
    path: str
    """Path in the row, relative to the folder of media."""


class Turn(NamedTuple):
    """A turn of the user, the assistant or the system."""

    role: str
    """`user`, `assistant` or `system`."""
    content: tuple[str | Media, ...]
    """Text and media in order."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One checked row."""

    where: str
    """Its location, for errors."""
    turns: tuple[Turn, ...]
    """Turns up to the last answer."""
    folder: Path = Path()
    """The folder of media."""

    @property
    def media(self) -> list[Media]:
        """Images and videos in order."""
        return [part for turn in self.turns for part in turn.content if isinstance(part, Media)]

    @property
    def images(self) -> tuple[Path, ...]:
        """Files of the images in order."""
        return tuple(self.folder / media.path for media in self.media if media.kind == "image")


def read_conversations(path: Path, images: Path) -> list[Conversation]:
    """Every row of a file or dataset, of text and images; image paths are relative to `images`.

    Raises InputError naming the first bad row (malformed JSON, a missing image file, `<image>` marks and images that
    differ in number, an unknown role, no answer or an empty one), with the number of bad rows.
    """
    return _parse_all(path, images, lambda record: _with_images(parse_conversation(record), images))


def read_pairs(path: Path, images: Path) -> list[tuple[Conversation, Conversation]]:
    """Every row of a file or dataset of preference pairs, as conversations with the chosen and the rejected answer.

    Image paths are relative to `images`. Raises InputError naming the first bad row, as `read_conversations` does.
    """

    def parse(record: Record) -> tuple[Conversation, Conversation]:
        chosen, rejected = parse_pair(record)
        return _with_images(chosen, images), _with_images(rejected, images)

    return _parse_all(path, images, parse)


def _parse_all(path: Path, folder: Path, parse: Callable[[Record], ParsedT]) -> list[ParsedT]:
    parsed, bad = [], []
    for record in chat_records(path, folder):
        try:
            parsed.append(parse(record))
        except InputError as e:
            bad.append(e)
    if bad:
        more = f" ({len(bad):,} bad rows in total)" if len(bad) > 1 else ""
        raise InputError(bad[0].what + more, where=bad[0].where, fix=bad[0].fix or "correct or remove the row")
    if not parsed:
        raise InputError("no row", where=path)
    return parsed


def _with_images(conversation: Conversation, folder: Path) -> Conversation:
    """The conversation with its images as files in `folder`. Raises InputError for a video or a missing file."""
    conversation = replace(conversation, folder=folder)
    if len(conversation.images) < len(conversation.media):
        raise InputError("a video", where=conversation.where, fix="give samples of text and images")
    for image in conversation.images:
        if not _is_file(image):
            raise InputError(
                f"no such image {image}", where=conversation.where, fix="check --images, or remove the row"
            )
    return conversation


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except ValueError:  # not a valid file name
        return False


def parse_conversation(record: Record) -> Conversation:
    """A row as a conversation. Raises InputError for other rows, unknown roles, and marks that do not match media."""
    row, where = record.fields(), record.where
    turns = _first(row, "conversations", "messages") or _instruction_turns(row)
    if not isinstance(turns, list):
        raise InputError("no list of `conversations` or `messages`, and no `instruction`", where=where)
    roles = [_role(turn, where) for turn in turns]
    begin = roles.index("user") if "user" in roles else len(roles)
    media = _RowMedia(row, where)
    parsed = [
        Turn(role, tuple(media.parts(_first(turn, "value", "content"))))
        for i, (role, turn) in enumerate(zip(roles, turns, strict=True))
        if i >= begin or role == "system"
    ]
    parsed = [*_system_turn(row, parsed, where), *parsed]
    answers = [i for i, turn in enumerate(parsed) if turn.role == "assistant"]
    if not answers:
        raise InputError("no answer to train on", where=where)
    media.check()
    for i in answers:
        if not any(isinstance(part, Media) or part.strip() for part in parsed[i].content):
            raise InputError("an empty answer", where=where)
    if any(isinstance(part, Media) for turn in parsed[answers[-1] + 1 :] for part in turn.content):
        raise InputError("an image or video after the last answer", where=where, fix="remove what follows the answer")
    return Conversation(where=where, turns=tuple(parsed[: answers[-1] + 1]))


def _instruction_turns(row: dict[str, Any]) -> list[Any] | None:
    """The two turns of a row with an instruction; None for other rows."""
    texts = [text for text in (row.get("instruction"), _first(row, "input", "inputs")) if text]
    answer = _first(row, "output", "outputs")
    if row.get("instruction") is None or answer is None:
        return None
    images = [{"type": "image"} for _ in row.get("images") or []]
    question = "\n".join(texts) if all(isinstance(text, str) for text in texts) else texts
    return [
        {"from": "human", "value": [*images, {"type": "text", "text": question}]},
        {"from": "gpt", "value": [{"type": "text", "text": answer}]},
    ]


def parse_pair(record: Record) -> tuple[Conversation, Conversation]:
    """A row of preferences as its chosen and its rejected conversation. Raises InputError for other rows."""
    row, where = record.fields(), record.where
    prompt, *answers = _pair_turns(row, where)
    if any(_role(answer, where) != "assistant" for answer in answers):
        raise InputError("`chosen` or `rejected` does not end with the assistant's text", where=where)
    chosen, rejected = (
        parse_conversation(Record(where, {**row, "conversations": [*prompt, answer], "messages": None}))
        for answer in answers
    )
    if len(chosen.turns) < 2 or chosen.turns[-2].role != "user":
        raise InputError("the prompt does not end with a human turn", where=where)
    texts = [[p.strip() if isinstance(p, str) else p for p in one.turns[-1].content] for one in (chosen, rejected)]
    if texts[0] == texts[1]:
        raise InputError("`chosen` and `rejected` are the same", where=where)
    return chosen, rejected


def _pair_turns(row: dict[str, Any], where: str) -> tuple[list[Any], Any, Any]:
    """The turns of a pair's prompt, and the turns of the two answers, as in the row."""
    prompts = [row[key] for key in ("prompt", "conversations") if row.get(key) is not None]
    if len(prompts) > 1:
        raise InputError("give either `prompt` or `conversations`", where=where)
    answers = [_as_turns(row.get(key), "gpt") for key in ("chosen", "rejected")]
    if not all(answers):
        raise InputError("`chosen` and `rejected` have to be non-empty text or messages", where=where)
    inside = [answer[:-1] for answer in answers]
    if not prompts and not all(inside):
        raise InputError("give either `prompt` or `conversations`", where=where)
    if inside[0] != inside[1]:
        raise InputError("`chosen` and `rejected` begin with different prompts", where=where)
    turns = _as_turns(row.get("prompt"), "human") or row.get("conversations") or inside[0]
    if not isinstance(turns, list) or not turns:
        raise InputError("no list of `conversations`, or text or messages in `prompt`", where=where)
    if inside[0] and not (turns == inside[0] or _last_text(turns) == _last_text(inside[0])):
        raise InputError("`chosen` begins with another prompt than the row's", where=where)
    # Messages in the answers may have turns before a prompt given as text.
    return inside[0] or turns, answers[0][-1], answers[1][-1]


def _as_turns(value: Any, role: str) -> list[Any]:
    """A list of turns from text, a turn or a list; empty for other or empty values."""
    if isinstance(value, str):
        return [{"from": role, "value": value}] if value.strip() else []
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else []


def _last_text(turns: list[Any]) -> Any:
    return _first(turns[-1], "value", "content") if isinstance(turns[-1], dict) else None


def _first(row: dict[str, Any], *keys: str) -> Any:
    """The first value that is not empty: a table's row has all keys of all rows."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _role(turn: Any, where: str) -> str:
    """user, assistant or system. Raises InputError for any other role."""
    named = _first(turn, "from", "role") if isinstance(turn, dict) else turn
    role = ROLES.get(named) if isinstance(named, str) and isinstance(turn, dict) else None
    if role is None:
        raise InputError(f"a turn from {str(named)[:60]!r}", where=where, fix="use human, gpt or system")
    return role


def _system_turn(row: dict[str, Any], turns: list[Turn], where: str) -> list[Turn]:
    """The system turn from the row's key `system`."""
    text = row.get("system")
    if text is None or text == "":
        return []
    if not isinstance(text, str):
        raise InputError("`system` is not text", where=where)
    _check_characters(text, where)
    present = [turn.content for turn in turns if turn.role == "system"]
    if present and present != [(text,)]:
        raise InputError("both a system turn and the key `system`", where=where, fix="keep one")
    return [] if present else [Turn("system", (text,))]


def _check_characters(text: str, where: str) -> None:
    """Raise InputError for a lone surrogate, and for the noncharacter used as a mark by `models.chat_template`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("half a character (a lone surrogate) in the text", where=where) from None
    if "\ufdd0" in text:
        raise InputError("U+FDD0 in the text, which Unicode reserves as a noncharacter", where=where)


class _RowMedia:
    """Images and videos of a row, assigned to the marks in its turns."""

    def __init__(self, row: dict[str, Any], where: str) -> None:
        self.where = where
        self._media = {kind: _media_of(row, kind, where) for kind in MEDIA_KINDS}
        self._used = dict.fromkeys(MEDIA_KINDS, 0)

    def _kind(self, mark: str) -> MediaKind:
        """The media kind of a mark: a video for any mark in a row with videos only."""
        return "image" if mark == "image" and (self._media["image"] or not self._media["video"]) else "video"

    def _next(self, kind: MediaKind) -> list[Media]:
        self._used[kind] += 1
        return self._media[kind][self._used[kind] - 1 : self._used[kind]]

    def parts(self, content: Any) -> Iterator[str | Media]:
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
        _check_characters(text, self.where)
        marks = [kind for kind in MEDIA_KINDS if self._media[self._kind(kind)]]
        # The visual block closes with its own "\n", so a newline beside a mark would be a second one.
        pieces = re.split(rf"\n?<({'|'.join(marks)})>\n?", text) if marks else [text]
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


def _media_of(row: dict[str, Any], kind: MediaKind, where: str) -> list[Media]:
    paths = row.get(kind) or row.get(f"{kind}s") or []
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise InputError(f"`{kind}` is neither a path nor a list of paths", where=where)
    return [Media(kind, path) for path in paths]
