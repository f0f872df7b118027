"""A loaded VLM that is shown something and asked about it: what prompts share, the frames above all, is read once.

Suffixes: L tokens of a prompt, F frames, P features a frame, D tower width.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from lvctx.bench.reader import Reader
from lvctx.dist.ring import ALONE, Ring
from lvctx.errors import InputError
from lvctx.model.load import context_length, load_model, load_tokenizer
from lvctx.model.vlm import VIDEO_TOKEN, embed_frames, newline_embedding

BATCH = 64
"""Frames that go through the projector at once: before its pooling a frame is four times its tokens."""


class Asker:
    """A loaded VLM that replies to prompts about what it was last shown."""

    def __init__(self, path: Path, *, device: str, chunk: int, reuse: bool = True, ring: Ring = ALONE) -> None:
        """Load the model and tokenizer of a resolved directory; the ranks of a `ring` read together."""
        self.vlm = load_model(path, device=device)
        self.tokenizer = load_tokenizer(path)
        self.context = context_length(self.vlm.config)
        self.reader = Reader(self.vlm, None, chunk=chunk, reuse=reuse, ring=ring)
        ends = self.vlm.generation_config.eos_token_id
        self.stop = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    @torch.inference_mode()
    def show(self, features_FPD: torch.Tensor) -> None:
        """Take these tower features as what is being talked about."""
        embedded = [embed_frames(self.vlm, batch) for batch in features_FPD.split(BATCH)]
        table, old = torch.cat([*embedded, newline_embedding(self.vlm)]), self.reader
        self.reader = Reader(self.vlm, table, chunk=old.chunk, reuse=old.reuse, ring=old.ring)
        self.reader.tokens_run = old.tokens_run

    def ids(self, *turns: str) -> np.ndarray:
        """The prompt of a conversation about what is shown: the user's turn, the reply, the next turn, ..."""
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        messages[0]["content"] = VIDEO_TOKEN + turns[0]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        at = ids.index(self.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN))
        assert self.reader.visual_RE is not None
        visual = self.reader.vocabulary + np.arange(len(self.reader.visual_RE))
        return np.concatenate([np.array(ids[:at], dtype=np.int64), visual, np.array(ids[at + 1 :], dtype=np.int64)])

    def reply(self, ids_L: np.ndarray, count: int, tell: Callable[[int], None] = lambda token: None) -> list[int]:
        """The greedy reply's ids. Raises InputError where prompt and reply exceed the model's context."""
        if len(ids_L) + count > self.context:
            raise InputError(
                f"{len(ids_L)} tokens and {count} to answer exceed the model's context of {self.context}",
                fix="show fewer frames, or extend the language model further",
            )
        return self.reader.write(ids_L, count, self.stop, tell)

    def text(self, ids: Sequence[int]) -> str:
        """Decoded, without special tokens and outer white space."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
