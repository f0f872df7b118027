"""Find and load models and tokenizers: a local Hugging Face directory or a hub id, for language models and VLMs."""

import copy
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import NoneType
from typing import Any

from lvctx.artifacts.manifest import MANIFEST, read_manifest
from lvctx.artifacts.model_config import CONFIG_FILE, language_part, read_model_config
from lvctx.artifacts.sniff import check_kind
from lvctx.artifacts.weights import read_headers, shard_names
from lvctx.device import DeviceMap, resolve_device
from lvctx.errors import InputError, MissingError, library_errors
from lvctx.models.weight_check import DERIVED, check_loaded

VLM_TYPE = "llava_onevision"
FLOATS = ("BF16", "F16", "F32", "F64")
"""Data types of unquantized weights, in safetensors' names."""


def resolve_model(name: str | Path, *, weights: bool = True) -> Path:
    """The local directory of a model: `name` itself, or the downloaded snapshot of a hub id such as `org/model`.

    Without `weights` only the small files are needed. Raises InputError when there is no such directory or
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
    shard_names(path)
    return path


def _download(name: str, *, weights: bool) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError("no such model directory", where=name, fix="give a directory or a hub id like org/model")
    from huggingface_hub import snapshot_download

    # Weights in safetensors only: a pickle is never downloaded or loaded.
    patterns = ["*.json", "*.jinja", "*.txt", "*.model", "README.md", *(["*.safetensors"] if weights else [])]
    what = "neither a directory nor a model that could be downloaded"
    with library_errors(what, where=name, fix="check name and network"):
        return Path(snapshot_download(name, allow_patterns=patterns))


def read_config(name: str | Path) -> dict[str, Any]:
    """The raw config.json of a directory, of that file itself, or of a hub id; weights are not needed.

    For a VLM it is the language model's part. Raises InputError.
    """
    path = Path(name)
    if not path.exists():
        path = _download(str(name), weights=False)
    return language_part(read_model_config(path))


def load_config(path: Path) -> Any:
    """The transformers configuration of a resolved model directory."""
    from transformers import AutoConfig

    read_model_config(path)
    with library_errors("unreadable config.json", where=path):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model directory or hub id, tested on one letter.

    Raises InputError if there is none, or if it cannot encode and decode text.
    """
    from transformers import AutoTokenizer

    path = resolve_model(name) if not (Path(name) / "tokenizer.json").is_file() else Path(name)
    if (path / CONFIG_FILE).is_file():
        read_model_config(path)  # transformers reads it too, and unbounded
    with library_errors("no usable tokenizer", where=name):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        # Loading accepts any value in tokenizer_config.json; encoding fails if model_max_length is not a number.
        tokenizer.decode(tokenizer("a").input_ids)
    # Where there are no files, transformers makes an empty tokenizer for some types of models.
    if not tokenizer("a", add_special_tokens=False).input_ids:
        raise InputError("no usable tokenizer (it encodes no text)", where=name, fix="add the files of its tokenizer")
    return tokenizer


def load_image_processor(path: Path) -> Any:
    """The image processor of a Qwen-VL directory, tested on a blank image.

    Raises InputError for a preprocessor_config.json that is unusable, or whose patch size is not the model's.
    """
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    where = path / "preprocessor_config.json"
    with library_errors("unusable image processor", where=where):
        processor: Any = Qwen2VLImageProcessorPil.from_pretrained(path)
    vision = load_config(path).vision_config
    for key, of_model in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        if getattr(processor, key, None) != of_model:
            raise InputError(f"{key} is {getattr(processor, key, None)!r}, the model's {of_model}", where=where)
    with library_errors("unusable image processor", where=where):
        side = processor.patch_size * processor.merge_size
        blank = Image.new("RGB", (8, 8)).resize((side, side), resample=processor.resample)
        rows = processor(images=[blank], do_resize=False, return_tensors="pt")["pixel_values"]
        tuple(round(255 * mean) for mean in processor.image_mean)
    if not bool(rows.isfinite().all()):
        raise InputError(f"image_std is {processor.image_std}", where=where)
    return processor


def require_accelerate() -> None:
    """Raise MissingError where accelerate, which places the modules of a device map, is not installed."""
    if find_spec("accelerate") is None:
        raise MissingError("a device map needs accelerate", where="--device-map", fix="pip install accelerate")


def stateful_layers(config: Any) -> set[str]:
    """Kinds of a language model's layers that keep another state than keys and values of every token.

    Their cache cannot be cut back to a shorter prefix.
    """
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return {str(kind) for kind in kinds} - {"full_attention", "sliding_attention", "chunked_attention"}


def refuse_changed_logits(config: Any, where: object) -> None:
    """Raise InputError for a text model that caps or scales the logits of its output head, which is used alone here."""
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):  # Gemma 2, Cohere, Granite
        if getattr(config, key, None) not in (None, 1):
            raise InputError(f"its logits are changed by {key}, which is not supported", where=where)


def effective_dtype(config: Any, dtype: str) -> str:
    """Name of the weights' data type in memory; it stays `auto` if config.json does not name one."""
    return str(config.dtype or dtype).removeprefix("torch.") if dtype == "auto" else dtype


