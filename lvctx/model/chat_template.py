"""Render a chat template, which is a program that the model's authors wrote and may raise anything."""

from collections.abc import Mapping, Sequence
from typing import Any

from lvctx.errors import InputError, library_errors


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """What `tokenizer.apply_chat_template` returns: the text, unless `options` say otherwise.

    Raises InputError, naming the tokenizer, where there is no template, it raises, or it renders something else.
    """
    where = getattr(tokenizer, "name_or_path", None) or None
    if not tokenizer.chat_template:
        raise InputError("no chat template", where=where, fix="use an instruct model")
    with library_errors("its chat template cannot render this conversation", where=where):
        return tokenizer.apply_chat_template(list(messages), **{"tokenize": False, **options})
