"""Reasoning of thinking models: where it begins and ends in what a model generates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lvctx.inference.sampling_params import SamplingParams

REASONING_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<analysis>", "</analysis>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
)
"""What opens and what closes reasoning: Qwen3, DeepSeek, GLM and InternVL; others; Magistral; Kimi-VL."""

MARK_TOKENS = 12
"""As many tokens as a mark may be split into."""


@dataclass(frozen=True, kw_only=True)
class SplitReply:
    """What a model generated, in its two parts."""

    reasoning: str
    """Without its marks; empty where there is none."""
    text: str
    """The reply, without outer white space."""
    open: bool = False
    """Whether reasoning has begun and not ended."""


def split_reasoning(generated: str, *, opened: bool = False) -> SplitReply:
    """Split reasoning that is generated before the reply from the reply.

    `opened` is whether the prompt already opens reasoning, as some chat templates do. A closing mark without an opening
    one also ends reasoning: a server does not tell what its template opened.
    """
    text = generated.strip()
    for first, last in REASONING_MARKS:
        if text.startswith(first):
            reasoning, closed, reply = text.removeprefix(first).partition(last)
            return SplitReply(reasoning=reasoning.strip(), text=reply.strip(), open=not closed)
    for _, last in REASONING_MARKS:
        reasoning, closed, reply = text.partition(last)
        if closed:
            return SplitReply(reasoning=reasoning.strip(), text=reply.strip())
    return SplitReply(reasoning=text if opened else "", text="" if opened else text, open=opened)


def opens_reasoning(prompt: str) -> bool:
    """Whether a prompt ends with a mark that opens reasoning."""
    return prompt.rstrip().endswith(tuple(first for first, _ in REASONING_MARKS))


class ReplyBudget:
    """The tokens of one reply as they are generated: whether they are reasoning, and when there are enough of each."""

    def __init__(self, decode: Callable[[Sequence[int]], str], params: SamplingParams, *, opened: bool) -> None:
        """`decode` keeps special tokens, which marks may be; `opened` is whether the prompt opens reasoning."""
        self._decode, self._params, self._opened = decode, params, opened
        self.tokens: list[int] = []
        self.in_reasoning = opened
        self.reply_start = 0
        """Where the reply begins, after the mark that closes reasoning."""

    def add(self, token: int) -> bool:
        """Take the next token; whether it is the last."""
        self.tokens.append(token)
        if self.in_reasoning:
            tail = self._decode(self.tokens[-MARK_TOKENS:])
            if any(last in tail for _, last in REASONING_MARKS):
                self.in_reasoning, self.reply_start = False, len(self.tokens)
        elif not self.reply_start and len(self.tokens) <= MARK_TOKENS:
            text = self._decode(self.tokens).lstrip()
            self.in_reasoning = text.startswith(tuple(first for first, _ in REASONING_MARKS))
        return self.is_spent

    @property
    def split(self) -> SplitReply:
        """Reasoning and reply so far."""
        return split_reasoning(self._decode(self.tokens), opened=self._opened)

    @property
    def is_spent(self) -> bool:
        """Whether there are as many tokens as the parameters allow."""
        if self.in_reasoning:
            return len(self.tokens) >= self._params.reasoning_tokens
        return len(self.tokens) - self.reply_start >= self._params.max_new_tokens
