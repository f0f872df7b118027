"""A vision-language model in this process, with transformers: the common prefix of prompts is computed once.

Suffixes: L tokens of a prompt, N visual tokens.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import numpy as np
from PIL import Image
from torch import Tensor

from lvctx.artifacts.store import fingerprint
from lvctx.cost import PEAK
from lvctx.device import DeviceMap
from lvctx.errors import InputError
from lvctx.inference.engine import AnswerScore, Reply, Shown, engine_memory
from lvctx.inference.engine_config import EngineConfig
from lvctx.inference.prefix_scorer import PrefixScorer, greedy_token
from lvctx.inference.reasoning import MARK_TOKENS, ReplyBudget, opens_reasoning
from lvctx.inference.sampling_params import SamplingParams
from lvctx.inference.token_sampling import TokenSampler
from lvctx.models.loading import (
    context_length,
    effective_dtype,
    load_config,
    load_model,
    load_tokenizer,
    require_accelerate,
    try_forward,
)
from lvctx.models.vlm_assembly import chat_ids
from lvctx.parallel.ring_attention import ALONE, Ring
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.base import VLM, VisualInput, prompt_tail

log = logging.getLogger(__name__)
CallT = TypeVar("CallT", bound=Callable[..., Any])


def _within_memory(method: CallT) -> CallT:
    """A method of the engine; ranks that compute together wait for each other, so that they can skip nothing."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with engine_memory(fatal=self.ring.world > 1):
            return method(self, *args, **kwargs)

    return cast(CallT, run)


@dataclass(frozen=True, kw_only=True)
class StartedReply:
    """A reply whose prompt is computed."""

    ids_L: np.ndarray
    """The prompt."""
    last_position: int
    """Of the prompt."""
    budget: ReplyBudget
    """Takes the tokens that are generated."""
    text: Callable[[], str]
    """The reply so far."""
    sizes: dict[str, int]
    """Frames and visual tokens of the prompt, for its cost."""
    continuation: Any
    """See `TransformersEngine.start`."""


