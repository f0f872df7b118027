"""What evaluation asks of a model, and all that it knows of it: show it something, ask about it, score an answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from lvctx.video.sampling import VideoSampling


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a model was shown."""

    pts: tuple[float, ...]
    """When each frame of the videos is shown, in seconds."""
    facts: dict[str, Any]
    """What rows have about it, see `VisualInput.facts`."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A greedy reply."""

    text: str
    """Decoded without special tokens and outer white space."""
    prompt_tokens: int
    """Tokens of the prompt, visual ones included."""
    last_position: int
    """The largest position of the prompt; for M-RoPE far less than its tokens."""
    tokens: int
    """Tokens of the reply."""


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """A given answer under teacher forcing."""

    log_prob: float
    """Its summed log-probability, in nats."""
    is_greedy: bool
    """Whether every token of it is the model's first choice."""


class Engine(Protocol):
    """A model that can be asked."""

    def show(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> Shown:
        """Take videos and RGB images as what is asked about. Raises InputError for what cannot be read."""

    def reply(self, turns: Sequence[str], max_new_tokens: int, on_text: Callable[[str], None] | None = None) -> Reply:
        """Reply to a conversation about what was shown: the user's turn, the reply, the user's next turn, ...

        `on_text` gets the reply so far with every token. Raises InputError where prompt and reply exceed the context.
        """

    def score(self, turns: Sequence[str], answer: str) -> AnswerScore:
        """Score an answer that would follow these turns."""
