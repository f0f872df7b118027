"""Load a transformers model whose parameters stay in their safetensors files: ranks of a training read their shards."""

from pathlib import Path
from typing import Any

from torch import nn

from lvctx.artifacts.stored_tensors import STORABLE, keep_in_file, read_stored
from lvctx.artifacts.weights import read_headers


def load_in_files(kind: Any, path: Path, options: dict[str, Any]) -> tuple[Any, Any] | None:
    """`kind.from_pretrained(path, **options)` with parameters that have no memory (`lvctx.artifacts.stored_tensors`).

    transformers renames, checks and ties placeholders instead of the stored tensors; buffers have their values. None
    where the stored tensors are not the parameters: merged, of another type, or a tied weight is stored twice.
    """
    if any(entry["dtype"] not in STORABLE for header in read_headers(path).values() for entry in header.values()):
        return None
    stored = read_stored(path)
    dtype = options["config"].dtype if options["dtype"] == "auto" else options["dtype"]
    placeholders = {name: tensor.placeholder(dtype) for name, tensor in stored.items()}
    model, info = kind.from_pretrained(None, state_dict=dict(placeholders), **options)
    by_memory = {tensor.untyped_storage().data_ptr(): name for name, tensor in placeholders.items()}
    unused = set(stored)
    for place, tensor in [*model.named_parameters(), *model.named_buffers()]:
        name = by_memory.get(tensor.untyped_storage().data_ptr())
        unused.discard(name)
        if isinstance(tensor, nn.Parameter):
            if name is None and place not in info["missing_keys"]:
                return None
            if name is not None:
                keep_in_file(tensor, stored[name])
        elif name is not None:
            parent, _, attribute = place.rpartition(".")
            setattr(model.get_submodule(parent), attribute, stored[name].rows(0, len(tensor)).to(tensor.dtype))
    tied = {tuple(model.get_parameter(place).shape) for place in model.all_tied_weights_keys}
    if any(stored[name].shape in tied for name in unused):
        return None
    model.config.name_or_path = str(path)
    if model.can_generate():
        model.generation_config = _generation_config(path)
    return model, info


def _generation_config(path: Path) -> Any:
    """The generation defaults of a directory, from config.json where it has no file of its own."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig.from_pretrained(path, config_file_name="config.json", _from_model_config=True)