class TransformersEngine:
    """See `Engine`. The weights are loaded with the first visual input."""

    def __init__(
        self,
        vlm: VLM,
        *,
        device: str,
        dtype: Any = "auto",
        prefill_chunk: int | None = None,
        reuse: bool = True,
        ring: Ring = ALONE,
        device_map: DeviceMap | None = None,
        batch: int = 1,
    ) -> None:
        """The ranks of a `ring` compute together; a `device_map` places the model's modules, instead of using `device`.

        `reuse=False` computes every prompt anew.
        """
        self.vlm, self.device, self.dtype = vlm, device, dtype
        self.prefill_chunk, self.reuse, self.ring, self.device_map = prefill_chunk, reuse, ring, device_map
        self.meter, self.batch, self.reads_ahead = vlm.meter, batch, ring.world == 1
        self.visual: VisualInput | None = None
        self._sizes: dict[str, int] = {}

    @classmethod
    def from_config(cls, vlm: VLM, config: EngineConfig, *, ring: Ring = ALONE) -> Self:
        """The engine with a resolved device. Raises MissingError for a device map without accelerate."""
        if config.device_map is not None:
            require_accelerate()
        return cls(
            vlm,
            device=config.device,
            dtype=config.weights_dtype,
            prefill_chunk=config.prefill_chunk,
            reuse=config.reuse,
            ring=ring,
            device_map=config.device_map,
            batch=config.batch,
        )

    @cached_property
    def model(self) -> Any:
        """The loaded model. Raises InputError if it cannot be loaded, MissingError without accelerate."""
        with engine_memory(fatal=True):  # no video is smaller than the model
            model = load_model(self.vlm.path, dtype=self.dtype, device=self.device, device_map=self.device_map)
            try_forward(model, self.vlm.path)
        return model

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.vlm.path)

    @cached_property
    def context(self) -> int:
        """Positions that the model's configuration allows."""
        return context_length(self.model.config)

    @cached_property
    def scorer(self) -> PrefixScorer:
        """The model with its KV cache."""
        options: dict[str, Any] = {"reuse": self.reuse, "ring": self.ring, "meter": self.meter}
        return PrefixScorer(self.model, None, chunk=self.prefill_chunk, **options)

    @cached_property
    def stop_ids(self) -> set[int]:
        """Tokens that end a reply."""
        ends = self.model.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    jobs = 1

    def fork(self) -> Self:
        """See `Engine`."""
        raise AssertionError("one conversation at a time")

    def check(self) -> None:
        """See `Engine`; loading the model comes later and raises its own errors."""

    def identity(self, sampling: VideoSampling, *, images: bool) -> dict[str, Any]:
        """See `Engine`."""
        resolved = self.vlm.resolve(sampling)
        dtype = "auto" if self.dtype == "auto" else str(self.dtype).removeprefix("torch.")
        return {
            "model": fingerprint(self.vlm.path)[:16],
            "sampling": self.vlm.image_facts() if images else resolved.facts,
            "dtype": effective_dtype(load_config(self.vlm.path), dtype),
        }

    @_within_memory
    def load(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> Any:
        """See `Engine`."""
        with self.meter.phase("decode"):
            return items, self.vlm.load(items, sampling)

    @_within_memory
    def show_loaded(self, loaded: Any) -> Shown:
        """See `Engine`."""
        self.visual = None  # no partial input remains after an error
        items, visual = loaded
        self.set_visual_input(visual)
        return self._shown(items, visual.pts, visual.facts)

    def show(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> Shown:
        """See `Engine`."""
        self.visual = None
        return self.show_loaded(self.load(items, sampling))

    def _shown(self, items: Sequence[Path | Image.Image], pts: tuple[float, ...], facts: dict[str, Any]) -> Shown:
        """What was shown of these items, as the costs of all replies about them state it."""
        images = sum(isinstance(item, Image.Image) for item in items)
        self._sizes = {"frames_shown": len(pts) + images, "visual_tokens": facts["visual_tokens"]}
        return Shown(pts=pts, facts=facts)

    def set_visual_input(self, visual: VisualInput) -> None:
        """Set the visual input."""
        scorer = self.scorer  # loads the model, which no sample pays for
        with self.meter.phase("encode"):
            table_RE = visual.table(self.model)
        scorer.show(table_RE, visual.positions)
        self.visual = visual
        last = self.last_position(visual.ids_N)
        if last < self.context < visual.tokens:
            log.warning("%d visual tokens, although the last position is %d", visual.tokens, last)

    def prompt_ids(self, turns: Sequence[str]) -> np.ndarray:
        """The prompt (L,) of a conversation about the visual input, up to the reply."""
        assert self.visual is not None, "no visual input was set"
        if (tail := prompt_tail(self.visual)) is not None:
            return np.concatenate([self.visual.ids_N, np.array(tail(turns)[0], dtype=np.int64)])
        before, after = chat_ids(self.tokenizer, *turns, mark=self.visual.placeholder)
        return np.concatenate([np.array(before, dtype=np.int64), self.visual.ids_N, np.array(after, dtype=np.int64)])

    def last_position(self, ids_L: np.ndarray) -> int:
        """The largest position of a prompt."""
        return int(self.scorer.positions(ids_L, 0).max())

    def reply(
        self, turns: Sequence[str], params: SamplingParams, on_text: Callable[[str], None] | None = None
    ) -> Reply:
        """See `Engine`."""
        return next(self.finish_replies([self.start_reply(turns, params, on_text)]))

    @_within_memory
    def start_reply(
        self, turns: Sequence[str], params: SamplingParams, on_text: Callable[[str], None] | None = None
    ) -> StartedReply:
        """See `Engine`."""
        ids = self.prompt_ids(turns)
        ending = ids[-MARK_TOKENS:]
        opened = opens_reasoning(self.decode(ending[ending < len(self.tokenizer)], special=True))
        budget = ReplyBudget(lambda tokens: self.decode(tokens, special=True), params, opened=opened)

        def text() -> str:
            reasons = bool(budget.in_reasoning or budget.reply_start)
            return budget.split.text if reasons else self.decode(budget.tokens)

        def on_token(token: int) -> bool:
            is_last = budget.add(token)
            if on_text and not budget.in_reasoning:
                on_text(text())
            return is_last

        chooser = TokenSampler(params, ids[ids < self.vlm.vocabulary].tolist())
        reasoning = params.reasoning_tokens
        return StartedReply(
            ids_L=ids,
            last_position=self.last_position(ids),
            budget=budget,
            text=text,
            sizes=self._sizes,
            continuation=self.start(ids, params.max_new_tokens, on_token, choose=chooser, reasoning=reasoning),
        )

    def finish_replies(self, started: Sequence[StartedReply]) -> Iterator[Reply]:
        """See `Engine`."""
        before = self.meter.set_aside()
        try:
            with engine_memory(fatal=self.ring.world > 1):
                self.finish([one.continuation for one in started])
        finally:
            shared = self.meter.take().get("cost", {})
            self.meter.restore(before)
        counts = [max(1, len(one.budget.tokens)) for one in started]
        for one, count in zip(started, counts, strict=True):
            share = {key: value * count / sum(counts) for key, value in shared.items() if key.endswith("_seconds")}
            self.meter.restore(share | {key: value for key, value in shared.items() if key == PEAK})
            self.meter.add(**one.sizes, tokens_in=len(one.ids_L), tokens_out=len(one.budget.tokens))
            yield Reply(
                text=one.text(),
                reasoning=one.budget.split.reasoning,
                prompt_tokens=len(one.ids_L),
                last_position=one.last_position,
                tokens=len(one.budget.tokens),
                cut=one.budget.is_spent,
            )

    def start(
        self,
        ids_L: np.ndarray,
        count: int,
        on_token: Callable[[int], bool | None] = lambda token: None,
        *,
        choose: Callable[[Tensor], int] = greedy_token,
        reasoning: int = 0,
    ) -> Any:
        """Compute a prompt whose reply has at most `count` ids, and so many of `reasoning` as the context allows.

        See `PrefixScorer.prefill`. Raises InputError where prompt and reply exceed the model's context.
        """
        needed = self.last_position(ids_L) + 1
        self.check_context(needed, len(ids_L), count)
        count = min(count + reasoning, self.context - needed)
        return self.scorer.prefill(ids_L, count, self.stop_ids, on_token, choose)

    def finish(self, started: Sequence[Any]) -> list[list[int]]:
        """The ids of replies that are generated together."""
        return self.scorer.decode(started)

    def check_context(self, needed: int, prompt: int, count: int) -> None:
        """Raise InputError where so many positions of a prompt's tokens and a reply exceed the model's context."""
        if needed + count > self.context:
            what = "tokens" if needed == prompt else "positions"
            raise InputError(
                f"{needed} {what} and {count} to generate exceed the model's context of {self.context}",
                fix="use fewer frames, or extend the model: lvctx extend-lm, or mrope-extend for Qwen-VL",
            )

    @_within_memory
    def score(self, turns: Sequence[str], answer: str) -> AnswerScore:
        """See `Engine`; the answer is tokenized separately, unless the model's own processor writes the prompt."""
        assert self.visual is not None, "no visual input was set"
        if (tail := prompt_tail(self.visual)) is not None:
            prompt, answer_ids = tail(turns, answer)
            ids = np.concatenate([self.visual.ids_N, np.array(prompt + answer_ids, dtype=np.int64)])
        else:
            answer_ids = self.tokenizer.encode(answer, add_special_tokens=False)
            ids = np.concatenate([self.prompt_ids(turns), np.array(answer_ids, dtype=np.int64)])
        score = self.scorer.score(ids, len(answer_ids))
        return AnswerScore(log_prob=score.log_prob, is_greedy=score.forced)

    def decode(self, ids: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
        """Decoded, without outer white space, and without special tokens unless `special`."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=not special)).strip()
