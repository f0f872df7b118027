"""Conversations as token ids in a tokenizer's chat template, with the positions of the assistant's answers.

A template may render a turn differently once others follow it, so offsets of one rendering are not applied to another.
The conversation is rendered once, as a whole, with marks around every turn's content; the marks give the answers'
positions. A template that changes its earlier output is refused: every prompt for an answer has to be a prefix of the
whole.

Control tokens written inside a turn (`<|im_end|>`, `<image>` where there is no image) are encoded as text: only the
template and `Visual` parts produce control tokens. These are the tokenizer's special tokens, and its other added
tokens that the template writes around turns.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

from lvctx.errors import InputError, library_errors
from lvctx.models.template_time import bounded_rendering
from lvctx.models.text_marks import END, MARK, SIGN, insert_marks, mark, until_mark, wrap_in_marks
from lvctx.models.token_offsets import TokenOffsets

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Visual(NamedTuple):
    """Part of a turn: an image or a video, as its special token."""

    token: str


Content = str | Sequence[str | Visual]
"""Content of a turn: text, or text and images in order."""
Message = Mapping[str, Any]
"""`role` and `content` (`Content`)."""


class AnswerSpan(NamedTuple):
    """Tokens of an answer: `[first, end)` are its text, `[end, closed)` the end of its turn."""

    first: int
    end: int
    closed: int


@dataclass(frozen=True, kw_only=True)
class ChatTokens:
    """A conversation."""

    ids: list[int]
    """Token ids; an image or video is one token."""
    visual: list[int]
    """Positions of the tokens of images and videos, in order."""
    answers: list[AnswerSpan]
    """The assistant's answers, in order."""


