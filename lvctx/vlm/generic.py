"""Any vision-language model of transformers whose language model is causal and counts its tokens as positions.

The model's own processor expands the prompt and makes the pixels, so prompts are what stock code feeds the model, and
the model's own code makes the embeddings of the placeholders (`visual_features`). Frames go through the processor's
video processor where it has one, otherwise every frame is an image.

Shapes: F frames, N tokens, R rows of the table, E width of the language model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lvctx.artifacts.store import sha256_file
from lvctx.cost import CostMeter, Phase
from lvctx.errors import InputError, UsageError
from lvctx.models.loading import load_config
from lvctx.video.frame_count import bounded
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.base import PromptTail, VisualInput
from lvctx.vlm.generic_haystack import GenericHaystack
from lvctx.vlm.stock_processor import StockProcessor
from lvctx.vlm.stock_prompt import ChatText, Clip, Expansion, VisualItem
from lvctx.vlm.token_count import VisualRule
from lvctx.vlm.visual_features import visual_features

PartT = TypeVar("PartT")
IMAGE_BATCH = 8
"""Images that go through the processor and the vision tower at once."""


class GenericVLM:
    """A checkpoint that `AutoModelForImageTextToText` and `AutoProcessor` load."""

    shares_prefixes = True
    """Whether its language model is causal with one position a token. If not, `inference.forward_engine` runs it."""
    has_feature_cache = False

    phases: tuple[Phase, ...] = ("decode", "encode", "prefill", "generate")
    """What is measured of a sample."""

    def __init__(self, path: Path, *, device: str = "cpu", feature_cache: Path | None = None) -> None:
        """See `open_vlm`; no features are cached, as every class makes them in its own way."""
        self.path, self.config = path, load_config(path)
        self.meter = CostMeter(self.phases)
        self.vocabulary = int(self.config.get_text_config().vocab_size)

    @cached_property
    def processor(self) -> StockProcessor:
        """The model's own processor. Raises InputError, MissingError."""
        with self.meter.phase(None):
            return StockProcessor(self.path)

    @property
    def takes_video(self) -> bool:
        """Whether frames are one video to the processor; otherwise every frame is an image."""
        return self.processor.takes_video

    def resolve(self, sampling: VideoSampling) -> VideoSampling:
        """See `VLM`: one frame per second; how large a frame is, the processor decides."""
        if sampling.hybrid is not None or sampling.hybrid_mode != "pair":
            what = "this model's processor gives all frames one resolution"
            raise UsageError(what, where="--hybrid", fix="drop it, or take Qwen-VL or a model of lvctx align")
        if sampling.frame_mode is not None:
            raise UsageError("this model's processor makes its own squares", where="--frame-mode", fix="drop it")
        sampling.refuse_separator("this model's processor writes what is between frames")
        return replace(
            sampling,
            fps=1.0 if sampling.has_default_rate else sampling.fps,
            decoder="decord" if sampling.decoder == "decord" else "pyav",
        )

    def image_facts(self) -> dict[str, Any]:
        """See `VLM`."""
        return {"image_encoding": "processor"}

    def load(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> VisualInput:
        """See `VLM`; the processor's tensors are in memory until the table is made."""
        media, pts, facts = self.read(items, self.resolve(sampling))
        visual = self.visual_input(media)
        return replace(visual, pts=pts, facts={**facts, **visual.facts})

    def visual_input(self, media: Sequence[VisualItem]) -> VisualInput:
        """Images and sampled videos as ids, in order."""
        with self.meter.phase("encode"):
            expansions = list(self._expansions(media))
        chat = self.processor.chat([""], media)
        texts = arranged(media, [text for expansion in expansions for text in expansion.texts])
        ids_N = self.processor.block_ids(chat, texts)
        is_visual_N = self.processor.is_placeholder(ids_N)
        tokens = int(is_visual_N.sum())
        ids_N[is_visual_N] = self.vocabulary + np.arange(tokens)
        return VisualInput(
            ids_N=ids_N,
            table=lambda model: self._table(model, media, expansions),
            placeholder=self.processor.marker(media[0]),
            tokens=tokens,
            facts={"visual_tokens": tokens},
            tail=self.tail(chat, media, texts[-1]),
        )

    def read(
        self, items: Sequence[Path | Image.Image], sampling: VideoSampling
    ) -> tuple[list[VisualItem], tuple[float, ...], dict[str, Any]]:
        """Images, and the frames of videos as this processor takes them; times of all frames, and what rows have."""
        media: list[VisualItem] = []
        pts: list[float] = []
        facts: dict[str, Any] = {}
        for item in items:
            if isinstance(item, Image.Image):
                media.append(item)
                continue
            reader = read_video(item, bounded(item, sampling))
            frames = list(self.meter.decoding(reader))
            times = [frame.pts for frame in frames]
            pts += times
            if self.processor.takes_video:
                media.append(Clip(frames=[frame.image for frame in frames], times=times))
            else:
                media += [Image.fromarray(frame.image) for frame in frames]
            facts = {
                "video_sha256": sha256_file(item)[:16],
                "frames": len(frames),
                "shown_as": "video" if self.processor.takes_video else "images",
                "frame_size": [frames[0].image.shape[1], frames[0].image.shape[0]],
                "corrupt_frames": reader.facts.get("corrupt", 0),
                **({"partial": True} if reader.facts.get("partial") else {}),
            }
        return media, tuple(pts), facts if len(items) == 1 else {}

    def _expansions(self, media: Sequence[VisualItem]) -> Iterator[Expansion]:
        """What the processor makes of the images, in batches, and then of each video."""
        images = [one for one in media if isinstance(one, Image.Image)]
        # No batch has a single image unless there is one in all: some processors cut that into tiles, and no others.
        for batch in np.array_split(np.arange(len(images)), -(-len(images) // IMAGE_BATCH)) if images else ():
            yield self.processor.expand([images[i] for i in batch])
        for clip in media:
            if isinstance(clip, Clip):
                yield self.processor.expand([clip])

    def _table(self, model: Any, media: Sequence[VisualItem], expansions: Sequence[Expansion]) -> Tensor:
        """Rows (R, E) in the order of the prompt."""
        processor, rows = self.processor, list[Tensor]()
        for expansion in expansions:
            features = visual_features(model, expansion.inputs, processor.placeholder_ids)
            counts = [processor.count(text) for text in expansion.texts]
            if sum(counts) != len(features):
                what = f"its processor writes {sum(counts)} placeholders, its tokenizer reads {len(features)}"
                raise InputError(what, where=self.path)
            rows += features.split(counts)
        return torch.cat(arranged(media, rows))

    def tail(self, chat: ChatText, media: Sequence[VisualItem], last_text: str) -> PromptTail:
        """What follows the visual ids in a conversation, see `PromptTail`."""
        processor = self.processor

        def write(turns: Sequence[str], answer: str = "") -> tuple[list[int], list[int]]:
            conversation = processor.chat(turns, media)
            if conversation.head != chat.head:
                raise InputError("the chat template changes what it writes before the images", where=processor.path)
            return processor.tail_ids(conversation, last_text, answer)

        return write

    def haystack(self, files: Sequence[Path], sampling: VideoSampling, *, as_images: bool) -> GenericHaystack:
        """See `VLM`: video files, or folders of images."""
        return GenericHaystack(self, files, sampling, as_images=as_images)

    def count(self, frames: int, width: int, height: int, sampling: VideoSampling) -> dict[str, int]:
        """See `VLM`: of blank frames, which go through the processor."""
        blank = Image.new("RGB", (width, height))
        clip = Clip(frames=[blank] * frames, times=np.arange(float(frames)).tolist())
        media: list[VisualItem] = [clip] if self.processor.takes_video else [blank] * frames
        texts = arranged(media, [text for expansion in self._expansions(media) for text in expansion.texts])
        ids_N = self.processor.block_ids(self.processor.chat([""], media), texts)
        actual = int(self.processor.is_placeholder(ids_N).sum())
        return {"nominal": actual, "actual": actual, "last_position": len(ids_N) - 1}

    def token_rule(self, sampling: VideoSampling) -> VisualRule:
        """Raises InputError: chats are packed for models that are trained here."""
        raise InputError(
            "chats are not packed for this class of models", where=self.path, fix="give Qwen-VL, or lvctx align's"
        )


class ForwardVLM(GenericVLM):
    """A checkpoint of any other class: every prompt goes through the model's own `forward` and `generate`."""

    shares_prefixes = False
    phases = ("decode", "prefill", "generate")
    """Every prefill encodes anew."""

    def image_facts(self) -> dict[str, Any]:
        """See `VLM`."""
        return {**super().image_facts(), "reuse": "none"}

    def tail(self, chat: ChatText, media: Sequence[VisualItem], last_text: str) -> PromptTail:
        """As the processor writes it, whatever it does with a whole prompt; the answer is tokenized separately."""
        processor = self.processor

        def write(turns: Sequence[str], answer: str = "") -> tuple[list[int], list[int]]:
            ids = processor.conversation(turns, media)["input_ids"][0].numpy()
            tail = ids[int(np.flatnonzero(processor.is_placeholder(ids))[-1]) + 1 :]
            return tail.tolist(), list(processor.tokenizer(answer, add_special_tokens=False).input_ids)

        return write


def arranged(media: Sequence[VisualItem], parts: Sequence[PartT]) -> list[PartT]:
    """The media's parts in their order, from those of all images and then of all videos."""
    images = sum(isinstance(one, Image.Image) for one in media)
    of_images, of_clips = iter(parts[:images]), iter(parts[images:])
    return [next(of_images if isinstance(one, Image.Image) else of_clips) for one in media]
