"""Conversations as training sequences: the model's own chat template, loss on the assistant's turns only.

In the sequence an image is the block of its grids' tokens closed by one "\\n", which is also the "\\n" that LLaVA
writes after `<image>`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lvctx.data.conversations import Conversation, MediaFile
from lvctx.data.row_media import Media, MediaKind
from lvctx.errors import InputError
from lvctx.models.chat_template import ChatTokens, Message, Visual, chat_encoder
from lvctx.models.loss import IGNORED
from lvctx.models.vlm_assembly import VIDEO_TOKEN

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template of Qwen's chat models, with their default system turn."""


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """Token ids of a conversation, with its visual blocks expanded."""

    ids: list[int]
    """Token ids; `video` ids are placeholders of visual tokens."""
    labels: list[int]
    """Target under each position's hidden state (already shifted): -100 where it is not part of an answer."""
    places: list[int] = field(default_factory=list)
    """Start of each visual block."""
    positions: list[int] | None = None
    """Position ids of the tokens, unless they count up from 0."""


def to_messages(conversation: Conversation, mark: Callable[[MediaKind], str]) -> tuple[Message, ...]:
    """A conversation as `{"role", "content"}`, each image or video one `Visual` part with the mark of its kind."""
    return tuple(
        {
            "role": turn.role,
            "content": tuple(Visual(mark(part.kind)) if isinstance(part, Media) else part for part in turn.content),
        }
        for turn in conversation.turns
    )


def encode_conversation(
    conversation: Conversation,
    tokenizer: Any,
    visual_tokens: Callable[[MediaFile], int],
    *,
    last_only: bool = False,
    markup: bool = False,
) -> TokenSequence:
    """Ids and shifted labels of a conversation in the tokenizer's chat template; for the flags see `encode_messages`.

    `visual_tokens` gives the tokens of an image's or a video's block, its closing "\\n" included.
    """
    video = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    blocks = [[video] * visual_tokens(file) for file in conversation.files]
    messages = to_messages(conversation, lambda kind: VIDEO_TOKEN)
    where = conversation.where
    return encode_messages(messages, tokenizer, blocks, where=where, last_only=last_only, markup=markup)


def encode_plain(
    conversation: Conversation, tokenizer: Any, visual_tokens: Callable[[MediaFile], int]
) -> TokenSequence:
    """Ids and shifted labels of an image and its caption, as in LLaVA's first stage: no chat template, no instruction.

    The caption and a "\\n" after it count in the loss; `visual_tokens` gives the image's tokens without closing "\\n".
    Raises InputError for a conversation that is not one question about one image, and its answer.
    """
    roles, files = [turn.role for turn in conversation.turns], conversation.files
    caption = "".join(part for part in conversation.turns[-1].content if isinstance(part, str))
    if roles != ["user", "assistant"] or [file.kind for file in files] != ["image"] or not caption.strip():
        fix = "give rows of one image and its caption, or use --template chat"
        raise InputError("not one image and its caption", where=conversation.where, fix=fix)
    text_ids = tokenizer(caption + "\n", add_special_tokens=False, split_special_tokens=True).input_ids
    begin = [i for i in tokenizer("").input_ids[:1] if i == tokenizer.bos_token_id]
    before = [*begin, *[tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)] * visual_tokens(files[0])]
    labels = [*[IGNORED] * len(before), *text_ids]
    return TokenSequence(ids=[*before, *text_ids], labels=[*labels[1:], IGNORED], places=[len(begin)])


def encode_messages(
    messages: Sequence[Message],
    tokenizer: Any,
    blocks: Sequence[Sequence[int]],
    *,
    where: str,
    last_only: bool = False,
    markup: bool = False,
) -> TokenSequence:
    """Ids and shifted labels of turns in the tokenizer's chat template, each `Visual` part replaced by its block.

    The assistant's text and the end-of-turn token after it count in the loss, as in LLaVA, or the text that the
    template marks as generated (transformers' `return_assistant_tokens_mask`). `last_only` counts only the last answer
    and ends the sequence after it. `markup` also counts the template's control tokens around every turn and the white
    space after them, as LongVA's `preprocess_qwen`. Raises InputError for a template that rewrites its earlier output
    (see `lvctx.models.chat_template`), and if parts and blocks differ in number.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    if last < 0:
        raise InputError("no answer to train on", where=where)
    chat = chat_encoder(tokenizer).encode(messages[: last + 1], where=where)
    if len(chat.visual) != len(blocks):
        raise InputError(f"{len(chat.visual)} marks in the text for {len(blocks)} images", where=where)
    if last_only and len(chat.answers) != sum(message["role"] == "assistant" for message in messages):
        raise InputError("the chat template does not mark one part of each answer as generated", where=where)
    spoken = [False] * len(chat.ids)
    for first, _, closed in chat.answers[-1:] if last_only else chat.answers:
        spoken[first:closed] = [True] * (closed - first)
    if markup:
        _count_markup(spoken, chat, tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    places: list[int] = []
    visual_blocks = dict(zip(chat.visual, blocks, strict=True))
    for at, (token, counts) in enumerate(zip(chat.ids, spoken, strict=True)):
        if at in visual_blocks:
            places.append(len(ids))
            ids += visual_blocks[at]
        else:
            ids.append(token)
        labels += [token if counts and at not in visual_blocks else IGNORED] * (len(ids) - len(labels))
    return TokenSequence(ids=ids, labels=[*labels[1:], IGNORED], places=places)


def _count_markup(counts: list[bool], chat: ChatTokens, tokenizer: Any) -> None:
    """Set `counts` at control tokens, other than those of images and videos, and at white space after one."""
    controls = chat_encoder(tokenizer).control_ids
    for i, token in enumerate(chat.ids):
        after_control = i > 0 and chat.ids[i - 1] in controls
        counts[i] |= token in controls or (after_control and not tokenizer.decode([token]).strip())
