"""A row of text in training: this rank's part of it, and the loss of that part.

Shapes: B rows, L tokens of a row.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lvctx.models.loading import refuse_changed_logits
from lvctx.models.loss import IGNORED, shift_labels, token_loss
from lvctx.parallel.context import ParallelContext
from lvctx.parallel.fsdp import keep_in_graph
from lvctx.parallel.hf_attention import Shard


class RowLoss(nn.Module):
    """A language model (or a VLM's) and its loss as one module: sharded parameters are gathered in its forward.

    A router's auxiliary loss is not part of it. Raises InputError for a model that caps or scales its logits.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        text = lm.config.get_text_config()
        refuse_changed_logits(text, text.name_or_path)
        self.lm = lm

    def forward(self, ids: Tensor, labels: Tensor, positions: Tensor, **attention: Any) -> tuple[Tensor, int]:
        """Summed loss and number of counted tokens of ids (B, L), with labels already shifted."""
        decoder, head = self.lm.get_decoder(), self.lm.get_output_embeddings().weight
        hidden = decoder(input_ids=ids, position_ids=positions, use_cache=False, **attention).last_hidden_state
        total, count = token_loss(hidden.flatten(0, 1), head, labels.flatten())
        return keep_in_graph(total, hidden, head), count


def shard_row(
    ids_BL: Tensor, world: ParallelContext, starts: tuple[int, ...] | None, positions_BL: Tensor | None = None
) -> dict[str, Any]:
    """This rank's part of rows, on its device, as `RowLoss` takes it. Labels are shifted before the row is sharded.

    `positions_BL` are those of the tokens, unless they count up from 0.
    """
    places_BL = torch.arange(ids_BL.shape[1])[None] if positions_BL is None else positions_BL
    full_rows = {"ids": (ids_BL, 0), "labels": (shift_labels(ids_BL), IGNORED), "positions": (places_BL, 0)}
    ring = world.ring
    parts = {name: ring.shard(tensor, fill=fill).to(world.device) for name, (tensor, fill) in full_rows.items()}
    if ring.world > 1 or starts is not None:
        return parts | {"shard": Shard(ring=ring, starts=starts)}
    # Without a mask transformers treats a jump in the positions as the start of another document.
    return parts if positions_BL is None else parts | {"attention_mask": torch.ones_like(parts["ids"])}
