"""Write a model as a plain Hugging Face directory that stock transformers and vLLM load."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from lvctx.artifacts.store import disk_error, is_disk_error, move_written, scratch
from lvctx.artifacts.stored_tensors import BLOCK
from lvctx.artifacts.weights import INDEX, Weight, write_weight_shard
from lvctx.models.adapter import ADAPTER
from lvctx.models.card import CARD
from lvctx.models.lora import Gather, merged_weight, plain_state


def save_model(
    model: Any, tokenizer: Any, out: Path, *, dtype: torch.dtype | None = None, gather: Gather = Tensor.detach
) -> None:
    """Save weights (safetensors), configuration, generation defaults and tokenizer into `out`.

    See `write_model`. The tokenizer's maximal length becomes the model's context. Raises InputError if writing fails.
    """
    forget_origin(model.config)
    try:
        with scratch(out / "model") as folder:
            write_model(model, folder, dtype=dtype, gather=gather)
            for stale in out.glob("model*.safetensors*"):  # of a run with other shards
                stale.unlink()
            for path in folder.iterdir():
                move_written(path, out / path.name)
        save_tokenizer(tokenizer, model.config, out)
    except Exception as e:
        if is_disk_error(e):
            raise disk_error(e, out) from e
        raise


def write_model(model: Any, folder: Path, *, dtype: torch.dtype | None = None, gather: Gather = Tensor.detach) -> None:
    """Write the files of `model.to(dtype).save_pretrained(folder)` with LoRA merged, one tensor at a time.

    `gather` gives the full tensor of a sharded parameter. Where transformers splits or merges tensors when it saves
    (experts), all of them are in memory.
    """
    state, lora = plain_state(model)
    model.save_pretrained(folder, state_dict={})
    for empty in folder.glob("*.safetensors"):
        empty.unlink()
    if dtype is not None:
        model.config.dtype = str(dtype).removeprefix("torch.")
        model.config.save_pretrained(folder)

    def value(name: str) -> Tensor:
        return merged_weight(lora[name], gather) if name in lora else gather(state[name])

    def cast(tensor: Tensor) -> Tensor:
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

    names = {name: old for old, name in zip(state, tower_names(state), strict=True)}
    layout = _layout(model, {name: state[old] for name, old in names.items()}, dtype)
    if layout is None:
        model.save_pretrained(folder, state_dict={name: cast(value(old)) for name, old in names.items()})
        return

    def weight(stored: str) -> Weight:
        name, like = layout[stored]

        def chunks() -> Iterator[Any]:
            for part in value(names[name]).cpu().contiguous().flatten().split(BLOCK):
                yield cast(part).view(torch.uint8).numpy()

        return Weight(dtype=STORED_TYPES[like.dtype], shape=tuple(like.shape), chunks=chunks)

    split = split_torch_state_dict_into_shards(
        {stored: like for stored, (_, like) in layout.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )
    for file, inside in split.filename_to_tensors.items():
        write_weight_shard(folder / file, {stored: weight(stored) for stored in inside})
    if split.is_sharded:
        count = sum(state[names[name]].numel() for name, like in layout.values() if like.requires_grad)
        index = {"metadata": {"total_parameters": count, **split.metadata}, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


SHARD_SIZE = "50GB"
"""Largest file of weights, as in transformers."""
STORED_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
"""Names of types in safetensors."""


def _layout(model: Any, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, tuple[str, Tensor]] | None:
    """Stored name -> name in `state` and a tensor of its shape and type without values; None if not one to one.

    A tensor without values requires a gradient if it is a parameter's. Of tied weights only one is stored.
    """
    from transformers.core_model_loading import revert_weight_conversion

    ignored = set(model._keys_to_ignore_on_save or ())
    tied = set(model.all_tied_weights_keys)
    first = {tensor: name for name, tensor in reversed([*state.items()]) if name not in tied}
    likes = {}
    for name, tensor in state.items():
        if name not in ignored and first.setdefault(tensor, name) == name:
            kind = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
            likes[name] = torch.empty(tensor.shape, dtype=kind, device="meta")
            likes[name].requires_grad_(isinstance(tensor, nn.Parameter) and kind.is_floating_point)
    names = {like: name for name, like in likes.items()}
    stored = revert_weight_conversion(model, likes)
    if any(like not in names or like.dtype not in STORED_TYPES for like in stored.values()):
        return None
    return {place: (names[like], like) for place, like in stored.items()}


TOWER_NAMES = "vision_tower."


def tower_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """A model's tensors, with a CLIP or SigLIP tower under `vision_tower.vision_model.`, which every runtime reads.

    transformers 5.19 dropped that level from its own names and reads both; vLLM 0.32 reads no other.
    """
    nested = f"{TOWER_NAMES}vision_model."
    return {name if nested in name else name.replace(TOWER_NAMES, nested): tensor for name, tensor in state.items()}


def forget_origin(config: Any) -> None:
    """Remove the paths that a model and its parts were loaded from: the same weights must give the same bytes."""
    config._name_or_path = ""
    for name in config.sub_configs:
        getattr(config, name)._name_or_path = ""


def save_tokenizer(tokenizer: Any, config: Any, out: Path) -> None:
    """Save a tokenizer whose maximal length is the model's context; how it was loaded is not saved."""
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    tokenizer.save_pretrained(out)


def copy_processors(source: Path, out: Path) -> None:
    """Copy a VLM's processor files, which belong to neither weights nor tokenizer, and a model's card.

    Released Qwen-VLs have the processor's chat template in chat_template.json.
    """
    (out / CARD).unlink(missing_ok=True)
    for path in (*source.glob("*processor*.json"), *source.glob("chat_template.json"), *source.glob(CARD)):
        shutil.copyfile(path, out / path.name)


def model_files(out: Path) -> list[str]:
    """Names of the files of a saved model directory and its adapter: all but the training log and manifest."""
    ours = {"MANIFEST.json", "metrics.jsonl", "search.jsonl"}
    folders = [folder for folder in (out, out / ADAPTER, out / "sglang") if folder.is_dir()]
    # A model that was downloaded consists of links; those in sglang/ lead to the files beside it.
    files = [p for folder in folders for p in folder.iterdir() if p.is_file() and (folder == out or not p.is_symlink())]
    names = (path.relative_to(out).as_posix() for path in files if not path.name.startswith("."))
    return sorted(name for name in names if name not in ours)
