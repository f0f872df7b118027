"""A model's own processor in transformers: its chat template, the text it expands, the tensors its forward takes.

A processor replaces every placeholder of an image or a video in a chat's text by as many tokens as the model has
features for it, between delimiters of its own. The text that it gives to its tokenizer is recorded, so a prompt can be
encoded exactly as the processor does without computing its pixels again.

Shapes: N tokens, up to and with the last placeholder of a prompt; F frames.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvctx.errors import InputError, MissingError, library_errors
from lvctx.models.chat_template import ChatEncoder, chat_encoder
from lvctx.models.loading import load_config, load_tokenizer
from lvctx.models.template_time import bounded_rendering
from lvctx.models.text_marks import END, SIGN
from lvctx.vlm.stock_prompt import ChatText, Clip, Expansion, StockPrompt, VisualItem, video_metadata

PLACEHOLDER_FIELDS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "visual_indicator_token_ids",
)
"""Fields of configurations and processors with the ids of tokens whose embeddings the model replaces."""
SEPARATOR = f"{SIGN}|{END}"
"""Between the placeholders of images whose expansions are wanted one by one."""

PROBE = 5
"""Frames that a processor is given to see what it writes about a video."""


class _RecordingTokenizer:
    """A tokenizer that keeps the text it was called with."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.text = tokenizer, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.text = text if isinstance(text, str) else text[0]
        return self.tokenizer(text, *args, **kwargs)

    def __len__(self) -> int:
        return len(self.tokenizer)


