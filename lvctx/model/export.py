"""Write a model as a plain Hugging Face directory that stock transformers and vLLM load."""

import os
import shutil
from pathlib import Path
from typing import Any

from lvctx.artifacts.store import disk_error, is_disk_error, scratch


def save_model(model: Any, tokenizer: Any, out: Path) -> None:
    """Save weights (safetensors), configuration, generation defaults and tokenizer into `out`.

    The tokenizer's maximal length becomes the model's context. Raises InputError when the disk refuses.
    """
    forget_origin(model.config)
    try:
        with scratch(out / "model") as folder:
            model.save_pretrained(folder)
            for stale in out.glob("model*.safetensors*"):  # of a run whose weights were parted otherwise
                stale.unlink()
            for path in folder.iterdir():
                os.replace(path, out / path.name)
        save_tokenizer(tokenizer, model.config, out)
    except Exception as e:
        if is_disk_error(e):
            raise disk_error(e, out) from e
        raise


def forget_origin(config: Any) -> None:
    """Where a model and its parts were loaded from is not part of it: the same weights must give the same bytes."""
    config._name_or_path = ""
    for name in config.sub_configs:
        getattr(config, name)._name_or_path = ""


def save_tokenizer(tokenizer: Any, config: Any, out: Path) -> None:
    """Save a tokenizer whose maximal length is the model's context."""
    tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    tokenizer.save_pretrained(out)


def copy_processors(source: Path, out: Path) -> None:
    """Take over a VLM's processors' files, which come with no weights and no tokenizer."""
    for path in source.glob("*processor*.json"):
        shutil.copyfile(path, out / path.name)


def model_files(out: Path) -> list[str]:
    """Names of the files of a saved model directory: everything but our own log and manifest."""
    ours = {"MANIFEST.json", "metrics.jsonl", "search.jsonl"}
    return sorted(p.name for p in out.iterdir() if p.is_file() and p.name not in ours and not p.name.startswith("."))
