"""Adapters: what an alignment with LoRA trained, a few MB from which another alignment can start."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lvctx.artifacts.manifest import Provenance
from lvctx.artifacts.store import read_safetensors_header, save_tensors
from lvctx.errors import InputError
from lvctx.model.lora import load_lora_state, lora_state

ADAPTER = "adapter.safetensors"
"""In the output of a run with LoRA: projector and LoRA alone, a few MB from which another run can start."""


def save_adapter(target: Path, vlm: Any, wrapped: Any, provenance: Provenance) -> None:
    """Write projector and LoRA, in bfloat16."""
    parts = {"projector": vlm.model.multi_modal_projector.state_dict(), "lora": lora_state(wrapped)}
    tensors = {f"{part}.{name}": t.bfloat16() for part, state in parts.items() for name, t in state.items()}
    save_tensors(target, tensors, provenance.to_metadata())


def load_adapter(path: Path, vlm: Any, wrapped: Any) -> None:
    """Start from what `save_adapter` wrote, or from a projector alone. Raises InputError when it does not fit."""
    from safetensors.torch import load_file

    read_safetensors_header(path)
    parts: dict[str, dict[str, Tensor]] = {"projector": {}, "lora": {}}
    for key, tensor in load_file(path).items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = tensor
    try:
        vlm.model.multi_modal_projector.load_state_dict(parts["projector"])
        if parts["lora"]:
            load_lora_state(wrapped, parts["lora"])
    except InputError as e:
        raise InputError(e.what, where=path, fix=e.fix) from None
    except RuntimeError:
        raise InputError("the projector is of another tower or language model", where=path) from None
