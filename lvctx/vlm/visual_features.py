"""The visual features of any model of transformers, in the places of its placeholders: taken by the model's own code.

Every class computes them in a way of its own, and gives them to its decoder inside `inputs_embeds`. There they are
taken, before the decoder computes anything.

Shapes: N placeholders, L tokens, E width of the language model.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lvctx.errors import InputError, library_errors
from lvctx.models.loading import device_of


class _Reached(BaseException):
    """The decoder was about to run; no `except Exception` of a model's code may catch it."""


@torch.inference_mode()
def visual_features(model: Any, inputs: Any, placeholder_ids: Iterable[int]) -> Tensor:
    """Features (N, E) of one prompt's placeholders, in order.

    `inputs` is what the model's processor gives. Raises InputError where the model's forward fails on it, or gives its
    decoder more than embeddings in the places of placeholders.
    """
    where = model.name_or_path or model.config.model_type
    embedding, taken = model.get_input_embeddings(), dict[str, Any]()

    def take(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        taken.update(keywords)
        raise _Reached

    moved = inputs.to(device_of(embedding), dtype=embedding.weight.dtype)
    handle = model.get_decoder().register_forward_pre_hook(take, with_kwargs=True)
    try:
        with library_errors("the model fails on its processor's output", where=where):
            model(**moved, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    if taken.get("inputs_embeds") is None:
        raise InputError("its decoder is not given embeddings", where=where)
    ids_L, embeds_LE = moved["input_ids"][0], taken["inputs_embeds"][0]
    is_visual_L = torch.isin(ids_L, torch.tensor(sorted(placeholder_ids), device=ids_L.device))
    if not torch.equal(embeds_LE[~is_visual_L], embedding(ids_L[~is_visual_L])):
        raise InputError("visual features are in other places than placeholders", where=where)
    return embeds_LE[is_visual_L]
