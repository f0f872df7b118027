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

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lvctx.data.records import Record
from lvctx.data.row_images import chat_records
from lvctx.data.row_media import MEDIA_KINDS, Media, MediaKind, RowMedia, first_value, media_of
from lvctx.errors import InputError
from lvctx.models.chat_template import check_text

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ParsedT = TypeVar("ParsedT")


class MediaFile(NamedTuple):
    """An image file, or a video: a file or a folder of frames."""

    kind: MediaKind
    path: Path
    packed: dict[str, Any] | None = None
    """What `pack-chat` stored about it (`data.packed_chat`), for media of packed rows."""


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
    def files(self) -> tuple[MediaFile, ...]:
        """Files of the images and videos in order."""
        return tuple(MediaFile(media.kind, self.folder / media.path) for media in self.media)

    @property
    def images(self) -> tuple[Path, ...]:
        """Files of the images in order."""
        return tuple(file.path for file in self.files if file.kind == "image")


def read_conversations(path: Path, images: Path, *, videos: bool = False) -> list[Conversation]:
    """Every row of a file or dataset, of text and images, and `videos`; their paths are relative to `images`.

    A turn's only image moves to its front, as in LLaVA's code, so that training has the prompts of inference.
    Raises InputError naming the first bad row (malformed JSON, a missing image file, `<image>` marks and images that
    differ in number, an unknown role, no answer or an empty one), with the number of bad rows.
    """

    def parse(record: Record) -> Conversation:
        return _with_files(parse_conversation(record, media_first=True), images, videos=videos)

    return _parse_all(path, images, parse)


def read_pairs(path: Path, images: Path) -> list[tuple[Conversation, Conversation]]:
    """Every row of a file or dataset of preference pairs, as conversations with the chosen and the rejected answer.

    Paths of images and videos are relative to `images`. A row's only one is at the front of a prompt without a mark, as
    in LLaVA-Hound's rows. Raises InputError naming the first bad row, as `read_conversations` does.
    """

    def parse(record: Record) -> tuple[Conversation, Conversation]:
        chosen, rejected = parse_pair(record, media_first=True)
        return _with_files(chosen, images, videos=True), _with_files(rejected, images, videos=True)

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


def _with_files(conversation: Conversation, folder: Path, *, videos: bool) -> Conversation:
    """The conversation with its files in `folder`. Raises InputError for a missing one, or a video if not `videos`."""
    conversation = replace(conversation, folder=folder)
    for kind, path, _ in conversation.files:
        if kind == "video" and not videos:
            fix = "give samples of text and images, or align with --stage full"
            raise InputError("a video", where=conversation.where, fix=fix)
        if not _exists(path, folder_too=kind == "video"):
            fix = "check --images, or remove the row"
            raise InputError(f"no such {kind} {path}", where=conversation.where, fix=fix)
    return conversation


def _exists(path: Path, *, folder_too: bool) -> bool:
    try:
        return path.is_file() or (folder_too and path.is_dir())
    except ValueError:  # not a valid file name
        return False


def parse_conversation(record: Record, *, media_first: bool = False) -> Conversation:
    """A row as a conversation; with `media_first` a turn's only image or video moves to its front, as in LLaVA's code.

    Raises InputError for other rows, unknown roles, and marks that do not match media.
    """
    row, where = record.fields(), record.where
    turns = first_value(row, "conversations", "messages") or _instruction_turns(row)
    if not isinstance(turns, list):
        raise InputError("no list of `conversations` or `messages`, and no `instruction`", where=where)
    roles = [_role(turn, where) for turn in turns]
    begin = roles.index("user") if "user" in roles else len(roles)
    media = RowMedia(row, where, lone_first=media_first)
    parsed = [
        Turn(role, media.turn(first_value(turn, "value", "content")))
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
    texts = [text for text in (row.get("instruction"), first_value(row, "input", "inputs")) if text]
    answer = first_value(row, "output", "outputs")
    if row.get("instruction") is None or answer is None:
        return None
    images = [{"type": "image"} for _ in row.get("images") or []]
    question = "\n".join(texts) if all(isinstance(text, str) for text in texts) else texts
    return [
        {"from": "human", "value": [*images, {"type": "text", "text": question}]},
        {"from": "gpt", "value": [{"type": "text", "text": answer}]},
    ]


def parse_pair(record: Record, *, media_first: bool = False) -> tuple[Conversation, Conversation]:
    """A row of preferences as its chosen and its rejected conversation; see `parse_conversation`. Raises InputError."""
    row, where = record.fields(), record.where
    prompt, *answers = _pair_turns(row, where)
    if media_first and isinstance(row.get("prompt"), str):
        prompt = [*prompt[:-1], _marked(prompt[-1], row, where)]
    if any(_role(answer, where) != "assistant" for answer in answers):
        raise InputError("`chosen` or `rejected` does not end with the assistant's text", where=where)
    chosen, rejected = (
        parse_conversation(
            Record(where, {**row, "conversations": [*prompt, answer], "messages": None}), media_first=media_first
        )
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


def _marked(turn: Any, row: dict[str, Any], where: str) -> Any:
    """A prompt given as text, with a mark for the row's only image or video if it has none, as in LLaVA-Hound."""
    kinds = [kind for kind in MEDIA_KINDS for _ in media_of(row, kind, where)]
    text = first_value(turn, "value", "content")
    if len(kinds) != 1 or not isinstance(text, str) or any(f"<{kind}>" in text for kind in MEDIA_KINDS):
        return turn
    return {"from": "human", "value": f"<{kinds[0]}>\n{text}"}


def _as_turns(value: Any, role: str) -> list[Any]:
    """A list of turns from text, a turn or a list; empty for other or empty values."""
    if isinstance(value, str):
        return [{"from": role, "value": value}] if value.strip() else []
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else []


def _last_text(turns: list[Any]) -> Any:
    return first_value(turns[-1], "value", "content") if isinstance(turns[-1], dict) else None


def _role(turn: Any, where: str) -> str:
    """user, assistant or system. Raises InputError for any other role."""
    named = first_value(turn, "from", "role") if isinstance(turn, dict) else turn
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
    check_text(text, where)
    present = [turn.content for turn in turns if turn.role == "system"]
    if present and present != [(text,)]:
        raise InputError("both a system turn and the key `system`", where=where, fix="keep one")
    return [] if present else [Turn("system", (text,))]
