"""Checks that a checkpoint has exactly the tensors of its model; every load in the project ends with this check.

transformers initialises missing tensors at random and drops unknown ones, with at most a warning.
Tied weights need not be stored twice, and buffers in old checkpoints are computed from the configuration.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lvctx.errors import InputError

Shape = tuple[int, ...]
DERIVED = re.compile(r"(rotary_emb\.inv_freq|position_ids|attention\.masked_bias)$")
"""Buffers in old checkpoints that are computed from the configuration."""
LAYER = re.compile(r"(.*\.)?(?:layers|blocks|h)\.(\d+)\.(.*)")
"""A tensor of a numbered layer: prefix, number, name inside."""


def check_names(
    missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple[str, Shape, Shape]], where: object
) -> None:
    """Raise InputError, naming them, for missing or unknown tensors and those with another shape.

    `mismatched` are names with the stored shape and the model's.
    """
    problems, wrong = [], sorted(mismatched)
    if lacking := sorted(missing):
        problems.append(f"lacks {listed(lacking)}")
    if unknown := sorted(name for name in unexpected if not DERIVED.search(name)):
        problems.append(f"holds {listed(unknown)}, which no model of this configuration has")
    if wrong:
        stored, expected = (list(shape) for shape in wrong[0][1:])
        problems.append(f"{listed([name for name, _, _ in wrong])}: {stored}, but the configuration has {expected}")
    if problems:
        fix = "download or save it again" if problems[0].startswith("lacks") and not unknown else ""
        raise InputError(
            "; ".join(problems), where=where, fix=fix or "is config.json of another model? (num_hidden_layers, names)"
        )


def check_shapes(stored: Mapping[str, Shape], expected: Mapping[str, Shape], where: object) -> None:
    """`check_names` by the shapes of the stored tensors and of the model's."""
    both = stored.keys() & expected.keys()
    mismatched = [(name, tuple(stored[name]), tuple(expected[name])) for name in both if stored[name] != expected[name]]
    check_names(expected.keys() - stored.keys(), stored.keys() - expected.keys(), mismatched, where)


def check_loaded(model: Any, loading_info: Mapping[str, Any], stored: Iterable[str], where: object) -> None:
    """`check_names` after `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)`.

    Some classes of transformers ignore tensors by name (`_keys_to_ignore_on_load_unexpected`): heads for multi-token
    prediction, which it does not compute. These may include a whole layer not counted in num_hidden_layers, so a layer
    built like the model's own is searched for in `stored`, the names in the checkpoint.
    """
    mismatched = [(name, tuple(a), tuple(b)) for name, a, b in loading_info["mismatched_keys"]]
    unexpected = set(loading_info["unexpected_keys"]) | _uncounted_layers(model, stored)
    check_names(loading_info["missing_keys"], unexpected, mismatched, where)


def _uncounted_layers(model: Any, stored: Iterable[str]) -> set[str]:
    """Stored tensors of layers that the model lacks, if each has a counterpart in a layer of the model."""
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    model_layers: dict[str, set[str]] = {}
    for name in model.state_dict() if patterns else ():
        if match := LAYER.fullmatch(name):
            model_layers.setdefault(match[2], set()).add(match[3])
    ignored: dict[str, dict[str, str]] = {}
    for name in stored:
        match = LAYER.fullmatch(name)
        if match and match[2] not in model_layers and any(pattern.search(name) for pattern in patterns):
            ignored.setdefault(match[2], {})[match[3]] = name
    alike = [layer for layer in ignored.values() if any(layer.keys() <= names for names in model_layers.values())]
    return {name for layer in alike for name in layer.values()}


def listed(names: list[str]) -> str:
    """The first eight names, and the number of the others."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