class _RememberingProcessor:
    """An image or video processor that answers each call as its first."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.output = processor, dict[str, Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from transformers import BatchFeature

        if not self.output:
            self.output = dict(self.processor(*args, **kwargs))
        return BatchFeature(dict(self.output))


class StockProcessor:
    """The processor of a checkpoint."""

    def __init__(self, path: Path) -> None:
        """Raises InputError where it cannot be loaded or has no chat template, MissingError for a missing package."""
        from transformers import AutoProcessor

        self.path, self.config = path, load_config(path)
        try:
            with library_errors("no usable processor", where=path):
                self.processor: Any = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        except MissingError as e:
            what = e.what.split(". ")[0].rstrip(")") + ")"
            raise MissingError(what, where=path, fix="pip install 'lvctx[processors]'") from e
        if getattr(self.processor, "tokenizer", None) is None or not hasattr(self.processor, "image_processor"):
            raise InputError(f"its {type(self.processor).__name__} takes no images", where=path)
        load_tokenizer(path)  # tried, so that a broken one is named
        self.tokenizer = self.processor.tokenizer
        template = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        if template is None:
            fix = "add its chat_template.jinja, or use an instruct model"
            raise InputError("the processor has no chat template", where=path, fix=fix)
        self.processor.chat_template = template
        self._remembered: tuple[Sequence[VisualItem], dict[str, _RememberingProcessor]] | None = None
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = template if isinstance(template, str) else template.get("default")

    # Text

    @cached_property
    def takes_video(self) -> bool:
        """Whether it has a video processor; otherwise frames are images."""
        return (
            getattr(self.processor, "video_processor", None) is not None
            and getattr(self.processor, "video_token", None) is not None
        )

    def marker(self, media: VisualItem) -> str:
        """The placeholder of an image or a video in a chat's text."""
        return str(self.processor.video_token if isinstance(media, Clip) else self.processor.image_token)

    @cached_property
    def placeholder_ids(self) -> frozenset[int]:
        """Ids of the tokens whose embeddings the model replaces by visual features."""
        for source in (self.config, self.processor):
            values = [getattr(source, name, None) for name in PLACEHOLDER_FIELDS]
            found = {i for value in values for i in ((value,) if isinstance(value, int) else value or ())}
            if found:
                return frozenset(found)
        raise InputError("config.json has no image_token_id", where=self.path)

    @cached_property
    def _placeholders(self) -> list[str]:
        return [str(self.tokenizer.convert_ids_to_tokens(i)) for i in sorted(self.placeholder_ids)]

    def count(self, text: str) -> int:
        """Placeholders in an expansion."""
        return sum(text.count(placeholder) for placeholder in self._placeholders)

    @cached_property
    def _encoder(self) -> ChatEncoder:
        names = {getattr(self.processor, name, None) for name in ("image_token", "video_token")} - {None}
        markers = self.tokenizer.convert_tokens_to_ids(sorted(map(str, names)))
        return chat_encoder(self.tokenizer, self.placeholder_ids | frozenset(markers))

    def chat(self, turns: Sequence[str], media: Sequence[VisualItem]) -> ChatText:
        """A conversation that ends where a reply begins: the user's turn about the media, the reply, the next turn, ...

        Raises InputError where the chat template refuses it, or leaves a placeholder out.
        """
        texts = [self._encoder.mask(turn) for turn in turns]
        markers = [self.marker(one) for one in media]
        parts = [{"type": "video" if isinstance(one, Clip) else "image"} for one in media]
        rendered = self._render(texts, parts)
        pieces = _split(rendered, markers)
        if pieces is None:  # a template for text alone
            rendered = self._render(["".join(markers) + texts[0], *texts[1:]], None)
            pieces = _split(rendered, markers)
        if pieces is None:
            raise InputError("the chat template leaves out the images", where=self.path)
        return ChatText(head=pieces[0], separators=pieces[1:-1], tail=pieces[-1])

    def _render(self, texts: Sequence[str], parts: Sequence[dict[str, str]] | None) -> str:
        messages: list[dict[str, Any]] = []
        for i, text in enumerate(texts):
            content: Any = text
            if parts is not None:
                content = [*(parts if not i else ()), {"type": "text", "text": text}]
            messages.append({"role": ("user", "assistant")[i % 2], "content": content})
        with library_errors("the chat template refuses this conversation", where=self.path), bounded_rendering():
            return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def block_ids(self, chat: ChatText, texts: Sequence[str]) -> np.ndarray:
        """Ids (N,) of a prompt from its beginning to its last placeholder, where these texts replace the media."""
        pieces = [piece for pair in zip(texts, [*chat.separators, ""], strict=True) for piece in pair]
        text = chat.head + "".join(pieces)[: -len(self.trailing(texts[-1])) or None]
        ids = self._encode(text, add_special_tokens=self._adds_start(text))
        return ids[: int(np.flatnonzero(self.is_placeholder(ids))[-1]) + 1]

    def _adds_start(self, text: str) -> bool:
        """Whether the tokenizer adds its own start: where the template writes none, as `apply_chat_template` does."""
        start = self.tokenizer.bos_token
        return start is None or not text.startswith(start)

    def tail_ids(self, chat: ChatText, last_text: str, answer: str = "") -> tuple[list[int], list[int]]:
        """Ids of a prompt after its last placeholder, and of an answer that follows it."""
        # A placeholder is a token for itself: what follows it is encoded as it is in the whole prompt.
        placeholder = next(p for p in self._placeholders if last_text.endswith(p + self.trailing(last_text)))
        text = placeholder + self.trailing(last_text) + chat.tail
        prompt = self._encode_marked(text)
        if not answer:
            return prompt, []
        whole = self._encode_marked(text + self._encoder.mask(answer))
        if whole[: len(prompt)] == prompt:
            return prompt, whole[len(prompt) :]
        return prompt, list(self.tokenizer(answer, add_special_tokens=False).input_ids)

    def trailing(self, text: str) -> str:
        """What an expansion has after its last placeholder."""
        ends = [text.rfind(p) + len(p) for p in self._placeholders if p in text]
        if not ends:
            raise InputError("its processor writes no placeholder of config.json", where=self.path)
        return text[max(ends) :]

    def _encode_marked(self, text: str) -> list[int]:
        if SIGN in text:
            return self._encoder.encode_masked(text)[1:]
        return list(self._encode(text, add_special_tokens=False)[1:].tolist())

    def _encode(self, text: str, *, add_special_tokens: bool) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids, dtype=np.int64)

    def is_placeholder(self, ids_N: np.ndarray) -> np.ndarray:
        """Which of the ids are replaced by visual features."""
        return np.isin(ids_N, list(self.placeholder_ids))

    # Pixels

    def expand(self, media: Sequence[VisualItem]) -> Expansion:
        """Run the processor on images or on videos, all of them of one kind.

        Frames are taken as they are: none is left out. Raises InputError where the processor fails.
        """
        text = SEPARATOR.join(self.marker(one) for one in media)
        inputs, expanded = self._run(text, media, add_special_tokens=False)
        return Expansion(texts=expanded.split(SEPARATOR), inputs=inputs)

    def prompt(self, media: Sequence[VisualItem]) -> StockPrompt:
        """Run the processor on a prompt about all of the media, of both kinds. Raises InputError."""
        chat = self.chat([""], media)
        inputs, expanded = self._run_chat(chat, SEPARATOR, media)
        ids = inputs["input_ids"][0].numpy()
        length = int(np.flatnonzero(self.is_placeholder(ids))[-1]) + 1
        return StockPrompt(inputs=inputs, length=length, chat=chat, last_text=expanded.split(SEPARATOR)[0])

    def conversation(self, turns: Sequence[str], media: Sequence[VisualItem]) -> dict[str, Any]:
        """What stock code feeds a model for a conversation; pixels of the same media are computed once."""
        chat = self.chat(turns, media)
        if SIGN in chat.tail:  # stock code would take what a user typed for control tokens
            prompt = self.prompt(media)
            return prompt.continued(self.tail_ids(chat, prompt.last_text)[0])
        if self._remembered is None or self._remembered[0] is not media:
            parts = ("image_processor", "video_processor")
            found = {name: getattr(self.processor, name, None) for name in parts}
            self._remembered = media, {name: _RememberingProcessor(one) for name, one in found.items() if one}
        remembering = self._remembered[1]
        vars(self.processor).update(remembering)
        try:
            return dict(self._run_chat(chat, "", media)[0])
        finally:
            vars(self.processor).update({name: one.processor for name, one in remembering.items()})

    def _run_chat(self, chat: ChatText, separator: str, media: Sequence[VisualItem]) -> tuple[Any, str]:
        # Some processors depend on what follows the media, such as a delimiter of the template.
        markers = [self.marker(one) for one in media]
        block = "".join(m + s for m, s in zip(markers, [*chat.separators, separator], strict=True))
        return self._run(chat.head + block + chat.tail, media, add_special_tokens=self._adds_start(chat.head))

    def _run(self, text: str, media: Sequence[VisualItem], *, add_special_tokens: bool) -> tuple[Any, str]:
        """The processor's output, and the text that it gave to the tokenizer."""
        recorder = _RecordingTokenizer(self.processor.tokenizer)
        arguments: dict[str, Any] = {}
        if images := [one for one in media if isinstance(one, Image.Image)]:
            arguments["images"] = images
        if clips := [one for one in media if isinstance(one, Clip)]:
            arguments["videos"] = [np.stack([np.asarray(frame) for frame in clip.frames]) for clip in clips]
            arguments |= {"video_metadata": [video_metadata(clip) for clip in clips], "do_sample_frames": False}
        self.processor.tokenizer = recorder
        try:
            with library_errors("its processor fails", where=self.path):
                inputs = self.processor(
                    text=[text], add_special_tokens=add_special_tokens, return_tensors="pt", **arguments
                )
        finally:
            self.processor.tokenizer = recorder.tokenizer
        return inputs, recorder.text

    def video_text(self, clip: Clip) -> str:
        """The placeholder text of a video of so many frames of this size, without the pixels of all of them."""
        write: Any = getattr(self.processor, "replace_video_token", None)
        seen: dict[str, Any] = {}

        def watch(video_inputs: Any, video_idx: int = 0, **keywords: Any) -> str:
            seen.update(video_inputs)
            return str(write(video_inputs, video_idx, **keywords))

        frames = len(clip.frames)
        if write is None or frames <= PROBE:
            return self.expand([clip]).texts[0]
        self.processor.replace_video_token = watch
        try:
            self.expand([Clip(frames=[clip.frames[0]] * PROBE, times=clip.times[:PROBE])])
        finally:
            del self.processor.replace_video_token
        longer = {name: _repeat_frames(value, frames) for name, value in seen.items()}
        if all(longer[name] is value for name, value in seen.items()):  # where it counts frames is not known
            return self.expand([clip]).texts[0]
        from transformers.video_utils import VideoMetadata

        longer["video_metadata"] = [VideoMetadata(**video_metadata(clip))]
        return str(write(longer, 0))


def _repeat_frames(value: Any, frames: int) -> Any:
    """Tensors of `PROBE` frames as if they were of so many, without room for them."""
    if isinstance(value, list | tuple):
        repeated = [_repeat_frames(one, frames) for one in value]
        return value if all(new is old for new, old in zip(repeated, value, strict=True)) else repeated
    if not hasattr(value, "expand"):
        return value
    for axis in range(min(value.ndim, 2)):
        if value.shape[axis] == PROBE:
            first = value.narrow(axis, 0, 1)
            return first.expand(*(frames if i == axis else -1 for i in range(value.ndim)))
    return value


def _split(text: str, markers: Sequence[str]) -> list[str] | None:
    """The text around these markers, in their order; None where they are not all of the markers in it."""
    pieces, rest = list[str](), text
    for marker in markers:
        piece, found, rest = rest.partition(marker)
        if not found:
            return None
        pieces.append(piece)
    return None if any(marker in rest for marker in markers) else [*pieces, rest]
