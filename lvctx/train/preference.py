"""Preferences between two answers to one prompt, as DPO trains on them.

A row of the data is `{"prompt": TEXT, "chosen": TEXT, "rejected": TEXT, "image" or "images": PATH or [PATHS]}`, or
TRL's with lists of messages in their places; `conversations` in LLaVA's form, ending in a human turn, may stand in
place of `prompt`, and lists `chosen` and `rejected` may begin with the prompt. Files and turns are those of
`lvctx.train.samples`.
"""

from pathlib import Path
from typing import Any

from lvctx.errors import InputError
from lvctx.train.chat import Conversation, conversation
from lvctx.train.samples import check_object, check_row, first, read_checked, role_of


def read_pairs(path: Path, images: Path) -> list[tuple[Conversation, Conversation]]:
    """Every row of a file or dataset of preferences, once ending in the chosen answer and once in the rejected one.

    Image paths are relative to `images`. Raises InputError naming file and row for what `read_conversations` refuses,
    and for answers that are no text, empty or the same.
    """

    def check(row: Any, where: str) -> tuple[Conversation, Conversation]:
        row = check_object(row, where)
        turns, *answers = _turns(row, where)
        if any(role_of(answer, where) != "assistant" for answer in answers):
            raise InputError("`chosen` or `rejected` does not end in the assistant's words", where=where)
        pair = [check_row({**row, "conversations": [*turns, answer], "messages": None}, where) for answer in answers]
        if len(pair[0].turns) < 2 or pair[0].turns[-2][0] != "user":
            raise InputError("the prompt does not end in a human turn", where=where)
        chosen, rejected = ([p.strip() if isinstance(p, str) else p for p in one.turns[-1][1]] for one in pair)
        if chosen == rejected:
            raise InputError("`chosen` and `rejected` are the same", where=where)
        return conversation(pair[0], images), conversation(pair[1], images)

    return read_checked(path, images, check)


def _turns(row: dict[str, Any], where: str) -> tuple[list[Any], Any, Any]:
    """The turns of a pair's prompt, and the turn of either answer, as the row has them."""
    prompts = [row[key] for key in ("prompt", "conversations") if row.get(key) is not None]
    if len(prompts) > 1:
        raise InputError("either `prompt` or `conversations` is wanted", where=where)
    answers = [_as_turns(row.get(key), "gpt") for key in ("chosen", "rejected")]
    if not all(answers):
        raise InputError("`chosen` and `rejected` have to be text that is not empty, or messages", where=where)
    inside = [answer[:-1] for answer in answers]
    if not prompts and not all(inside):
        raise InputError("either `prompt` or `conversations` is wanted", where=where)
    if inside[0] != inside[1]:
        raise InputError("`chosen` and `rejected` begin with different prompts", where=where)
    turns = _as_turns(row.get("prompt"), "human") or row.get("conversations") or inside[0]
    if not isinstance(turns, list) or not turns:
        raise InputError("no list of `conversations`, or text or messages in `prompt`", where=where)
    if inside[0] and not (turns == inside[0] or _last_text(turns) == _last_text(inside[0])):
        raise InputError("`chosen` begins with another prompt than the row's own", where=where)
    # Messages inside the answers may say more than a prompt of one text: what came before it.
    return inside[0] or turns, answers[0][-1], answers[1][-1]


def _as_turns(value: Any, role: str) -> list[Any]:
    """Text as a turn, a turn as a list of one; nothing for what is neither, or empty."""
    if isinstance(value, str):
        return [{"from": role, "value": value}] if value.strip() else []
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else []


def _last_text(turns: list[Any]) -> Any:
    return first(turns[-1], "value", "content") if isinstance(turns[-1], dict) else None
