"""A vision-language model of any class by its own `forward` and `generate`: nothing of two prompts is shared.

For classes whose attention is not causal inside images, or whose language model takes more than embeddings and one
position a token. An answer is scored by making `generate` choose its tokens: the logits are those of each step.

Shapes: L tokens of a sequence, N up to its last placeholder, A answer tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lvctx.cost import CostMeter
from lvctx.errors import InputError, UsageError, library_errors
from lvctx.inference.engine import AnswerScore, Shown, engine_memory
from lvctx.inference.generation_config import drop_sampling
from lvctx.inference.prefix_scorer import Score, greedy_token
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.models.loading import device_of, load_model
from lvctx.parallel.ring_attention import ALONE, Ring
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.generic import ForwardVLM
from lvctx.vlm.generic_haystack import GenericTokens
from lvctx.vlm.haystack_files import FrameFile
from lvctx.vlm.stock_prompt import VisualItem

OnToken = Callable[[int], bool | None]
"""Takes a generated token; true ends the reply."""


class ForwardEngine(TransformersEngine):
    """See `Engine`."""

    vlm: ForwardVLM

    def __init__(self, vlm: ForwardVLM, *, ring: Ring = ALONE, **options: Any) -> None:
        """See `TransformersEngine`. Raises UsageError for a sequence that several processes share."""
        if ring.world > 1:
            what = "this class of models runs by its own forward, on one process"
            raise UsageError(what, where="--cp", fix="drop it; --device-map spreads the weights")
        super().__init__(vlm, ring=ring, **options)
        self.media: list[VisualItem] = []
        """What was shown."""
        self._inputs: dict[str, Any] = {}

    @cached_property
    def model(self) -> Any:
        """The loaded model. Raises InputError where it cannot be loaded, MissingError without accelerate."""
        with engine_memory(fatal=True):
            model = load_model(self.vlm.path, dtype=self.dtype, device=self.device, device_map=self.device_map)
        drop_sampling(model)
        return model

    def show(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> Shown:
        """See `Engine`."""
        self.media = []  # half of what should be shown is nothing to ask about
        return super().show(items, sampling)

    def load(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> Any:
        """See `Engine`."""
        with self.meter.phase("decode"):
            return items, self.vlm.read(items, self.vlm.resolve(sampling))

    def show_loaded(self, loaded: Any) -> Shown:
        """See `Engine`."""
        items, (self.media, pts, facts) = loaded
        with self.meter.phase("prefill"):  # pixels are computed here, and kept for the prompts
            ids = self.prompt_ids([""])
        tokens = int(self.vlm.processor.is_placeholder(ids).sum())
        return self._shown(items, pts, {**facts, "visual_tokens": tokens, "reuse": "none"})

    def prompt_ids(self, turns: Sequence[str]) -> np.ndarray:
        """See `TransformersEngine`; placeholders are the model's own."""
        assert self.media, "nothing was shown"
        self._inputs = self.vlm.processor.conversation(turns, self.media)
        ids: np.ndarray = self._inputs["input_ids"][0].numpy()
        return ids

    def last_position(self, ids_L: np.ndarray) -> int:
        """The number of the last token; positions of M-RoPE are smaller."""
        return len(ids_L) - 1

    def start(
        self,
        ids_L: np.ndarray,
        count: int,
        on_token: OnToken = lambda token: None,
        *,
        choose: Callable[[Tensor], int] = greedy_token,
        reasoning: int = 0,
    ) -> Any:
        """See `TransformersEngine`; of the prompt that was written last, which `finish` computes."""
        assert np.array_equal(self._inputs["input_ids"][0].numpy(), ids_L)
        if _has_mrope(self.model.config):
            count += reasoning
        else:
            self.check_context(len(ids_L), len(ids_L), count)
            count = min(count + reasoning, self.context - len(ids_L))
        arguments = self.model, self._inputs, count, self.stop_ids, on_token, choose
        return partial(stock_generate, *arguments, meter=self.meter)

    def finish(self, started: Sequence[Any]) -> list[list[int]]:
        """See `TransformersEngine`."""
        return [generate() for generate in started]

    def score(self, turns: Sequence[str], answer: str) -> AnswerScore:
        """See `Engine`; the answer is tokenized separately."""
        self.prompt_ids(turns)
        answer_ids = self.tokenizer.encode(answer, add_special_tokens=False)
        score = stock_score(self.model, self._inputs, answer_ids, self.meter)
        return AnswerScore(log_prob=score.log_prob, is_greedy=score.forced)


