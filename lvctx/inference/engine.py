"""The interface between evaluation and models: give a model images and video, ask about them, score an answer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from lvctx.cost import CostMeter
from lvctx.errors import InputError, OutOfMemory, memory_errors
from lvctx.inference.sampling_params import SamplingParams
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
    """A reply."""

    text: str
    """Decoded without special tokens, reasoning and outer white space."""
    reasoning: str = ""
    """What a thinking model generated before its reply."""
    prompt_tokens: int | None
    """Tokens of the prompt, visual ones included; None if a server does not report it."""
    last_position: int | None = None
    """The largest position of the prompt, for M-RoPE far less than its tokens; None where it is not known."""
    tokens: int | None
    """Tokens that were generated, reasoning included; None if a server does not report it."""
    cut: bool = False
    """Whether it ended because it reached the largest number of tokens."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a row has about it besides its text."""
        facts: dict[str, Any] = {"tokens": self.prompt_tokens}
        if self.last_position is not None:
            facts["last_position"] = self.last_position
        facts["reply_tokens"] = self.tokens
        if self.cut:
            facts["cut"] = True
        if self.reasoning:
            facts["reasoning"] = self.reasoning
        return facts


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """Score of a given answer under teacher forcing."""

    log_prob: float
    """Its summed log-probability, in nats."""
    is_greedy: bool
    """Whether every token of it is the model's most likely token."""


class EngineGone(InputError):
    """Nothing can be answered any more.

    The server is down, or refuses the key or the model. Or memory is too small for the model, or used up on one of
    several ranks that compute together: the others wait for it, so nothing can be left out.
    """


@contextmanager
def engine_memory(*, fatal: bool) -> Iterator[None]:
    """Raise OutOfMemory where memory is used up, or EngineGone if that is `fatal`."""
    try:
        with memory_errors(fix="use fewer frames, --cp, or a smaller --batch or --prefill-chunk"):
            yield
    except OutOfMemory as e:
        if fatal:
            raise EngineGone(e.what, where=e.where, fix=e.fix) from e
        raise


class Engine(Protocol):
    """A model that answers questions about images and video."""

    jobs: int
    """Conversations that may be held at once, each with an engine of `fork`; 1 where the engine is for one only."""
    meter: CostMeter
    """Adds up what is spent on the conversation; the caller takes it for each row, also for one of a failure."""
    batch: int
    """Replies that are generated together, see `finish_replies`; 1 where an engine generates one at a time."""
    reads_ahead: bool
    """Whether `load` may run in a second thread during other calls."""

    def fork(self) -> "Engine":
        """The same model for another conversation at the same time. What is shown to one is not shown to the other."""

    def check(self) -> None:
        """Raise EngineGone where no request can succeed."""

    def identity(self, sampling: VideoSampling, *, images: bool) -> dict[str, Any]:
        """What decides a reply besides the conversation, as JSON values: the model, and what it is shown of a video.

        With `images` they are shown in place of videos. Raises UsageError for sampling that the model cannot have.
        """

    def load(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> Any:
        """Read videos and RGB images for `show_loaded`. Raises InputError for files that cannot be read."""

    def show_loaded(self, loaded: Any) -> Shown:
        """Set what `load` returned as the visual input."""

    def show(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> Shown:
        """Both of these."""

    def reply(
        self, turns: Sequence[str], params: SamplingParams, on_text: Callable[[str], None] | None = None
    ) -> Reply:
        """Reply to a conversation about the visual input: the user's turn, the reply, the user's next turn, ...

        `on_text` gets the reply as it grows. Raises InputError where prompt and reply exceed the context, EngineGone
        where no further request can succeed.
        """

    def start_reply(
        self, turns: Sequence[str], params: SamplingParams, on_text: Callable[[str], None] | None = None
    ) -> Any:
        """Compute the prompt of a reply for `finish_replies`. Something else may be shown until then. See `reply`."""

    def finish_replies(self, started: Sequence[Any]) -> Iterator[Reply]:
        """Generate at most `batch` replies together, each as if alone; as one comes, the meter has its share.

        They share the seconds of their generation by their numbers of tokens. Raises RuntimeError where memory ends.
        """

    def score(self, turns: Sequence[str], answer: str) -> AnswerScore:
        """Score an answer that would follow these turns."""