def chat_encoder(tokenizer: Any, placeholders: frozenset[int] = frozenset()) -> "ChatEncoder":
    """The encoder of a tokenizer and its current chat template. Raises InputError if it has none.

    `placeholders` are ids of images and videos; a tokenizer may have them without marking them as special.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise InputError("no chat template", where=tokenizer.name_or_path, fix="use an instruct model") from None
    return _chat_encoder(tokenizer, template, len(tokenizer), placeholders)


@lru_cache(maxsize=8)
def _chat_encoder(tokenizer: Any, template: str, size: int, placeholders: frozenset[int]) -> "ChatEncoder":
    return ChatEncoder(tokenizer, template, placeholders)


class ChatEncoder:
    """A tokenizer and a chat template."""

    def __init__(self, tokenizer: Any, template: str, placeholders: frozenset[int] = frozenset()) -> None:
        """Raises InputError for a tokenizer without a fast form, or a template that leaves out the user's text."""
        self.tokenizer, self.template = tokenizer, template
        self.marks_answers = _GENERATION.search(template) is not None
        """Whether the template itself marks the tokens that count in the loss: `return_assistant_tokens_mask`."""
        self.wants_parts = False
        """Whether the template accepts only lists of parts (SmolVLM's), so that text has to be such a list."""
        self._find_form()
        added = {token.content: (i, token) for i, token in tokenizer.added_tokens_decoder.items()}
        try:
            around = self._render([("user", "x"), ("assistant", "x"), ("user", "x")])
        except InputError:
            around = ""
        self._ids = {
            text: i
            for text, (i, token) in added.items()
            if token.special or i in placeholders or (text.strip() and text in around)
        }
        """Control tokens: text -> id."""
        texts = "|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))) or "(?!)"
        self._control, self._scan = re.compile(texts), re.compile(f"{MARK}|({texts})")
        self._closing = re.compile(rf"\s*(?:{texts})")
        self._content = {i: text for text, i in self._ids.items()}
        self.control_ids = frozenset(self._content)
        """Ids of the control tokens, which only the template and `Visual` parts produce."""
        self._encoder, self._alias = self._plain_encoder({i: added[text][1] for text, i in self._ids.items()})

    def _plain_encoder(self, controls: Mapping[int, Any]) -> tuple[Any, dict[int, int]]:
        """The tokenizer with renamed control tokens, so that their own names are text; and the map from its ids."""
        from tokenizers import AddedToken, Tokenizer

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError("its tokenizer has no fast version", where=self.tokenizer.name_or_path)
        stored = json.loads(backend.to_str())
        # Without a post-processor offsets include white space. Only special tokens can be encoded as text.
        stored |= {"post_processor": None, "truncation": None, "padding": None}
        for token in stored["added_tokens"]:
            token["special"] = token["id"] in controls
        encoder = Tokenizer.from_str(json.dumps(stored))
        encoder.encode_special_tokens = True
        alias: dict[int, int] = {}
        for i, token in controls.items():
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip")}
            encoder.add_tokens([AddedToken(mark("k", i), normalized=False, special=False, **flags)])
            number = encoder.token_to_id(mark("k", i))
            assert number is not None
            alias[number] = i
        return encoder, alias

    def _find_form(self) -> None:
        refusal: InputError | None = None
        for self.wants_parts in (False, True):
            try:
                if mark("o", 0) in self._render([("user", mark("o", 0))]):
                    return
            except InputError as e:
                refusal = refusal or e
                if isinstance(e.__cause__, TimeoutError):
                    break
        raise refusal or InputError(
            "the chat template leaves out the user's text", where=self.tokenizer.name_or_path, fix="use another"
        )

    # Text

    def _render(self, turns: Sequence[tuple[str, str]], *, prompt: bool = False, where: str | None = None) -> str:
        return self._render_spans(turns, prompt=prompt, where=where)[0]

    def _render_spans(
        self, turns: Sequence[tuple[str, str]], *, prompt: bool = False, where: str | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and what it marks as generated, as in `apply_chat_template` before encoding."""
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": r, "content": [{"type": "text", "text": t}] if self.wants_parts else t} for r, t in turns]
        where = where or self.tokenizer.name_or_path
        with library_errors("the chat template refuses this conversation", where=where), bounded_rendering():
            (text,), spans = render_jinja_template(
                [messages],
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self.marks_answers,
                **self.tokenizer.special_tokens_map,
            )
        return text, spans[0] if spans else []

    def _marked_turn(self, message: Message, where: str | None) -> tuple[str, str]:
        """A turn's role and text, with a mark for every control token and image in it."""
        content = message["content"]
        text = ""
        parts = [content] if isinstance(content, str) else content
        for is_visual, run in groupby(parts, lambda part: isinstance(part, Visual)):
            if is_visual:
                text += "".join(mark("v", self._id(part.token, where)) for part in run)
                continue
            words = "".join(run)
            check_text(words, where)
            text += self._control.sub(lambda match: mark("t", self._ids[match[0]]), words)
        # White space around an answer may merge into one token with the template's, which a model cannot predict.
        return message["role"], text.strip() if message["role"] == "assistant" else text

    def _id(self, token: str, where: str | None) -> int:
        if token not in self._ids:
            raise InputError(f"{token} is not a special token of this tokenizer", where=where)
        return self._ids[token]

    def _marked(self, turns: Sequence[tuple[str, str]], where: str | None) -> str:
        """The conversation with marks around each turn's content, before each answer, and after the end of its turn."""
        wrapped = [(role, wrap_in_marks(text, i)) for i, (role, text) in enumerate(turns)]
        text = self._render(wrapped, where=where)
        answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
        if not answers:
            raise InputError("no answer to train on", where=where)
        starts = {i: self._render(wrapped[:i], prompt=True, where=where) for i in answers}
        if not all(text.startswith(start) for start in starts.values()):
            raise InputError("the chat template rewrites earlier turns", where=where, fix="use one that only appends")
        for i, (role, content) in enumerate(turns):
            opened, closed = text.count(mark("o", i)), text.count(mark("c", i))
            if content.strip() and (closed != 1 or opened > 1 if role == "assistant" else not (opened and closed)):
                raise InputError(f"the chat template leaves out or repeats a turn of the {role}", where=where)
        if re.sub(f"{SIGN}[oc][0-9]+{END}", "", text) != self._render(turns, where=where):
            raise InputError("the chat template depends on how a turn begins or ends", where=where)
        ends = [text.index(mark("c", i)) + len(mark("c", i)) for i in answers]
        counts = self._closings([until_mark(text, end) for end in ends])
        inserted = [(end + count, mark("e", i)) for end, count, i in zip(ends, counts, answers, strict=True)]
        inserted += [(len(starts[i]), mark("s", i)) for i in answers]
        return insert_marks(text, inserted)

    def _closings(self, rests: list[str]) -> list[int]:
        """How much of the text after each answer ends its turn: a control token, or the text common to all of them.

        Text that follows only the last answer ends the conversation, not a turn; text after only the earlier ones
        begins the next turn.
        """
        *_, last = matches = [self._closing.match(rest) for rest in rests]
        if last:
            return [len(one[0]) if one and one[0].strip() == last[0].strip() else 0 for one in matches]
        lines = [re.split(f"{self._control.pattern}|\n", rest, maxsplit=1)[0] for rest in rests]
        shared = len(_shared(lines).rstrip())
        # Text does not stop generation, so a control token after it at the very end is trained on as well.
        stop = self._closing.match(rests[-1], shared)
        return [*[shared] * (len(rests) - 1), stop.end() if stop else shared]

    # Tokens

    def encode(
        self, messages: Sequence[Message], *, where: str | None = None, generation_marks: bool = True
    ) -> ChatTokens:
        """A conversation that ends in an answer; with `generation_marks` the template's marks are used.

        Answers are stripped. Raises InputError if the template rewrites, leaves out or refuses turns.
        """
        if not messages or messages[0]["role"] == "assistant":
            raise InputError("the first turn is the assistant's", where=where)
        turns = [self._marked_turn(message, where) for message in messages]
        generated = generation_marks and self.marks_answers
        text = self._generated(turns, where) if generated else self._marked(turns, where)
        plain, at, _ = self._unmarked(text)
        for i in [number for kind, number in at if kind == "s" and not generated]:
            opened = at.get(("o", i))
            # Text that the template writes before an answer belongs to the prompt: an empty <think> block. If the
            # beginning is missing, the template has dropped it, as it does with reasoning in earlier turns.
            if opened is not None and plain[at["s", i] : opened].strip():
                at["s", i] = opened
            content, rendered = self._unmarked(turns[i][1])[0], plain[at["s", i] : at["c", i]]
            if not "".join(content.split()).endswith("".join(rendered.split())):
                raise InputError("the chat template rewrites an answer", where=where)
        return self._tokens(text, at, where)

    def _generated(self, turns: Sequence[tuple[str, str]], where: str | None) -> str:
        """The conversation with marks around the text that the template marks as generated."""
        text, spans = self._render_spans(turns, where=where)
        if not spans:
            raise InputError("the chat template marks nothing as generated", where=where)
        marks = [(begin, mark("s", i)) for i, (begin, _) in enumerate(spans)]
        return insert_marks(text, [*marks, *((end, mark("c", i) + mark("e", i)) for i, (_, end) in enumerate(spans))])

    def prompt(self, messages: Sequence[Message]) -> ChatTokens:
        """The tokens before an answer to the last of the messages, as in `encode`.

        This is the template's generation prompt, and other text that it writes before an answer without reasoning.
        """
        turns = [self._marked_turn(message, None) for message in messages]
        text = self._render(turns, prompt=True)
        try:
            prefix, separator, _ = self._render([*turns, ("assistant", mark("o", 0))]).partition(mark("o", 0))
        except InputError:
            prefix, separator = "", ""
        if separator and prefix.startswith(text) and prefix[len(text) :].strip():
            text = prefix
        return self._tokens(text, {}, None)

    def mask(self, text: str) -> str:
        """A turn's text with marks in place of the control tokens in it, which are text. Raises InputError."""
        check_text(text, None)
        return self._control.sub(lambda match: mark("t", self._ids[match[0]]), text)

    def encode_masked(self, text: str) -> list[int]:
        """Ids of a text in which `mask` has marked what is no control token, others being control tokens."""
        return self._tokens(text, {}, None).ids

    def _unmarked(self, text: str) -> tuple[str, dict[tuple[str, int], int], list[int]]:
        """The text to encode, the positions of the marks in it, and the ids of the images' control tokens."""
        pieces: list[str] = []
        at: dict[tuple[str, int], int] = {}
        visual: list[int] = []
        length = done = 0
        for match in self._scan.finditer(text):
            kind, number = match[1], int(match[2] or 0)
            piece = mark("k", self._ids[match[3]]) if match[3] else ""
            if kind == "t":
                piece = self._content[number]
            elif kind == "v":
                piece = mark("k", number)
                visual.append(number)
            pieces += [text[done : match.start()], piece]
            length += len(pieces[-2])
            if kind in ("o", "c", "s", "e"):
                at[kind, number] = length
            length += len(piece)
            done = match.end()
        return "".join([*pieces, text[done:]]), at, visual

    def _tokens(self, text: str, at: Mapping[tuple[str, int], int], where: str | None) -> ChatTokens:
        plain, _, expected = self._unmarked(text)
        if plain.count(SIGN) != len(re.findall(MARK, plain)):
            raise InputError("the chat template splits a turn's text", where=where)
        encoded = self._encoder.encode(plain, add_special_tokens=False)
        leaked = set(encoded.ids) & (self._content.keys() - {self.tokenizer.unk_token_id})
        if leaked:
            token = self._content[min(leaked)]
            raise InputError(f"{token} in the text, which this tokenizer cannot encode as text", where=where)
        ids = [self._alias.get(i, i) for i in encoded.ids]
        visual = [place for place, i in enumerate(ids) if i in set(expected)]
        if [ids[place] for place in visual] != expected:
            raise InputError("the chat template moves or repeats images", where=where)
        places = TokenOffsets(plain, encoded.offsets)
        numbers = [number for kind, number in at if kind == "s"]
        answers = []
        for i in numbers:
            first, closed = places.tokens(at["s", i], at["e", i])
            answers.append(AnswerSpan(first, places.tokens(at["s", i], at["c", i])[1], closed))
        return ChatTokens(ids=ids, visual=visual, answers=answers)


def check_text(text: str, where: str | None) -> None:
    """Raises InputError for text that is not valid Unicode: a lone surrogate, or the characters of our marks."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("half a character (a lone surrogate) in the text", where=where) from None
    if SIGN in text:
        raise InputError("U+FDD0 in the text, which Unicode reserves as a noncharacter", where=where)


def _shared(texts: Sequence[str]) -> str:
    """The longest common prefix."""
    lowest, highest = min(texts), max(texts)
    return lowest[: next((i for i, (a, b) in enumerate(zip(lowest, highest, strict=False)) if a != b), len(lowest))]