class ForwardScorer:
    """Scores sequences of a haystack as `PrefixScorer` does, each by a separate forward."""

    ring = ALONE

    def __init__(self, model: Any, tokens: GenericTokens, meter: CostMeter) -> None:
        """The frames are decoded once into a temporary file."""
        drop_sampling(model)
        self.model, self.tokens, self.meter = model, tokens, meter
        self.frames = FrameFile(tokens.images())
        self.tokens_run = 0
        """Tokens that went through the model so far."""

    def score(self, ids_L: np.ndarray, answer: int, *, generate: int = 0) -> Score:
        """See `PrefixScorer`."""
        order, rest = self.tokens.order(ids_L)
        with self.meter.phase("prefill"):
            prompt = self.tokens.processor.prompt(self.tokens.media([self.frames[i] for i in order]))
        text = ids_L[: len(ids_L) - len(rest)] < self.tokens.haystack.vlm.vocabulary
        self.meter.add(visual_tokens=int((~text).sum()))
        if len(text) != prompt.length or (prompt.ids[text] != ids_L[: len(text)][text]).any():
            raise InputError("what its processor writes depends on the frames", where=self.model.name_or_path)
        inputs = prompt.continued(rest[: len(rest) - answer].tolist())
        self.tokens_run += len(ids_L)
        score = stock_score(self.model, inputs, rest[len(rest) - answer :].tolist(), self.meter)
        if not generate:
            return score
        self.tokens_run += len(ids_L)
        return replace(score, generated=stock_generate(self.model, inputs, generate, (), meter=self.meter))


class _Forced(LogitsProcessor):
    """Makes generation choose these tokens."""

    def __init__(self, prompt: int, answer: Sequence[int]) -> None:
        self.prompt, self.answer = prompt, answer

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.answer[input_ids.shape[1] - self.prompt]] = 0
        return forced


class _Chosen(LogitsProcessor):
    """Makes generation take the token that a function chooses from the logits."""

    def __init__(self, choose: Callable[[Tensor], int]) -> None:
        self.choose = choose

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self.choose(scores[0])] = 0
        return chosen


class _TokenStream(BaseStreamer, StoppingCriteria):
    """Calls back with each generated token, until the callback returns true; `on_prefilled` before the first."""

    def __init__(self, on_token: OnToken, stop: Sequence[int], on_prefilled: Callable[[], None]) -> None:
        self.on_token, self.stop, self._is_prompt, self._is_last = on_token, set(stop), True, False
        self.on_prefilled = on_prefilled

    def put(self, value: Tensor) -> None:
        """The prompt first, then a token at a time."""
        if not self._is_prompt:
            self.on_prefilled()
            if int(value) not in self.stop:
                self._is_last = bool(self.on_token(int(value)))
        self._is_prompt = False

    def end(self) -> None:
        """Nothing is held back."""

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.full((len(input_ids),), self._is_last, device=input_ids.device)


@torch.inference_mode()
def stock_generate(
    model: Any,
    inputs: dict[str, Any],
    count: int,
    stop: Sequence[int] | set[int],
    on_token: OnToken = lambda token: None,
    choose: Callable[[Tensor], int] = greedy_token,
    *,
    meter: CostMeter,
) -> list[int]:
    """Ids of the continuation by `model.generate`, without what ends it. Raises InputError where it fails."""
    prefill = ExitStack()  # is closed by the first token
    stream = _TokenStream(on_token, list(stop), prefill.close)
    options = {
        "streamer": stream,
        "stopping_criteria": StoppingCriteriaList([stream]),
        "logits_processor": LogitsProcessorList([_Chosen(choose)]),
        "eos_token_id": list(stop) or None,
    }
    with meter.phase("generate"), prefill:
        prefill.enter_context(meter.phase("prefill"))
        out = _generate(model, inputs, count, **options)
    generated: list[int] = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return generated[: next((i for i, token in enumerate(generated) if token in stop), len(generated))]


@torch.inference_mode()
def stock_score(model: Any, inputs: dict[str, Any], answer: Sequence[int], meter: CostMeter) -> Score:
    """Score an answer that follows a prompt, token by token. Raises InputError where the model fails."""
    forced = LogitsProcessorList([_Forced(inputs["input_ids"].shape[1], answer)])
    with meter.phase("prefill"):
        out = _generate(model, inputs, len(answer), logits_processor=forced, output_logits=True, eos_token_id=None)
    return Score.of(torch.cat(out.logits).float(), answer)


def _generate(model: Any, inputs: dict[str, Any], count: int, **options: Any) -> Any:
    from transformers.feature_extraction_utils import BatchFeature

    embedding = model.get_input_embeddings()
    moved = BatchFeature(inputs).to(device_of(embedding), dtype=embedding.weight.dtype)
    with library_errors("the model fails on its processor's output", where=model.name_or_path):
        return model.generate(**moved, max_new_tokens=count, return_dict_in_generate=True, **options)


def _has_mrope(config: Any) -> bool:
    return "mrope_section" in (getattr(config.get_text_config(), "rope_parameters", None) or {})
