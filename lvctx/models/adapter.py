"""LoRA adapters: the trained parameters, as a PEFT directory `adapter/` of a few MB beside the merged weights.

It is a separate directory because vLLM loads every safetensors file beside config.json. The tensors have PEFT's
names, so `PeftModel.from_pretrained(base, "adapter")` loads the LoRA, and the projector if it was trained, into a
model with the same positions.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lvctx.artifacts.manifest import Provenance, read_provenance
from lvctx.artifacts.store import read_json, read_safetensors_header, save_tensors, scratch
from lvctx.errors import InputError, first_line, library_errors
from lvctx.models.lora import Gather, load_lora_state, lora_state
from lvctx.models.weight_check import check_shapes

ADAPTER = "adapter"
"""Directory of the adapter in the output of a run with LoRA."""
WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ROOT = "base_model.model."
"""Prefix of PEFT's names."""
PROJECTOR = "multi_modal_projector"


def save_adapter(
    out: Path, model: Any, wrapped: Any, provenance: Provenance, *, longest: int, gather: Gather = Tensor.detach
) -> None:
    """Write `out/adapter`: the LoRA, and the projector if it was trained, in bfloat16.

    `longest` is stored for `longest_sample`. `gather` gives the full tensor of a sharded parameter.
    """
    from peft import LoraConfig

    decoder = wrapped.get_base_model()
    place = next(name for name, module in model.named_modules() if module is decoder)
    tensors = {f"{ROOT}{place}.{name.removeprefix(ROOT)}": tensor for name, tensor in lora_state(wrapped).items()}
    projector: Any = getattr(model.model, PROJECTOR, None)
    trained = projector is not None and any(p.requires_grad for p in projector.parameters())
    if trained:
        tensors |= {f"{ROOT}model.{PROJECTOR}.{name}": tensor for name, tensor in projector.named_parameters()}
    lora = wrapped.peft_config["default"]
    linears = "|".join(sorted(lora.target_modules))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        # The tower's attention has projections of the same names; only the language model's are trained.
        target_modules=rf"{re.escape(place)}\.layers\..*\.({linears})",
        modules_to_save=[PROJECTOR] if trained else None,
        inference_mode=True,
        task_type="CAUSAL_LM",
    )
    (out / ADAPTER).mkdir(parents=True, exist_ok=True)
    with scratch(out / ADAPTER / ADAPTER_CONFIG_FILE) as folder:
        config.save_pretrained(folder)
        os.replace(folder / ADAPTER_CONFIG_FILE, out / ADAPTER / ADAPTER_CONFIG_FILE)
    metadata = provenance.to_metadata(longest_sample=longest)
    full = {name: gather(tensor).bfloat16() for name, tensor in tensors.items()}
    save_tensors(out / ADAPTER / WEIGHTS, full, metadata)


def longest_sample(path: Path) -> int:
    """Tokens of the longest sequence that an adapter, or an aligned VLM, was trained on; 0 if that is not stored."""
    if (path / WEIGHTS).is_file():
        path = path / WEIGHTS
    return int((read_provenance(path) or {}).get("longest_sample", 0))


def load_adapter(path: Path, model: Any, wrapped: Any) -> None:
    """Start from an adapter directory, from its tensors alone, or from a file with a projector's tensors.

    A tensor is identified by the end of its name, from `layers.` or `multi_modal_projector.` on, so the adapter of a
    language model fits the same language model inside a VLM. Raises InputError when it does not fit.
    """
    from safetensors.torch import load_file

    if path.is_dir():
        _check_scale(path / ADAPTER_CONFIG_FILE)
        path = path / WEIGHTS
    read_safetensors_header(path)
    with library_errors("cannot read the adapter", where=path):
        lora, tensors = _split(load_file(path), path)
    if tensors:
        projector = getattr(model.model, PROJECTOR, None)
        if projector is None:
            raise InputError(
                "holds a projector, but the model has none", where=path, fix="give the LoRA of an extend-lm"
            )
        expected = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
        check_shapes(
            {name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected, f"{path}, the projector"
        )
        projector.load_state_dict(tensors)
    if lora:
        load_lora_state(wrapped, lora, where=path)


def _split(tensors: Mapping[str, Tensor], where: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The LoRA, under the names of `load_lora_state`, and the projector."""
    lora, projector = {}, {}
    for name, tensor in tensors.items():
        if match := re.search(r"(?:^|\.)(layers\..*\.lora_[AB]\.weight)$", name):
            lora[ROOT + match[1]] = tensor
        elif match := re.search(rf"(?:^|\.){PROJECTOR}\.(.+)$", name):
            projector[match[1]] = tensor
        else:
            raise InputError(f"{name} belongs to neither a LoRA nor a projector", where=where, fix="give an adapter")
    if not lora and not projector:
        raise InputError("holds neither a projector nor a LoRA", where=where, fix="give the adapter/ of another run")
    return lora, projector


def _check_scale(path: Path) -> None:
    """Raise InputError for a LoRA whose scale (lora_alpha / rank) is not 2."""
    try:
        config = read_json(path)
        rank, alpha = config["r"], config["lora_alpha"]
        differs = alpha != 2 * rank
    except (KeyError, TypeError) as e:
        raise InputError(f"not the configuration of a LoRA ({first_line(e)})", where=path) from e
    if differs:
        raise InputError(f"lora_alpha is {alpha} for rank {rank}; only twice the rank is supported", where=path)