def load_model(
    path: Path, *, config: Any = None, dtype: Any = "auto", device: str = "cpu", device_map: DeviceMap | None = None
) -> Any:
    """A language model or a vision-language model of any class, in eval mode with SDPA attention.

    `dtype` is a torch dtype or its name, or `auto` for the checkpoint's own. `device` may be `auto` (`lvctx.device`);
    it is not used with a `device_map`. On `meta` the parameters stay in their files (`lvctx.artifacts.stored_tensors`)
    if each is one stored tensor, and are on the CPU if transformers computes some, such as merged experts. Raises
    InputError for weights that do not match the configuration tensor by tensor, do not fit the map, or cannot be read;
    MissingError for a map without accelerate, a package that quantized weights need, or an unavailable device.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from lvctx.models.file_parameters import load_in_files  # these import torch, which config.json does not need
    from lvctx.rope.scaling import check_rope

    in_files = device == "meta"
    if device_map is None:
        device = "cpu" if in_files else resolve_device(device)
    else:
        require_accelerate()
    config = config or load_config(path)
    stored = _stored(path, config)
    check_rope(config, path)
    is_language = type(config) in AutoModelForCausalLM._model_mapping
    takes_images = type(config) in AutoModelForImageTextToText._model_mapping and not is_language
    kind = AutoModelForImageTextToText if takes_images or hasattr(config, "vision_config") else AutoModelForCausalLM
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(stored):
        raise InputError(f"config.json describes {layers:,} layers, the weights have {len(stored)} tensors", where=path)
    with library_errors("cannot load the model", where=path), torch.device("meta"):
        empty = kind.from_config(copy.deepcopy(config))
    described = sum(parameter.numel() for parameter in empty.parameters())
    if quantization(config) is None and described > 4 * sum(stored.values()):
        # Checked before transformers allocates all that the configuration describes.
        raise InputError(
            f"config.json describes {described:,} parameters, the weights have {sum(stored.values()):,}", where=path
        )
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "attn_implementation": "sdpa",
        "trust_remote_code": False,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are reported below
    }
    with library_errors("cannot load the weights", where=path):
        loaded = load_in_files(type(empty), path, options) if in_files and quantization(config) is None else None
        if loaded is None:
            loaded = kind.from_pretrained(path, device_map=device_map, use_safetensors=True, **options)
        model, loading_info = loaded
    check_loaded(model, loading_info, stored, path)
    end = model.generation_config.eos_token_id
    if any(type(token) not in (int, NoneType) for token in (end if isinstance(end, list) else [end])):
        raise InputError(f"eos_token_id is {end!r}, not token ids", where=path / "generation_config.json")
    return (model if device_map is not None else model.to(device)).eval()


def try_forward(model: Any, where: object) -> None:
    """Run a loaded model on two tokens. Raises InputError if it fails.

    Many values of a config.json are used only in a forward pass: those of positions, attention windows and scales.
    """
    import torch

    device = device_of(model.get_input_embeddings())
    with library_errors("the model cannot compute with this config.json", where=where), torch.no_grad():
        model.get_decoder()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))


def _stored(path: Path, config: Any) -> dict[str, int]:
    """Number of values of each tensor. Raises InputError for quantized values without a quantization_config."""
    if (path / "adapter_config.json").is_file():
        raise InputError(
            "holds a PEFT adapter (adapter_config.json)", where=path, fix="merge it into the weights first"
        )
    stored = {}
    try:
        headers = read_headers(path)
    except InputError as e:
        raise InputError(f"cannot load the weights ({e.what})", where=e.where, fix=e.fix) from None
    for file, header in headers.items():
        for name, entry in header.items():
            if quantization(config) is None and entry["dtype"] not in FLOATS and not DERIVED.search(name):
                raise InputError(
                    f"{name} is {entry['dtype']}, but config.json has no quantization_config",
                    where=path / file,
                    fix="give the model in bfloat16",
                )
            stored[name] = prod(entry["shape"])
    return stored


def quantization(config: Any) -> str | None:
    """The method that a model's weights are quantized by, from its configuration; None if they are not."""
    quant_config = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if quant_config is None:
        return None
    values = quant_config if isinstance(quant_config, dict) else vars(quant_config)
    return str(values.get("quant_method", "an unknown method"))


def refuse_quantized(config: Any, where: object) -> None:
    """Raise InputError for a model with quantized weights, which cannot be trained and saved as plain ones."""
    if (method := quantization(config)) is not None:
        raise InputError(f"its weights are quantized ({method})", where=where, fix="give the unquantized checkpoint")


def device_of(module: Any) -> Any:
    """The torch device that a module computes on: the device of its weights, also if these are moved for each call."""
    import torch

    hooked = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if hooked is None else torch.device(hooked)


def trained_length(path: Path) -> int:
    """Tokens of the longest sequence a language model was trained on: from its manifest, else its context length.

    Extending the positions without training raises the context, not this.
    """
    manifest = read_manifest(path) if (path / MANIFEST).is_file() else {}
    return int(manifest.get("trained_length") or context_length(load_config(path)))


def context_length(config: Any) -> int:
    """Context length in config.json of a language model or VLM. Raises InputError if it has none."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int):
        raise InputError("config.json has no max_position_embeddings", where=config.name_or_path or None)
    return length
