"""LoRA on the language model through peft: few trained parameters, merged into the weights before saving."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lvctx.errors import InputError, library_errors
from lvctx.models.weight_check import check_shapes

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Projections of an attention block, as Llama, Qwen2, Qwen3 and Mistral name them."""

Gather = Callable[[Tensor], Tensor]
"""The full tensor of a parameter that may be sharded."""


def add_lora(model: Any, *, rank: int, targets: Sequence[str], seed: int) -> Any:
    """Wrap `model` in LoRA of `rank` on the linear layers named `targets` (alpha = 2 rank); only LoRA is trainable.

    The weights of LoRA are float32 and drawn from `seed`.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))
    with library_errors("LoRA does not support this model's attention"):
        wrapped = get_peft_model(model, config)
    for parameter in lora_parameters(wrapped):
        parameter.data = parameter.data.float()
    return wrapped


def lora_parameters(wrapped: Any) -> list[nn.Parameter]:
    """The trained parameters of a wrapped model."""
    return [p for p in wrapped.parameters() if p.requires_grad]


def lora_state(wrapped: Any) -> dict[str, Tensor]:
    """The trained parameters by name, for `load_lora_state` of another wrapped model."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(wrapped, wrapped.state_dict(keep_vars=True), save_embedding_layers=False)


def load_lora_state(wrapped: Any, state: dict[str, Tensor], *, where: object = None) -> None:
    """Start from saved tensors. Raises InputError if they have another rank, other layers or are of another model."""
    from peft import set_peft_model_state_dict

    expected = {name: tuple(tensor.shape) for name, tensor in lora_state(wrapped).items()}
    try:
        check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, expected, where)
    except InputError as e:
        what = f"the adapter is of another rank or another model: {e.what}"
        raise InputError(what, where=where, fix="give the --lora that it was trained with") from None
    set_peft_model_state_dict(wrapped, {name: tensor.float() for name, tensor in state.items()})


def plain_state(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model's parameters and persistent buffers under the names they have without LoRA, and the LoRA layers.

    A layer has the name of the weight that its product is added to.
    """
    layers = {f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    state = {n: tensor for n, tensor in model.state_dict(keep_vars=True).items() if ".lora_" not in n}
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}, layers


def merged_weight(layer: Any, gather: Gather) -> Tensor:
    """The weight of one layer with LoRA's product added, as `merge_and_unload` does; `gather` gives full tensors."""
    down, up = (gather(side["default"].weight) for side in (layer.lora_A, layer.lora_B))
    weight = gather(layer.base_layer.weight).clone()
    weight += (up @ down) * layer.scaling["default"]
    return weight
