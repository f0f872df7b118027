"""Find and load models and tokenizers: a local Hugging Face directory or a hub id, language model or VLM alike."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lvctx.artifacts.manifest import MANIFEST, read_manifest
from lvctx.artifacts.sniff import check_kind
from lvctx.errors import InputError, MissingError

VLM_TYPE = "llava_onevision"


def resolve_model(name: str | Path, *, weights: bool = True) -> Path:
    """The local directory of a model: `name` itself, or the downloaded snapshot of a hub id such as `org/model`.

    Without `weights` only the small files are asked for. Raises InputError when there is no such directory or
    repository, no config.json, or a shard is missing.
    """
    path = Path(name)
    if path.exists():
        check_kind(path, "model", "a model directory", fix="give the directory that holds config.json, or a hub id")
    else:
        path = _download(str(name), weights=weights)
    if not (path / "config.json").is_file():
        raise InputError("no config.json: not a model directory", where=path)
    if not weights:
        return path
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise InputError(f"missing {', '.join(missing)}", where=path, fix="download or save the model again")
    return path


def _download(name: str, *, weights: bool) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError("no such model directory", where=name, fix="give a directory or a hub id like org/model")
    from huggingface_hub import snapshot_download

    try:
        # Weights in safetensors only: a pickle is never fetched, let alone loaded.
        patterns = ["*.json", "*.jinja", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as e:
        reason = str(e).splitlines()[0]
        raise InputError(
            f"neither a directory nor a model the hub would give ({reason})", where=name, fix="check name and network"
        ) from e


def read_config(name: str | Path) -> dict[str, Any]:
    """The raw config.json of a directory, of that file itself, or of a hub id; weights are not asked for.

    A VLM's language model is what counts. Raises InputError.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        path = _download(str(name), weights=False) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config.get("text_config", config)
    except (OSError, ValueError, AttributeError) as e:
        raise InputError(f"unreadable config.json ({e})", where=path) from e


def load_config(path: Path) -> Any:
    """The transformers configuration of a resolved model directory."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as e:
        raise InputError(f"unreadable config.json ({str(e).splitlines()[0]})", where=path) from e


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model directory or hub id. Raises InputError where there is none."""
    from transformers import AutoTokenizer

    path = resolve_model(name) if not (Path(name) / "tokenizer.json").is_file() else Path(name)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as e:
        raise InputError(f"no usable tokenizer ({str(e).splitlines()[0]})", where=name) from e


DeviceMap = str | dict[str, Any]
"""Where a model's modules are, as accelerate takes it: `auto`, `balanced`, `sequential`, or devices by name."""


def load_model(
    path: Path,
    *,
    config: Any = None,
    dtype: Any = "auto",
    device: str = "cpu",
    device_map: DeviceMap | None = None,
) -> Any:
    """A language model, a LlavaOnevision VLM or a Qwen-VL model, in eval mode with SDPA attention.

    `dtype` is a torch dtype, or `auto` for the checkpoint's own; with a `device_map`, `device` does not count. Raises
    InputError for weights that do not fit the configuration, the map, or cannot be read; MissingError for a map without
    accelerate, or a device that is not here.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if device_map is None and device.startswith("cuda") and not torch.cuda.is_available():
        raise MissingError("no CUDA device here", where=f"--device {device}", fix="--device cpu")
    if device_map is not None and find_spec("accelerate") is None:
        raise MissingError("a device map needs accelerate", where="--device-map", fix="pip install accelerate")
    config = config or load_config(path)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    try:
        model = kind.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation="sdpa", device_map=device_map
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise InputError(f"cannot load the weights ({str(e).splitlines()[0]})", where=path) from e
    return (model if device_map is not None else model.to(device)).eval()


def device_of(module: Any) -> Any:
    """The torch device that a module computes on: where its weights are, or are brought to when it is called."""
    import torch

    hooked = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if hooked is None else torch.device(hooked)


def trained_length(path: Path) -> int:
    """Tokens of the longest sequence a language model was trained on: its manifest's word, else the context it claims.

    Extending the positions without training raises the context, not this.
    """
    manifest = read_manifest(path) if (path / MANIFEST).is_file() else {}
    return int(manifest.get("trained_length") or context_length(load_config(path)))


def context_length(config: Any) -> int:
    """Positions a language model or VLM says it can read."""
    return int(config.get_text_config().max_position_embeddings)
