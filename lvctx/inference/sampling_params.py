"""Sampling parameters of a reply, named as vLLM and transformers name them.

Nothing heavy is imported here: the options of the commands are made from it.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from lvctx.config import Flag
from lvctx.errors import UsageError

SAMPLED = ("temperature", "use_generation_config")
REASONING_TOKENS = 4096
"""Tokens of reasoning that a thinking model may generate by default."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a reply is generated. The tokens that end it are always those of the model's generation_config.json."""

    panel: ClassVar[str] = "Sampling parameters"

    temperature: Annotated[float, Flag(min=0)] = 0.0
    """0 is greedy decoding, which can be repeated exactly."""
    top_p: Annotated[float, Flag(min=0, max=1, needs=SAMPLED)] = 1.0
    """Sample from the most probable tokens whose probabilities add up to this."""
    top_k: Annotated[int, Flag(min=0, needs=SAMPLED)] = 0
    """Sample from this many of the most probable tokens; 0 is all of them, or the server's default."""
    seed: Annotated[int, Flag(needs=SAMPLED)] = 0
    """Seed of sampling. Every reply starts from it, so a reply does not depend on those before it."""
    repetition_penalty: Annotated[float, Flag(min=0)] = 1.0
    """Divide the positive logits of tokens in prompt or reply by this, and multiply the negative ones; 1 is none."""
    use_generation_config: bool = False
    """Take temperature, top-p, top-k and repetition penalty from the model's generation_config.json, as `generate` of
    transformers does; options that are given override it."""
    max_new_tokens: Annotated[int, Flag(min=1)] = 64
    """Longest reply, in tokens; reasoning is not counted."""
    max_reasoning_tokens: Annotated[int | None, Flag(min=0)] = None
    """Longest reasoning of a thinking model, in tokens. Default: 4096 where reasoning is recognized."""

    def __post_init__(self) -> None:
        if self.temperature and not self.top_p:
            raise UsageError("--top-p 0 leaves no token", fix="give more than 0, or --temperature 0")
        if not self.repetition_penalty:
            raise UsageError("--repetition-penalty 0 is no penalty", fix="give 1 for none")

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
        if self.repetition_penalty != 1:
            facts["repetition_penalty"] = self.repetition_penalty
        if self.max_reasoning_tokens is not None:
            facts["max_reasoning_tokens"] = self.max_reasoning_tokens
        return facts


@dataclass(frozen=True, kw_only=True)
class BenchmarkSamplingParams(SamplingParams):
    """The same for questions with short answers."""

    max_new_tokens: Annotated[int, Flag(min=1)] = 16
    """Longest reply, in tokens; reasoning is not counted."""
