"""Samples of an alignment as micro-batches: grouped by length, padded, their images embedded, one forward.

A sample is one sequence, or several about the same images (an answer preferred and one not).

Shapes: B sequences, L tokens of the longest, N visual tokens, E language-model width, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lvctx.dist.shard import take_part
from lvctx.model.loss import IGNORED, token_loss
from lvctx.model.vlm import embed_frames, frame_features
from lvctx.train.chat import Conversation, TokenSequence, encode_conversation
from lvctx.train.images import Encoding, embed_image
from lvctx.vision.images import Preprocess, open_image

log = logging.getLogger(__name__)
ALIKE = 0.75
"""Least length of a sample in a micro-batch, as a share of the longest's."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What goes through the model together."""

    number: int
    """Its row in the data, from 0."""
    where: str
    """File and row, for errors."""
    images: tuple[Path, ...]
    """In the order of their blocks, which all sequences have."""
    sequences: tuple[TokenSequence, ...]
    """One, or the preferred answer's and the other's."""

    @property
    def tokens(self) -> int:
        """Of the longest sequence."""
        return max(len(s.ids) for s in self.sequences)


def encode_sample(
    number: int, row: Sequence[Conversation], tokenizer: Any, encoding: Encoding, *, max_length: int
) -> Sample:
    """A row of the data, one conversation or two that differ in their last answer, which then alone is counted.

    What is longer than `max_length` is cut there, with a warning.
    """
    images, sequences = row[0].images, []

    def tokens(image: Path) -> int:
        return encoding.tokens(image, alone=len(images) == 1)

    for conversation in row:
        sequence = encode_conversation(conversation, tokenizer, tokens, last_only=len(row) > 1)
        if len(sequence.ids) > max_length:
            log.warning("%s: %d tokens, cut at %d", conversation.where, len(sequence.ids), max_length)
            labels = [*sequence.labels[: max_length - 1], IGNORED]
            sequence = replace(sequence, ids=sequence.ids[:max_length], labels=labels)
        sequences.append(sequence)
    return Sample(number=number, where=row[0].where, images=images, sequences=tuple(sequences))


def group_by_length(samples: Sequence[Sample], micro_tokens: int) -> list[list[Sample]]:
    """Micro-batches of samples of like length, each at most `micro_tokens` after padding (or one sample alone).

    None is shorter than `ALIKE` of the longest beside it: more padding costs more time than another forward.
    """
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: s.tokens, reverse=True):
        together = sum(len(s.sequences) for s in groups[-1]) + len(sample.sequences) if groups else 0
        widest = groups[-1][0].tokens if groups else 0
        if groups and widest * together <= micro_tokens and sample.tokens >= ALIKE * widest:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups


def pad(sequences: Sequence[TokenSequence], pad_id: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and mask (B, L), padded on the right; padding is never counted."""
    width = max(len(s.ids) for s in sequences)
    ids = torch.tensor([s.ids + [pad_id] * (width - len(s.ids)) for s in sequences])
    labels = torch.tensor([s.labels + [IGNORED] * (width - len(s.labels)) for s in sequences])
    mask = torch.tensor([[True] * len(s.ids) + [False] * (width - len(s.ids)) for s in sequences])
    return ids.to(device), labels.to(device), mask.to(device)


T = TypeVar("T")
Judge = Callable[[Tensor, Tensor, Tensor, Sequence[Sample]], T]
"""What is made of hidden states (B, L, E), the head's weight (V, E), labels (B, L) and the samples."""


def answer_loss(hidden_BLE: Tensor, head_VE: Tensor, labels_BL: Tensor, micro: Sequence[Sample]) -> tuple[Tensor, int]:
    """Summed cross-entropy of the counted tokens, and their number."""
    total, count = token_loss(hidden_BLE.flatten(0, 1), head_VE, labels_BL.flatten())
    return take_part(total, hidden_BLE, head_VE), count


class Forward(nn.Module):
    """A VLM and what is asked of it as one module: where parameters are sharded, they are gathered in it."""

    def __init__(
        self, vlm: Any, *, encoding: Encoding, preprocess: Preprocess, newline: int, tower_grad: bool, device: str
    ) -> None:
        """`newline` is the token of a line's end; `tower_grad` says whether the tower learns."""
        super().__init__()
        self.vlm, self.encoding, self.preprocess = vlm, encoding, preprocess
        self.newline, self.tower_grad, self.device = newline, tower_grad, device

    def forward(self, micro: Sequence[Sample], judge: Judge[T]) -> T:
        """What `judge` makes of a micro-batch."""
        vlm = self.vlm
        # Padding is masked and never counted: any id will do.
        ids_BL, labels_BL, mask_BL = pad([s for sample in micro for s in sample.sequences], 0, self.device)
        is_visual_BL = (ids_BL == vlm.config.video_token_id) & mask_BL
        embeds_BLE = vlm.get_input_embeddings()(ids_BL.masked_fill(is_visual_BL, 0))
        embeds_BLE = self._see(embeds_BLE, is_visual_BL, micro)
        lm, head_VE = vlm.model.language_model, vlm.lm_head.weight
        hidden_BLE = lm(inputs_embeds=embeds_BLE, attention_mask=mask_BL, use_cache=False).last_hidden_state
        return judge(hidden_BLE, head_VE, labels_BL, micro)

    def _see(self, embeds_BLE: Tensor, is_visual_BL: Tensor, micro: Sequence[Sample]) -> Tensor:
        """The embeddings with those of the images in their places; a sequence that was cut lacks some at its end."""
        vlm, tile = self.vlm, self.encoding.tile
        rows, visual = iter(is_visual_BL), []
        for sample in micro:
            blocks = self.blocks(sample)
            for _ in sample.sequences:
                seen = int(next(rows).sum())
                visual += [torch.cat(blocks)[:seen]] if blocks else []
        if visual:
            visual_NE = torch.cat(visual).to(embeds_BLE.dtype)
            return embeds_BLE.masked_scatter(is_visual_BL[..., None], visual_NE)
        # What trains must take part in every backward: ranks add their gradients up in step.
        blank = torch.zeros(1, 3, tile, tile, device=self.device, dtype=vlm.model.vision_tower.dtype)
        return embeds_BLE + 0 * embed_frames(vlm, frame_features(vlm, blank)).sum().to(embeds_BLE.dtype)

    def blocks(self, sample: Sample) -> list[Tensor]:
        """The embeddings (N, E) of each of a sample's images."""
        newline_E = self.vlm.get_input_embeddings().weight[self.newline]
        alone = len(sample.images) == 1
        return [
            embed_image(
                *(self.vlm, open_image(image), newline_E, self.encoding, self.preprocess),
                alone=alone,
                tower_grad=self.tower_grad,
            )
            for image in sample.images
        ]
