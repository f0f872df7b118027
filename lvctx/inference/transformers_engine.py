"""A vision-language model in this process, by transformers: what prompts share, the frames above all, is run once.

Suffixes: L tokens of a prompt, N visual tokens.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from lvctx.device import DeviceMap
from lvctx.errors import InputError
from lvctx.inference.engine import AnswerScore, Reply, Shown
from lvctx.inference.engine_config import EngineConfig
from lvctx.inference.prefix_scorer import PrefixScorer
from lvctx.models.loading import context_length, load_model, load_tokenizer, require_accelerate, try_forward
from lvctx.models.vlm_assembly import chat_ids
from lvctx.parallel.ring_attention import ALONE, Ring
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.base import VLM, VisualInput, prompt_tail

log = logging.getLogger(__name__)
PREFILL_CHUNK = 2048
"""Tokens of one forward."""


class TransformersEngine:
    """See `Engine`. The weights are loaded when something is shown for the first time."""

    def __init__(
        self,
        vlm: VLM,
        *,
        device: str,
        dtype: Any = "auto",
        prefill_chunk: int = PREFILL_CHUNK,
        reuse: bool = True,
        ring: Ring = ALONE,
        device_map: DeviceMap | None = None,
    ) -> None:
        """The ranks of a `ring` compute together; a `device_map` places the model's modules, in place of `device`.

        `reuse=False` computes every prompt anew.
        """
        self.vlm, self.device, self.dtype = vlm, device, dtype
        self.prefill_chunk, self.reuse, self.ring, self.device_map = prefill_chunk, reuse, ring, device_map
        self.visual: VisualInput | None = None

    @classmethod
    def from_config(cls, vlm: VLM, config: EngineConfig, *, ring: Ring = ALONE) -> Self:
        """With a resolved device. Raises MissingError for a device map without accelerate."""
        if config.device_map is not None:
            require_accelerate()
        return cls(
            vlm,
            device=config.device,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            prefill_chunk=config.prefill_chunk,
            reuse=config.reuse,
            ring=ring,
            device_map=config.device_map,
        )

    @cached_property
    def model(self) -> Any:
        """The loaded model. Raises InputError where it cannot be loaded, MissingError without accelerate."""
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
        return PrefixScorer(self.model, None, chunk=self.prefill_chunk, reuse=self.reuse, ring=self.ring)

    @cached_property
    def stop_ids(self) -> set[int]:
        """Tokens that end a reply."""
        ends = self.model.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def show(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> Shown:
        """See `Engine`."""
        self.visual = None  # half of what should be shown is nothing to ask about
        visual = self.vlm.load(items, sampling)
        self.set_visual_input(visual)
        return Shown(pts=visual.pts, facts=visual.facts)

    def set_visual_input(self, visual: VisualInput) -> None:
        """Take this as what is asked about."""
        self.scorer.show(visual.table(self.model), visual.positions)
        self.visual = visual
        last = self.last_position(visual.ids_N)
        if last < self.context < visual.tokens:
            log.warning("%d visual tokens, though positions end at %d", visual.tokens, last)

    def prompt_ids(self, turns: Sequence[str]) -> np.ndarray:
        """The prompt (L,) of a conversation about what was shown, up to where the reply begins."""
        assert self.visual is not None, "nothing was shown"
        if (tail := prompt_tail(self.visual)) is not None:
            return np.concatenate([self.visual.ids_N, np.array(tail(turns)[0], dtype=np.int64)])
        before, after = chat_ids(self.tokenizer, *turns, mark=self.visual.placeholder)
        return np.concatenate([np.array(before, dtype=np.int64), self.visual.ids_N, np.array(after, dtype=np.int64)])

    def last_position(self, ids_L: np.ndarray) -> int:
        """The largest position of a prompt."""
        return int(self.scorer.positions(ids_L, 0).max())

    def reply(self, turns: Sequence[str], max_new_tokens: int, on_text: Callable[[str], None] | None = None) -> Reply:
        """See `Engine`."""
        ids = self.prompt_ids(turns)
        generated: list[int] = []

        def on_token(token: int) -> None:
            generated.append(token)
            if on_text:
                on_text(self.decode(generated))

        tokens = self.generate(ids, max_new_tokens, on_token)
        return Reply(
            text=self.decode(tokens),
            prompt_tokens=len(ids),
            last_position=self.last_position(ids),
            tokens=len(tokens),
        )

    def generate(
        self, ids_L: np.ndarray, count: int, on_token: Callable[[int], None] = lambda token: None
    ) -> list[int]:
        """Ids of the greedy reply. Raises InputError where prompt and reply exceed the model's context."""
        self.check_context(self.last_position(ids_L) + 1, len(ids_L), count)
        return self.scorer.generate(ids_L, count, self.stop_ids, on_token)

    def check_context(self, needed: int, prompt: int, count: int) -> None:
        """Raise InputError where so many positions of a prompt's tokens and a reply exceed the model's context."""
        if needed + count > self.context:
            what = "tokens" if needed == prompt else "positions"
            raise InputError(
                f"{needed} {what} and {count} to answer exceed the model's context of {self.context}",
                fix="show fewer frames, or extend the model: lvctx extend-lm, or mrope-extend for Qwen-VL",
            )

    def score(self, turns: Sequence[str], answer: str) -> AnswerScore:
        """See `Engine`; the answer is tokenized by itself, unless the model's own processor writes the prompt."""
        assert self.visual is not None, "nothing was shown"
        if (tail := prompt_tail(self.visual)) is not None:
            prompt, answer_ids = tail(turns, answer)
            ids = np.concatenate([self.visual.ids_N, np.array(prompt + answer_ids, dtype=np.int64)])
        else:
            answer_ids = self.tokenizer.encode(answer, add_special_tokens=False)
            ids = np.concatenate([self.prompt_ids(turns), np.array(answer_ids, dtype=np.int64)])
        score = self.scorer.score(ids, len(answer_ids))
        return AnswerScore(log_prob=score.log_prob, is_greedy=score.forced)

    def decode(self, ids: Sequence[int]) -> str:
        """Decoded, without special tokens and outer white space."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
