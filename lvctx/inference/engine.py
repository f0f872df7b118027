"""The interface between evaluation and models: give a model images and video, ask about them, score an answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from lvctx.video.sampling import VideoSampling


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The visual input of a model."""

    pts: tuple[float, ...]
    """Timestamp of each video frame, in seconds."""
    facts: dict[str, Any]
    """Its fields in result rows, see `VisualInput.facts`."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A greedy reply."""

    text: str
    """Decoded without special tokens and outer white space."""
    prompt_tokens: int
    """Tokens of the prompt, including visual ones."""
    last_position: int
    """The largest position of the prompt; for M-RoPE far smaller than its number of tokens."""
    tokens: int
    """Tokens of the reply."""


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """Score of a given answer under teacher forcing."""

    log_prob: float
    """Its summed log-probability, in nats."""
    is_greedy: bool
    """Whether every token of it is the model's most likely token."""


class Engine(Protocol):
    """A model that answers questions about images and video."""

    def show(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> Shown:
        """Set videos and RGB images as the visual input. Raises InputError for files that cannot be read."""

    def reply(self, turns: Sequence[str], max_new_tokens: int, on_text: Callable[[str], None] | None = None) -> Reply:
        """Reply to a conversation about the visual input: the user's turn, the reply, the user's next turn, ...

        `on_text` gets the reply so far with every token. Raises InputError if prompt and reply exceed the context.
        """

    def score(self, turns: Sequence[str], answer: str) -> AnswerScore:
        """Score an answer that would follow these turns."""
