"""Micro-batches of an alignment: samples concatenated into one row, with their images embedded, for one forward.

A sample is one sequence, or several about the same images (a preferred and another answer). Sequences of a row do not
attend to each other, and nothing is padded, so the cost of a row is the sum of its sequences' costs.

Shapes: T tokens of all sequences of a row, N visual tokens, E language-model width, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lvctx.data.chat_encoding import TokenSequence, encode_conversation, encode_plain
from lvctx.data.conversations import Conversation, MediaFile
from lvctx.errors import InputError
from lvctx.models.image_processing import Preprocess, open_image
from lvctx.models.loss import IGNORED, token_loss
from lvctx.models.vlm_assembly import embed_frames, frame_features
from lvctx.parallel import hf_attention
from lvctx.parallel.fsdp import keep_in_graph
from lvctx.parallel.ring_attention import ALONE, Ring
from lvctx.rope.pose import skipped
from lvctx.training.align_config import Template
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.image_tiling import ImageEncoding, embed_image
from lvctx.vlm.training_frames import packed_video, video_frame_count, video_frames

log = logging.getLogger(__name__)
FRAMES_TOGETHER = 64
"""Frames of a video that go through tower and projector at once: before pooling they have four times their tokens."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sequences that go through the model together."""

    number: int
    """Its row number in the data, from 0."""
    where: str
    """File and row, for errors."""
    files: tuple[MediaFile, ...]
    """Images and videos in the order of their blocks, which all sequences have."""
    sequences: tuple[TokenSequence, ...]
    """One sequence, or those of the preferred and the other answer."""

    @property
    def images(self) -> tuple[Path, ...]:
        """Files of its images."""
        return tuple(file.path for file in self.files if file.kind == "image")

    @property
    def tokens(self) -> int:
        """Number of tokens of all its sequences."""
        return sum(len(s.ids) for s in self.sequences)

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence: the number of positions that the language model needs."""
        return max(len(s.ids) for s in self.sequences)


def encode_sample(
    number: int,
    row: Sequence[Conversation],
    tokenizer: Any,
    encoding: ImageEncoding,
    *,
    max_length: int,
    template: Template = "chat",
    markup: bool = False,
    sampling: VideoSampling | None = None,
) -> Sample:
    """A row of the data, one conversation or two that differ in their last answer, which is then the only one counted.

    `markup` is that of `encode_messages`. A sequence longer than `max_length` is truncated, with a warning. In the
    plain template the caption follows the image itself: the "\\n" that closes an image's block is left out (AnyRes has
    one in every row of features instead).
    """
    images, sequences = row[0].images, []

    def tokens(file: MediaFile) -> int:
        if file.kind == "image":
            return encoding.tokens(file.path, alone=len(images) == 1)
        assert sampling is not None
        return encoding.video_tokens(video_frame_count(file.path, sampling))

    for conversation in row:
        if template == "plain":
            sequence = encode_plain(conversation, tokenizer, lambda file: tokens(file) - (encoding.grid != "anyres"))
        else:
            last_only = len(row) > 1
            sequence = encode_conversation(conversation, tokenizer, tokens, last_only=last_only, markup=markup)
        if len(sequence.ids) > max_length:
            log.warning("%s: %d tokens, truncated to %d", conversation.where, len(sequence.ids), max_length)
            labels = [*sequence.labels[: max_length - 1], IGNORED]
            sequence = replace(sequence, ids=sequence.ids[:max_length], labels=labels)
        sequences.append(sequence)
    return Sample(number=number, where=row[0].where, files=row[0].files, sequences=tuple(sequences))


def skip_positions(sample: Sample, context: int, rng: np.random.Generator) -> Sample:
    """The sample with every sequence split in two and moved apart over `context` positions (PoSE), if it is shorter."""
    sequences = [
        replace(s, positions=skipped(len(s.ids), max(context, len(s.ids)), rng).tolist()) for s in sample.sequences
    ]
    return replace(sample, sequences=tuple(sequences))


def pack_samples(samples: Sequence[Sample], micro_tokens: int) -> list[list[Sample]]:
    """Micro-batches of at most `micro_tokens`, or of one sample: first-fit decreasing."""
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: s.tokens, reverse=True):
        fits = (g for g in groups if sum(s.tokens for s in g) + sample.tokens <= micro_tokens)
        group = next(fits, None)
        if group is None:
            groups.append(group := [])
        group.append(sample)
    return groups


ResultT = TypeVar("ResultT")
LossFn = Callable[[Tensor, Tensor, Tensor, Sequence[Sample]], ResultT]
"""Takes hidden states (T, E), the head's weight (V, E), labels (T,) and the samples."""


