"""A model's config.json as stored: read and checked before any library interprets it."""

import re
from pathlib import Path
from typing import Any

from lvctx.artifacts.store import read_json
from lvctx.errors import InputError

CONFIG_FILE = "config.json"
PARTS = ("text_config", "vision_config")
"""Keys under which a VLM's config.json has the configurations of its language model and vision tower."""

SIZES = {
    **dict.fromkeys(("num_hidden_layers", "depth"), 1_024),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "head_dim"), 65_536),
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim", "out_hidden_size"), 1 << 22),
    "vocab_size": 1 << 26,
    "max_position_embeddings": 10**12,
}
"""Keys that hold whole numbers of at least 1, and bounds far above any real model: libraries allocate that much."""
_COUNTED = re.compile(r"(layers?|depths?|blocks?|experts|labels|heads?)$")
_MOST_COUNTED = 1 << 16
"""Keys of counts for which libraries build one object each, and their bound."""


def read_model_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory, or that file itself, as stored.

    Raises InputError for a missing file, for JSON that is not a model's configuration, and for impossible sizes.
    """
    path = directory if directory.is_file() else directory / CONFIG_FILE
    raw = read_json(path)
    if not isinstance(raw.get("model_type"), str) or not raw["model_type"]:
        raise InputError("no model_type: not the config.json of a model", where=path)
    parts = {"": raw}
    for name in PARTS:
        if not isinstance(raw.get(name, {}), dict | None):
            raise InputError(f"{name} is not a JSON object", where=path)
        parts[f"{name}."] = raw.get(name) or {}
    for name, part in parts.items():
        for key, most in SIZES.items():
            values = part.get(key)
            for value in values if isinstance(values, list) else [values]:
                if value is not None and not (type(value) is int and 1 <= value <= most):
                    raise InputError(f"{name}{key} is {value!r}", where=path, fix=f"write 1 to {most:,}")
    _check_nested(raw, path)
    return raw


def _check_nested(part: dict[str, Any], path: Path) -> None:
    """Raise InputError for an impossible number anywhere: other parts and classes have other names for the same."""
    for key, value in part.items():
        if isinstance(value, dict):
            _check_nested(value, path)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and _COUNTED.search(key) and number > _MOST_COUNTED:
                raise InputError(f"{key} is {number!r}", where=path, fix=f"write at most {_MOST_COUNTED:,}")


def language_part(raw: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json: the text part of a VLM's, otherwise all of it."""
    part: dict[str, Any] = raw.get("text_config") or raw
    return part
