"""LLaVA's conversations as training sequences: the model's own chat template, loss on the assistant's turns only.

A row is `{"id", "image": PATH or [PATHS], "conversations": [{"from": "human"|"gpt"|"system", "value": TEXT}, ...]}`,
in a JSON list or one object a line; `<image>` in a human turn stands for the next image. In the sequence an image is
the block of its grids' tokens closed by one "\\n", and the "\\n" that LLaVA writes after `<image>` is that one.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lvctx.errors import InputError
from lvctx.model.chat_template import render_chat
from lvctx.model.loss import IGNORED
from lvctx.model.vlm import IMAGE_TOKEN, VIDEO_TOKEN
from lvctx.train.tables import is_table, read_table

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template of Qwen's chat models, with their default system turn."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One checked row."""

    where: str
    """File and row, for errors."""
    images: tuple[Path, ...]
    """In the order of their `<image>` marks."""
    messages: tuple[dict[str, str], ...]
    """`{"role", "content"}` as chat templates take them; each image is one `<video>` token in a content."""


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """Token ids of a conversation, with its visual blocks unfolded."""

    ids: list[int]
    """`video` ids stand for visual tokens."""
    labels: list[int]
    """Target under each position's hidden state (already shifted): -100 where it is not the assistant's word."""
    places: list[int] = field(default_factory=list)
    """Where each visual block begins."""
    positions: list[int] | None = None
    """Of the tokens, where they do not count up from 0."""


def read_conversations(path: Path, images: Path) -> list[Conversation]:
    """Every row of a LLaVA JSON or JSONL file, or of a dataset; image paths are relative to `images`.

    Raises InputError naming file and row (or line) for malformed JSON, a missing image file, a number of `<image>`
    marks other than the number of images, an unknown role, or an answer that is empty or missing.
    """

    def check(row: dict[str, Any], where: str) -> Conversation:
        messages = read_turns(row.get("conversations"), where)
        if not any(m["role"] == "assistant" for m in messages):
            raise InputError("no answer to learn from", where=where)
        return Conversation(where=where, images=find_images(row, messages, where, images), messages=messages)

    return read_checked(path, images, check)


T = TypeVar("T")


def read_checked(path: Path, images: Path, check: Callable[[dict[str, Any], str], T]) -> list[T]:
    """What `check(row, where)` makes of every row of a JSON list, a JSONL file or a dataset (see `tables`).

    All rows are checked before the first bad one is raised, so that its InputError says how many there are.
    """
    found, bad = [], []
    for row, where in read_table(path, images) if is_table(path) else _read(path):
        try:
            if not isinstance(row, dict):
                raise InputError("not a JSON object", where=where)
            found.append(check(row, where))
        except InputError as e:
            bad.append(e)
    if bad:
        more = f" ({len(bad):,} bad rows in all)" if len(bad) > 1 else ""
        raise InputError(bad[0].what + more, where=bad[0].where, fix=bad[0].fix or "mend or remove the row")
    if not found:
        raise InputError("no row", where=path)
    return found


