"""A loaded VLM that is shown something and asked about it: what prompts share, the frames above all, is read once.

Suffixes: L tokens of a prompt, F frames, P features a frame, D tower width, N tokens of a block, R rows of a visual
table, E model width.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lvctx.bench.prefix import Positions, count_up
from lvctx.bench.reader import Reader
from lvctx.dist.ring import ALONE, Ring
from lvctx.errors import InputError
from lvctx.model.load import DeviceMap, context_length, load_config, load_model, load_tokenizer, try_forward
from lvctx.model.vlm import VIDEO_TOKEN, chat_ids, embed_frames, newline_embedding
from lvctx.train.images import Encoding, embed_image
from lvctx.vision.images import Preprocess

BATCH = 64
"""Frames that go through the projector at once: before its pooling a frame is four times its tokens."""


class Asker:
    """A loaded VLM that replies to prompts about what it was last shown."""

    mark = VIDEO_TOKEN
    """The token that stands for what is shown in a chat's text."""
    longer = "extend the language model further"
    """What a user does whose prompts are too long."""

    def __init__(
        self,
        path: Path,
        *,
        device: str,
        chunk: int,
        reuse: bool = True,
        ring: Ring = ALONE,
        device_map: DeviceMap | None = None,
    ) -> None:
        """Load the model and tokenizer of a resolved directory; the ranks of a `ring` read together.

        A `device_map` says where the model's modules are, in place of `device`.
        """
        self.path = path
        self.vlm = load_model(path, device=device, device_map=device_map)
        try_forward(self.vlm, path)
        self.tokenizer = load_tokenizer(path)
        self.context = context_length(self.vlm.config)
        self.reader = Reader(self.vlm, None, chunk=chunk, reuse=reuse, ring=ring)
        self.block = np.empty(0, dtype=np.int64)
        """Ids of what is shown."""
        ends = self.vlm.generation_config.eos_token_id
        self.stop = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def show(self, features_FPD: torch.Tensor, grid_F2: torch.Tensor | None = None) -> None:
        """Take these tower features, pooled 2x2 or to these grids, as what is being talked about."""
        self.show_blocks([self.video_block(features_FPD, grid_F2)])

    def show_images(self, images: Sequence[Image.Image]) -> None:
        """Take pictures (RGB, upright), one after the other, as what is being talked about."""
        self.show_blocks([self.image_block(image, alone=len(images) == 1) for image in images])

    def show_blocks(self, blocks_NE: Sequence[torch.Tensor]) -> None:
        """Take blocks of embeddings, each a video's or a picture's, as what is being talked about."""
        table_RE = torch.cat(list(blocks_NE))
        self._take(table_RE, self.reader.vocabulary + np.arange(len(table_RE)), count_up)

    @torch.inference_mode()
    def video_block(self, features_FPD: torch.Tensor, grid_F2: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings (N, E) of tower features, pooled 2x2 or to these grids, and of the newline that closes them."""
        parts = range(0, len(features_FPD), BATCH)
        grids = [None if grid_F2 is None else grid_F2[i : i + BATCH] for i in parts]
        features = [features_FPD[i : i + BATCH] for i in parts]
        embedded = [embed_frames(self.vlm, batch, grid) for batch, grid in zip(features, grids, strict=True)]
        return torch.cat([*embedded, newline_embedding(self.vlm).to(embedded[0].device)])

    @torch.inference_mode()
    def image_block(self, image: Image.Image, *, alone: bool) -> torch.Tensor:
        """Embeddings (N, E) of a picture as in training: UniRes, AnyRes or one grid, `alone` among what is shown."""
        encoding, preprocess = self._eyes
        newline_E = newline_embedding(self.vlm)[0]
        return embed_image(self.vlm, image, newline_E, encoding, preprocess, alone=alone, tower_grad=False)

    @cached_property
    def _eyes(self) -> tuple[Encoding, Preprocess]:
        return Encoding.told(load_config(self.path)), Preprocess.from_directory(self.path)

    def _take(self, table_RE: torch.Tensor, block: np.ndarray, positions: Positions) -> None:
        """Talk about a block of ids, of which those beyond the vocabulary are rows of a table."""
        old = self.reader
        self.reader = Reader(self.vlm, table_RE, chunk=old.chunk, reuse=old.reuse, positions=positions, ring=old.ring)
        self.reader.tokens_run = old.tokens_run
        self.block = block

    def ids(self, *turns: str) -> np.ndarray:
        """The prompt of a conversation about what is shown: the user's turn, the reply, the next turn, ..."""
        before, after = chat_ids(self.tokenizer, *turns, mark=self.mark)
        return np.concatenate([np.array(before, dtype=np.int64), self.block, np.array(after, dtype=np.int64)])

    def last_position(self, ids_L: np.ndarray) -> int:
        """The largest position of a prompt."""
        return int(self.reader.positions(ids_L, 0).max())

    def reply(self, ids_L: np.ndarray, count: int, tell: Callable[[int], None] = lambda token: None) -> list[int]:
        """The greedy reply's ids. Raises InputError where prompt and reply exceed the model's context."""
        needed = self.last_position(ids_L) + 1
        if needed + count > self.context:
            what = "tokens" if needed == len(ids_L) else "positions"
            raise InputError(
                f"{needed} {what} and {count} to answer exceed the model's context of {self.context}",
                fix=f"show fewer frames, or {self.longer}",
            )
        return self.reader.write(ids_L, count, self.stop, tell)

    def text(self, ids: Sequence[int]) -> str:
        """Decoded, without special tokens and outer white space."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