def answer_loss(hidden_TE: Tensor, head_VE: Tensor, labels_T: Tensor, micro: Sequence[Sample]) -> tuple[Tensor, int]:
    """Summed cross-entropy of the counted tokens, and their number."""
    total, count = token_loss(hidden_TE, head_VE, labels_T)
    return keep_in_graph(total, hidden_TE, head_VE), count


class Forward(nn.Module):
    """A VLM and a loss as one module: sharded parameters are gathered in its forward."""

    def __init__(
        self,
        vlm: Any,
        *,
        encoding: ImageEncoding,
        preprocess: Preprocess,
        newline: int,
        tower_grad: bool,
        device: str,
        pose: bool = False,
        sampling: VideoSampling | None = None,
        ring: Ring = ALONE,
        recompute: bool = False,
    ) -> None:
        """`newline` is the token of "\\n"; `tower_grad` is whether the tower is trained; `pose`, whether samples have
        positions from `skip_positions`; `sampling` is that of videos; `ring` has the ranks that share a micro-batch.
        InputError for a model whose attention the ranks do not support. With `recompute` tower
        and projector compute their activations again in the backward pass."""
        super().__init__()
        self.sampling, self.ring, self.recompute = sampling, ring, recompute
        self.vlm, self.encoding, self.preprocess = vlm, encoding, preprocess
        self.newline, self.tower_grad, self.device = newline, tower_grad, device
        lm = vlm.model.language_model
        self.ours = pose or ring.world > 1 or (torch.device(device).type == "cpu" and hf_attention.is_plain(lm.config))
        """Sequences are separated by our attention, whose cost is the sum of theirs, on CPU, among several ranks and
        with jumping positions, which transformers takes for the start of another sequence; otherwise by its mask."""
        if self.ours:
            hf_attention.use(lm, where=lm.config.name_or_path or lm.config.model_type, ring=ring)

    def forward(self, micro: Sequence[Sample], loss_fn: LossFn[ResultT]) -> ResultT:
        """`loss_fn` of a micro-batch, or of this rank's part of it: every rank embeds all images."""
        vlm, sequences = self.vlm, [s for sample in micro for s in sample.sequences]
        lengths = [len(s.ids) for s in sequences]
        ids_T = torch.tensor([i for s in sequences for i in s.ids], device=self.device)
        labels_T = torch.tensor([i for s in sequences for i in s.labels], device=self.device)
        positions = [s.positions or range(len(s.ids)) for s in sequences]
        positions_T = torch.tensor(list(chain.from_iterable(positions)), device=self.device)
        starts = hf_attention.document_starts(list(accumulate(lengths[:-1]))) if len(lengths) > 1 else None
        is_visual_T = ids_T == vlm.config.video_token_id
        embeds_TE = vlm.get_input_embeddings()(ids_T.masked_fill(is_visual_T, 0))
        embeds_TE = self._embed_images(embeds_TE, is_visual_T, micro)
        # transformers' own attention derives the starts of sequences from the positions.
        ours = {"shard": hf_attention.Shard(ring=self.ring, starts=starts)} if self.ours else {}
        hidden_BTE = vlm.model.language_model(
            inputs_embeds=self.ring.shard(embeds_TE[None], fill=0, dim=1),
            position_ids=self.ring.shard(positions_T[None], fill=0),
            use_cache=False,
            **ours,
        ).last_hidden_state
        labels_T = self.ring.shard(labels_T, fill=IGNORED)
        return loss_fn(hidden_BTE[0], vlm.lm_head.weight, labels_T, micro)

    def _embed_images(self, embeds_TE: Tensor, is_visual_T: Tensor, micro: Sequence[Sample]) -> Tensor:
        """The embeddings with those of the images inserted; a truncated sequence lacks some at its end, and one in the
        plain template the closing newline."""
        vlm, tile = self.vlm, self.encoding.tile
        parts, visual = iter(is_visual_T.split([len(s.ids) for sample in micro for s in sample.sequences])), []
        for sample in micro:
            blocks = self.blocks(sample)
            for _ in sample.sequences:
                visual_count = int(next(parts).sum())
                visual += [torch.cat(blocks)[:visual_count]] if blocks else []
        if visual:
            visual_NE = torch.cat(visual).to(embeds_TE.dtype)
            return embeds_TE.masked_scatter(is_visual_T[:, None], visual_NE)
        # Trained modules must take part in every backward, since ranks reduce their gradients in step.
        blank = torch.zeros(1, 3, tile, tile, device=self.device, dtype=vlm.model.vision_tower.dtype)
        return embeds_TE + 0 * embed_frames(vlm, frame_features(vlm, blank)).sum().to(embeds_TE.dtype)

    def blocks(self, sample: Sample) -> list[Tensor]:
        """The embeddings (N, E) of each of a sample's images and videos."""
        newline_E = self.vlm.get_input_embeddings().weight[self.newline]
        alone = len(sample.images) == 1
        image = partial(embed_image, self.vlm, encoding=self.encoding, alone=alone, tower_grad=self.tower_grad)
        blocks = []
        for file in sample.files:
            if file.kind == "image":
                block = self._run(image, open_image(file.path), newline_E, preprocess=self.preprocess)
            else:
                block = self._embed_video(file, newline_E)
            if file.packed is not None and len(block) != file.packed["tokens"] + 1:
                raise InputError("its size has changed since it was packed", where=file.path, fix="run pack-chat again")
            blocks.append(block)
        return blocks

    def _run(self, function: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
        """The function's result; with `recompute` its activations are not kept for the backward pass."""
        if self.recompute:
            return checkpoint(function, *inputs, **options, use_reentrant=False)
        return function(*inputs, **options)

    def _embed_video(self, file: MediaFile, newline_E: Tensor) -> Tensor:
        """The block of a video's frames, cropped squares as in `encode-video`."""
        grid_F2: Tensor | None = None
        if file.packed is None:
            assert self.sampling is not None
            frames = video_frames(file.path, self.sampling)
        else:
            frames, _ = packed_video(file.path, file.packed)
            grids = [block[3:] for block in file.packed["blocks"] for _ in range(block[1])]
            grid_F2 = torch.tensor(grids) if any(grid != grids[0] for grid in grids) else None
        visual = []
        for first in range(0, len(frames), FRAMES_TOGETHER):
            piece = slice(first, first + FRAMES_TOGETHER)
            pixels_F3SS = self.preprocess([self.preprocess.square(frame, "crop") for frame in frames[piece]])
            pixels_F3SS = pixels_F3SS.to(self.device, self.vlm.model.vision_tower.dtype)
            visual.append(self._run(self._embed_pixels, pixels_F3SS, None if grid_F2 is None else grid_F2[piece]))
        return torch.cat([*visual, newline_E[None]])

    def _embed_pixels(self, pixels_F3SS: Tensor, grid_F2: Tensor | None) -> Tensor:
        """The visual tokens of preprocessed frames."""
        with torch.set_grad_enabled(self.tower_grad and torch.is_grad_enabled()):
            features_FPD = frame_features(self.vlm, pixels_F3SS)
        return embed_frames(self.vlm, features_FPD, grid_F2)
