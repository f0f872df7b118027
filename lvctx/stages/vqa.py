"""Ask a vision-language model about encoded videos: frames in, greedy answers out (LongVA's prompt, section 4.1)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lvctx.artifacts.frames import Frames, read_frames
from lvctx.errors import InputError, UsageError
from lvctx.model.load import VLM_TYPE, context_length, load_config, load_model, load_tokenizer, resolve_model
from lvctx.model.vlm import chat_ids, embed_frames, newline_embedding
from lvctx.vision.tower import TowerFiles


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said, and how much it had read before it spoke."""

    text: str
    """Decoded answer without special tokens."""
    frames: int
    """Frames of the video it was shown."""
    tokens: int
    """Tokens of the whole prompt, visual ones included."""


class Watcher:
    """A loaded vision-language model that answers questions about frames artifacts."""

    def __init__(self, model: str, *, device: str) -> None:
        """Load the model. Raises InputError if it cannot be loaded, UsageError if it cannot see."""
        path = resolve_model(model)
        if load_config(path).model_type != VLM_TYPE:
            raise UsageError(f"{model} is a language model and cannot see", fix="give a model that align wrote")
        self.tower = TowerFiles.find(path).fingerprint
        self.vlm = load_model(path, device=device)
        self.tokenizer = load_tokenizer(path)

    def ask(self, path: Path, questions: Sequence[str], *, max_new_tokens: int) -> Iterator[Answer]:
        """Greedy answers to each question about one video, which is projected once.

        Raises InputError for a file that is no frames artifact, features of another tower, or a prompt longer than the
        model's context.
        """
        frames = read_frames(path)
        if frames.provenance["inputs"].get("tower") != self.tower:
            raise InputError("encoded by another tower", where=path, fix="encode the video with --model of this VLM")
        with torch.inference_mode():
            visual = torch.cat([self._embed(frames, path), newline_embedding(self.vlm)])
        for question in questions:
            yield self._answer(visual, question, frames, path, max_new_tokens)

    def _embed(self, frames: Frames, path: Path) -> torch.Tensor:
        try:
            return embed_frames(self.vlm, frames.features)
        except InputError as e:
            raise InputError(e.what, where=path, fix=e.fix) from None

    @torch.inference_mode()
    def _answer(self, visual: torch.Tensor, question: str, frames: Frames, path: Path, max_new_tokens: int) -> Answer:
        before, after = (torch.tensor(ids, device=self.vlm.device) for ids in chat_ids(self.tokenizer, question))
        embed = self.vlm.get_input_embeddings()
        prompt = torch.cat([embed(before), visual, embed(after)])[None]
        longest = context_length(self.vlm.config)
        if prompt.shape[1] + max_new_tokens > longest:
            raise InputError(
                f"{prompt.shape[1]} tokens and {max_new_tokens} to answer exceed the model's context of {longest}",
                where=path,
                fix="encode fewer frames, or extend the language model further",
            )
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}
        ids = self.vlm.generate(
            inputs_embeds=prompt, attention_mask=torch.ones(prompt.shape[:2], device=prompt.device), **options
        )
        text = self.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
        return Answer(text=text, frames=len(frames.pts), tokens=prompt.shape[1])
