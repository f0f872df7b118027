"""Sampling parameters of a reply, named as vLLM and transformers name them.

Nothing heavy is imported here: the options of the commands are made from it.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from lvctx.config import Flag
from lvctx.errors import UsageError

REASONING_TOKENS = 4096
"""Tokens of reasoning that a thinking model may generate by default."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a reply is generated. The model's generation_config.json decides nothing but the tokens that end a reply."""

    panel: ClassVar[str] = "Sampling parameters"

    temperature: Annotated[float, Flag(min=0)] = 0.0
    """0 is greedy decoding, which can be repeated exactly; the model's generation_config.json is not used."""
    top_p: Annotated[float, Flag(min=0, max=1, needs=("temperature",))] = 1.0
    """Sample from the most probable tokens whose probabilities add up to this."""
    top_k: Annotated[int, Flag(min=0, needs=("temperature",))] = 0
    """Sample from this many of the most probable tokens; 0 is all, or on a server what it does by default."""
    seed: Annotated[int, Flag(needs=("temperature",))] = 0
    """Seed of sampling. Every reply starts from it, so a reply does not depend on those before it."""
    max_new_tokens: Annotated[int, Flag(min=1)] = 64
    """Longest reply, in tokens; reasoning is not counted."""
    max_reasoning_tokens: Annotated[int | None, Flag(min=0)] = None
    """Longest reasoning of a thinking model, in tokens. Default: 4096 where reasoning is recognized."""

    def __post_init__(self) -> None:
        if self.temperature and not self.top_p:
            raise UsageError("--top-p 0 leaves no token", fix="give more than 0, or --temperature 0")

    @property
    def reasoning_tokens(self) -> int:
        """Tokens that recognized reasoning may take."""
        return REASONING_TOKENS if self.max_reasoning_tokens is None else self.max_reasoning_tokens

    @property
    def facts(self) -> dict[str, Any]:
        """What decides a reply, for rows: what has no meaning for greedy decoding is left out."""
        facts: dict[str, Any] = {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens}
        if self.temperature:
            facts |= {"top_p": self.top_p, "top_k": self.top_k, "seed": self.seed}
        if self.max_reasoning_tokens is not None:
            facts["max_reasoning_tokens"] = self.max_reasoning_tokens
        return facts


@dataclass(frozen=True, kw_only=True)
class BenchmarkSamplingParams(SamplingParams):
    """The same for questions with short answers."""

    max_new_tokens: Annotated[int, Flag(min=1)] = 16
    """Longest reply, in tokens; reasoning is not counted."""
