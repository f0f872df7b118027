"""A model behind an OpenAI-compatible server: frames are decoded here and sent with each question."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from lvctx.cost import CostMeter
from lvctx.errors import InputError
from lvctx.inference.chat_client import ChatClient
from lvctx.inference.endpoint_config import VideoEndpointConfig
from lvctx.inference.endpoint_frames import Part, image_part, resolve_for_endpoint, video_parts
from lvctx.inference.engine import AnswerScore, Reply, Shown
from lvctx.inference.reasoning import split_reasoning
from lvctx.inference.sampling_params import SamplingParams
from lvctx.video.sampling import VideoSampling


class EndpointEngine:
    """See `Engine`."""

    batch, reads_ahead = 1, True

    def __init__(self, client: ChatClient, config: VideoEndpointConfig, *, jobs: int = 1) -> None:
        """`jobs` conversations may be held at once, all by the one `client`."""
        self.client, self.config, self.jobs = client, config, jobs
        self.meter = CostMeter(("decode", "encode", "request"))
        self._parts: list[Part] | None = None
        self._frames: int | None = None

    def fork(self) -> "EndpointEngine":
        """See `Engine`."""
        return EndpointEngine(self.client, self.config)

    def check(self) -> None:
        """See `Engine`: the server does not answer, or refuses the key."""
        self.client.models()

    def identity(self, sampling: VideoSampling, *, images: bool) -> dict[str, Any]:
        """See `Engine`; the URL decides nothing: the same model may be served elsewhere tomorrow."""
        config = self.config
        send = "images" if images or config.send == "auto" else config.send
        sent: dict[str, Any] = {"send": send}
        if send != "file-url":
            sent["frame_pixels"] = config.frame_pixels
        if send == "images":
            sent["jpeg_quality"] = config.jpeg_quality
        if send == "images" and not images:
            sent["frame_times"] = config.frame_times
        return {
            "model": self.client.model,
            "sampling": {} if images else resolve_for_endpoint(config, sampling).facts,
            "endpoint": sent,
            **({"extra_body": config.extra_body} if config.extra_body else {}),
        }

    def show(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> Shown:
        """See `Engine`."""
        self._parts = None
        return self.show_loaded(self.load(items, sampling))

    def load(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> Any:
        """See `Engine`."""
        parts: list[Part] = []
        shown: list[Shown] = []
        resolved = resolve_for_endpoint(self.config, sampling)
        for item in items:
            if isinstance(item, Image.Image):
                with self.meter.phase("encode"):
                    parts.append(image_part(item, self.config))
                continue
            with self.meter.phase("decode"):
                video = video_parts(item, resolved, self.config, self.meter)
            parts += video.parts
            shown.append(video.shown)
        images = len(items) - len(shown)
        frames = None if self.config.send == "file-url" and shown else images + sum(len(one.pts) for one in shown)
        facts = shown[0].facts if len(shown) == len(items) == 1 else {"send": "images"}
        return parts, frames, Shown(pts=tuple(t for one in shown for t in one.pts), facts=facts)

    def show_loaded(self, loaded: Any) -> Shown:
        """See `Engine`."""
        self._parts, self._frames, shown = loaded
        return shown

    def show_parts(self, parts: Sequence[Part]) -> None:
        """Take these parts of a message as what is asked about."""
        self._parts = list(parts)
        self._frames = sum(part["type"] == "image_url" for part in parts) or None

    def reply(
        self, turns: Sequence[str], params: SamplingParams, on_text: Callable[[str], None] | None = None
    ) -> Reply:
        """See `Engine`; `on_text` gets the whole reply."""
        assert self._parts is not None, "nothing was shown"
        first, *rest = turns
        # Servers of language models may not take parts.
        contents: list[Any] = [[*self._parts, {"type": "text", "text": first}] if self._parts else first, *rest]
        messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        # A server counts reasoning and reply together, and a model shows that it reasons only by doing so.
        reasons = self.client.reasons or params.max_reasoning_tokens is not None
        reply = self._ask(messages, params, params.max_new_tokens + (params.reasoning_tokens if reasons else 0))
        if reply.cut and reply.reasoning and not reasons:
            self.client.reasons = True
            reply = self._ask(messages, params, params.max_new_tokens + params.reasoning_tokens)
        if self._frames is not None:
            self.meter.add(frames_shown=self._frames)
        if on_text:
            on_text(reply.text)
        return reply

    def start_reply(
        self, turns: Sequence[str], params: SamplingParams, on_text: Callable[[str], None] | None = None
    ) -> Any:
        """See `Engine`; nothing is sent before `finish_replies`."""
        return partial(self.reply, turns, params, on_text)

    def finish_replies(self, started: Sequence[Any]) -> Iterator[Reply]:
        """See `Engine`."""
        return (reply() for reply in started)

    def _ask(self, messages: list[dict[str, Any]], params: SamplingParams, max_tokens: int) -> Reply:
        with self.meter.phase("request"):
            answer = self.client.chat(messages, request_fields(params, max_tokens))
        return self._parse(answer)

    def complete(self, prompt: str, params: SamplingParams) -> Reply:
        """Continue a text. Raises as `reply`."""
        with self.meter.phase("request"):
            answer = self.client.complete(prompt, request_fields(params, params.max_new_tokens))
        return self._parse(answer)

    def _parse(self, answer: dict[str, Any]) -> Reply:
        reply = parse_reply(answer, self.client.url)
        counts = {"tokens_in": reply.prompt_tokens, "tokens_out": reply.tokens}
        self.meter.add(**{key: count for key, count in counts.items() if count is not None})
        return reply

    def score_continuation(self, prompt: str, answer: str) -> AnswerScore:
        """Score an answer that would continue a text, where the server gives log-probabilities of prompts (vLLM).

        Raises InputError where it does not, and as `reply`.
        """
        fields = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        with self.meter.phase("request"):
            completion = self.client.complete(prompt + answer, fields)
        return parse_prompt_logprobs(completion, answer.strip(), self.client.url)

    def score(self, turns: Sequence[str], answer: str) -> AnswerScore:
        """Raises InputError: a chat request scores no given answer."""
        raise InputError("a server's chat cannot score a given answer", where=self.client.url)


def request_fields(params: SamplingParams, max_tokens: int) -> dict[str, Any]:
    """Sampling parameters as a request has them; what servers understand differently is sent only where it matters."""
    fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": params.temperature}
    if params.temperature:
        fields["seed"] = params.seed
        if params.top_p < 1:
            fields["top_p"] = params.top_p
        if params.top_k:
            fields["top_k"] = params.top_k
    if params.repetition_penalty != 1:
        fields["repetition_penalty"] = params.repetition_penalty
    return fields


def parse_reply(answer: dict[str, Any], where: str) -> Reply:
    """The reply in a server's answer. Raises InputError for an answer without one."""
    try:
        choice = answer["choices"][0]
        message = choice.get("message") or {"content": choice["text"]}
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content)
        split = split_reasoning(str(content or ""))
        # vLLM and SGLang have one name or the other, by version.
        reasoning = message.get("reasoning_content") or message.get("reasoning") or split.reasoning
        usage = answer.get("usage") or {}
        if usage.get("prompt_tokens") == 0 and not split.text and not reasoning:
            # llama.cpp answers so where the model file has no usable vocabulary.
            raise InputError("the server found no token in the prompt", where=where, fix="check its tokenizer")
        return Reply(
            text=split.text,
            reasoning=str(reasoning).strip(),
            prompt_tokens=usage.get("prompt_tokens"),
            tokens=usage.get("completion_tokens"),
            cut=choice.get("finish_reason") == "length",
        )
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise InputError(f"the server's answer has no reply ({first_of(answer)})", where=where) from e


def parse_prompt_logprobs(completion: dict[str, Any], answer: str, where: str) -> AnswerScore:
    """The score of the answer that ends a prompt, from vLLM's `prompt_logprobs`: a token's log-probability and rank.

    Tokens are taken from the end until they make up the answer. Raises InputError where there are none.
    """
    try:
        entries = completion["choices"][0]["prompt_logprobs"]
        text, log_prob, is_greedy = "", 0.0, True
        for entry in reversed(entries):
            (token,) = entry.values()
            text = token["decoded_token"] + text
            log_prob, is_greedy = log_prob + float(token["logprob"]), is_greedy and token["rank"] == 1
            if answer in text:
                return AnswerScore(log_prob=log_prob, is_greedy=is_greedy)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        pass
    raise InputError("the server gives no log-probabilities of the prompt", where=where, fix="--scoring generate")


def first_of(answer: dict[str, Any]) -> str:
    """The start of an answer that cannot be used, in one line."""
    return " ".join(str(answer).split())[:120]