def _read(path: Path) -> list[tuple[Any, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("no such file", where=path) from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read ({e})", where=path) from e
    if text.lstrip().startswith("["):
        try:
            return [(row, f"{path}[{i}]") for i, row in enumerate(json.loads(text))]
        except ValueError as e:
            raise InputError(f"malformed JSON ({e})", where=path, fix="mend the file") from e
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            rows.append((json.loads(line), f"{path}:{number}"))
        except ValueError as e:
            raise InputError(f"malformed JSON ({e})", where=f"{path}:{number}", fix="mend or remove the line") from e
    return rows


def read_turns(turns: Any, where: str) -> tuple[dict[str, str], ...]:
    """LLaVA's turns as messages, each `<image>` mark one `<video>` token. Raises InputError."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError("no list of `conversations`", where=where)
    messages = []
    for turn in turns:
        role = ROLES.get(turn.get("from", ""))
        if role is None or not isinstance(turn.get("value"), str):
            raise InputError(f"a turn from {turn.get('from')!r}", where=where, fix="use human, gpt or system")
        if VIDEO_TOKEN in turn["value"]:
            raise InputError(f"a {VIDEO_TOKEN} mark", where=where, fix="samples are text and images")
        if role == "assistant" and not turn["value"].strip():
            raise InputError("an empty answer", where=where)
        # The visual block closes with its own "\n", so the newline around a mark would be a second one.
        messages.append({"role": role, "content": re.sub(rf"\n?{IMAGE_TOKEN}\n?", VIDEO_TOKEN, turn["value"])})
    return tuple(messages)


def find_images(
    row: dict[str, Any], messages: Sequence[Mapping[str, str]], where: str, folder: Path
) -> tuple[Path, ...]:
    """The row's image files, in the order of the marks in `messages`. Raises InputError where they do not agree."""
    named = row.get("image") or row.get("images") or []
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError("`image` is no file name or list of them", where=where)
    marks = [m["content"].count(VIDEO_TOKEN) for m in messages]
    if sum(marks) != len(names):
        raise InputError(f"{sum(marks)} {IMAGE_TOKEN} marks for {len(names)} images", where=where)
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
    if any(marks[last + 1 :]):
        raise InputError("an image after the last answer", where=where, fix="remove what follows the answer")
    images = tuple(folder / name for name in names)
    for image in images:
        if not image.is_file():
            raise InputError(f"no such image {image}", where=where, fix="check --images, or remove the row")
    return images


def encode_conversation(
    conversation: Conversation, tokenizer: Any, visual_tokens: Callable[[Path], int], *, last_only: bool = False
) -> TokenSequence:
    """Ids and shifted labels of a conversation in the tokenizer's chat template; `last_only`: of its last answer.

    `visual_tokens` gives the tokens of an image's block, its closing "\n" included.
    """
    video = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    blocks = [[video] * visual_tokens(image) for image in conversation.images]
    marks = {VIDEO_TOKEN}
    return encode_messages(
        conversation.messages, tokenizer, blocks, marks=marks, where=conversation.where, last_only=last_only
    )


def encode_messages(
    messages: Iterable[Mapping[str, str]],
    tokenizer: Any,
    blocks: list[list[int]],
    *,
    marks: Set[str],
    where: str,
    last_only: bool = False,
) -> TokenSequence:
    """Ids and shifted labels of turns in the tokenizer's chat template, each mark replaced by its block of ids.

    `marks` are the special tokens that stand for an image or a video in a turn's content, in the order of `blocks`.
    Counted are the assistant's words and the end-of-turn token after them, as in LLaVA; `last_only` leaves out all
    answers but the last. Any template works that only appends turns. Raises InputError for another one, and where marks
    and blocks are not of one number.
    """
    # White space around an answer may melt into one token with the template's, which is no model's to say.
    messages = [{**m, "content": m["content"].strip()} if m["role"] == "assistant" else dict(m) for m in messages]
    spans, text = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise InputError("the first turn is the assistant's", where=where)
        before = render_chat(tokenizer, messages[:i], add_generation_prompt=True)
        text = render_chat(tokenizer, messages[: i + 1])
        if not text.startswith(before):
            raise InputError("the chat template rewrites earlier turns", where=where)
        end = len(text.rstrip("\n"))  # the template's line break after the end-of-turn token is not the model's to say
        spans.append((len(before), end))
    spans = spans[-1:] if last_only else spans
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    marked = {tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    found = sum(token in marked for token in encoded["input_ids"])
    if found != len(blocks):
        raise InputError(f"{found} of {', '.join(sorted(marks))} in the text for {len(blocks)} images", where=where)
    ids: list[int] = []
    spoken: list[bool] = []
    places: list[int] = []
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token in marked:
            places.append(len(ids))
            ids += blocks[len(places) - 1]
        else:
            ids.append(token)
        counts = token not in marked and any(a <= start and stop <= b for a, b in spans)
        spoken += [counts] * (len(ids) - len(spoken))
    labels = [i if s else IGNORED for i, s in zip(ids[1:], spoken[1:], strict=True)]
    return TokenSequence(ids=ids, labels=[*labels, IGNORED], places=places)
