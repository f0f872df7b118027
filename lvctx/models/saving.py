"""Write a model as a plain Hugging Face directory that stock transformers and vLLM load."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvctx.artifacts.store import disk_error, is_disk_error, move_written, scratch
from lvctx.models.adapter import ADAPTER
from lvctx.models.card import CARD


def save_model(model: Any, tokenizer: Any, out: Path) -> None:
    """Save weights (safetensors), configuration, generation defaults and tokenizer into `out`.

    The tokenizer's maximal length becomes the model's context. Raises InputError if writing fails.
    """
    forget_origin(model.config)
    try:
        with scratch(out / "model") as folder:
            model.save_pretrained(folder, state_dict=tower_names(model.state_dict()))
            for stale in out.glob("model*.safetensors*"):  # of a run with other shards
                stale.unlink()
            for path in folder.iterdir():
                move_written(path, out / path.name)
        save_tokenizer(tokenizer, model.config, out)
    except Exception as e:
        if is_disk_error(e):
            raise disk_error(e, out) from e
        raise


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
    """Copy a VLM's processor files, which belong to neither weights nor tokenizer, and a model's card."""
    (out / CARD).unlink(missing_ok=True)
    for path in (*source.glob("*processor*.json"), *source.glob(CARD)):
        shutil.copyfile(path, out / path.name)


def model_files(out: Path) -> list[str]:
    """Names of the files of a saved model directory and its adapter: all but the training log and manifest."""
    ours = {"MANIFEST.json", "metrics.jsonl", "search.jsonl"}
    folders = [folder for folder in (out, out / ADAPTER, out / "sglang") if folder.is_dir()]
    files = [path for folder in folders for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    names = (path.relative_to(out).as_posix() for path in files if not path.name.startswith("."))
    return sorted(name for name in names if name not in ours)
