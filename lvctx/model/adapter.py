"""Adapters: what a training with LoRA trained, a few MB from which another alignment can start.

A file holds a projector, a LoRA, or both: `projector.*` and `lora.*`.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from lvctx.artifacts.manifest import Provenance, read_provenance
from lvctx.artifacts.store import read_safetensors_header, save_tensors
from lvctx.errors import InputError, library_errors
from lvctx.model.fit import check_shapes
from lvctx.model.lora import load_lora_state, lora_state

ADAPTER = "adapter.safetensors"
"""In the output of a run with LoRA: what it trained."""


def save_adapter(target: Path, vlm: Any, wrapped: Any, provenance: Provenance, *, longest: int) -> None:
    """Write the LoRA, and the projector where it was trained, in bfloat16; `longest`: see `longest_sample`."""
    parts = {"lora": lora_state(wrapped)}
    projector = getattr(vlm.model, "multi_modal_projector", None)
    if projector is not None and any(p.requires_grad for p in projector.parameters()):
        parts["projector"] = projector.state_dict()
    tensors = {f"{part}.{name}": t.bfloat16() for part, state in parts.items() for name, t in state.items()}
    save_tensors(target, tensors, provenance.to_metadata(longest_sample=longest))


def longest_sample(path: Path) -> int:
    """Tokens of the longest sequence that an adapter, or an aligned VLM, was trained on; 0 where it does not say."""
    return int((read_provenance(path) or {}).get("longest_sample", 0))


def load_adapter(path: Path, vlm: Any, wrapped: Any) -> None:
    """Start from what `save_adapter` wrote, or from a projector alone. Raises InputError when it does not fit."""
    from safetensors.torch import load_file

    read_safetensors_header(path)
    parts: dict[str, dict[str, Tensor]] = {}
    with library_errors("cannot read the adapter", where=path):
        tensors = load_file(path)
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = tensor
    if not parts or not parts.keys() <= {"projector", "lora"}:
        raise InputError("holds neither a projector nor a LoRA", where=path, fix=f"give an {ADAPTER} of align")
    if "projector" in parts:
        projector = getattr(vlm.model, "multi_modal_projector", None)
        if projector is None:
            raise InputError(
                "holds a projector, and the model sees nothing", where=path, fix="give the LoRA of an extend-lm"
            )
        wanted = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in parts["projector"].items()}
        check_shapes(found, wanted, f"{path}, the projector")
        projector.load_state_dict(parts["projector"])
    if "lora" in parts:
        load_lora_state(wrapped, parts["lora"], where=path)
