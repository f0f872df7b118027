"""The model card of a directory that lvctx wrote: the hub's metadata, what the model was made from, and how.

Metadata: huggingface.co/docs/hub/model-cards. A card depends on the model, its provenance and the cards of its bases
alone; it has no clock and no path.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lvctx.artifacts.bounded import read_utf8
from lvctx.artifacts.manifest import Provenance
from lvctx.artifacts.model_config import read_model_config
from lvctx.artifacts.store import atomic_file
from lvctx.errors import library_errors
from lvctx.models.card import CARD, POSITIONS, VISION, read_section, write_section

TAG = "lvctx"
"""Tag of every card that this module wrote."""
BASES, PROVENANCE, EVALUATION = "Base models", "Provenance", "Evaluation"
HUB_ID = re.compile(r"([\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
CARD_FACTS = {
    "tokens": "tokens in the loss",
    "context": "context, tokens",
    "original_context": "context before",
    "original_length": "pretrained length",
    "trained_length": "longest text trained on",
    "longest_sample": "longest sample with images trained on",
}
"""Facts of a manifest that a card has, and their names in it."""
MOST_CARD = 1 << 20
"""Bound of a card in bytes."""


@dataclass(frozen=True, kw_only=True)
class CardSource:
    """A model that another one was made from, as its card describes it."""

    id: str | None
    """Id on the hub; None for a local directory."""
    metadata: Mapping[str, Any]
    """Metadata of its card; empty if it has none that can be read."""
    text: str
    """Its card without the metadata, if lvctx wrote it."""
    architecture: str
    """Class in config.json, or its model_type."""

    @property
    def base_models(self) -> list[str]:
        """Hub ids that the metadata of a derived model name."""
        named = [self.id] if self.id else _texts(self.metadata.get("base_model")) if self.text else []
        return [name for name in named if HUB_ID.fullmatch(name)]


def hub_id(directory: Path) -> str | None:
    """The id of a model that was downloaded from the hub, from the name of its snapshot in the hub's cache."""
    folder = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not folder.startswith("models--"):
        return None
    return folder.removeprefix("models--").replace("--", "/")


def read_card_source(directory: Path) -> CardSource:
    """What a resolved model directory contributes to the card of a model made from it."""
    config = read_model_config(directory)
    metadata, text = read_card(directory)
    license = config.get("license")
    return CardSource(
        id=hub_id(directory),
        metadata={**({"license": license} if isinstance(license, str) else {}), **metadata},
        text=text if TAG in _texts(metadata.get("tags")) else "",
        architecture=_architecture(config),
    )


def read_card(directory: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card; both are empty if there is no card with readable metadata."""
    try:
        content = read_utf8(directory / CARD, most=MOST_CARD).removeprefix("\ufeff")
        if content.startswith("---"):
            card = ModelCard(content, ignore_metadata_errors=True)
            return card.data.to_dict(), card.text
    except Exception:  # a card of others: its YAML may be malformed in any way, and the model is usable without it
        pass
    return {}, ""


def write_card(
    out: Path,
    provenance: Provenance,
    facts: Mapping[str, Any],
    *,
    sources: Sequence[Path],
    datasets: Any = (),
    command: str = "",
    library: str | None = "transformers",
    described: Path | None = None,
) -> None:
    """Write the card of the model in `out` or `described`, keeping the sections on positions and images that are there.

    `facts` are those of the manifest, `sources` the model directories it was made from, `datasets` the hub's datasets
    that it was trained on (a list of texts if it is valid), `command` the command that made it, without local paths.
    `library` loads it.
    """
    config, bases = read_model_config(described or out), [read_card_source(path) for path in sources]
    ids = _unique(name for base in bases for name in base.base_models)
    used = _unique(name for base in bases if base.text for name in _texts(base.metadata.get("datasets")))
    used = [name for name in _unique([*used, *_texts(list(datasets))]) if HUB_ID.fullmatch(name)]
    is_vlm = "vision_config" in config or "mm_vision_tower" in config
    data = ModelCardData(
        base_model=ids[0] if len(ids) == 1 else ids or None,
        base_model_relation="finetune" if ids else None,
        **_license(bases),
        datasets=used or None,
        language=_unique(name for base in bases for name in _texts(base.metadata.get("language"))) or None,
        library_name=library,
        pipeline_tag="video-text-to-text" if is_vlm else "text-generation",
        tags=[TAG, "long-context", *(["image-text-to-text"] if is_vlm else [])],
    )
    name = ids[0].partition("/")[2] if ids else _architecture(config)
    title = f"{name}, {facts['context']:,} tokens" if isinstance(facts.get("context"), int) else name
    path = out / CARD
    there = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    history = [section for base in bases if (section := read_section(base.text, PROVENANCE)[0])]
    step = "\n\n".join([*history, _step(provenance, facts, command)])
    parts = [
        f"# {escape_markdown(title)}\n\n{escape_markdown(_architecture(config))}, "
        f"written by lvctx {provenance.to_dict()['version']}.",
        *([f"## {BASES}\n\n{_base_table(bases)}"] if bases else []),
        f"## {PROVENANCE}\n\n{step}",
        *(f"## {heading}\n\n{body}" for heading in (POSITIONS, VISION) if (body := read_section(there, heading)[0])),
    ]
    with atomic_file(path) as partial:
        metadata = data.to_yaml(line_break="\n")
        partial.write_text("\n\n".join([f"---\n{metadata}\n---", *parts]) + "\n", encoding="utf-8")


def write_results(out: Path, results: Sequence[EvalResult]) -> None:
    """Add results to the card in `out`: as the hub's `model-index`, and as a table."""
    content = read_utf8(out / CARD, most=MOST_CARD).removeprefix("\ufeff")
    with library_errors("unreadable metadata", where=out / CARD, fix="correct the card of the model"):
        card: Any = ModelCard(content if content.startswith("---") else f"---\n\n---\n{content}")
    name = re.search("^# (.+)$", card.text, re.MULTILINE)
    data = card.data
    data.model_name = data.model_name or (name[1] if name else "model")
    data.eval_results = [*(data.eval_results or []), *results]
    rows = [(r.dataset_name, r.metric_name or r.metric_type, r.metric_value) for r in results]
    with atomic_file(out / CARD) as partial:
        partial.write_text(str(card), encoding="utf-8")
    write_section(out, EVALUATION, markdown_table(("test", "metric", "value"), rows) + "\n")


def _step(provenance: Provenance, facts: Mapping[str, Any], command: str) -> str:
    """A command, its resolved configuration and what it found out, as Markdown."""
    config = dict(provenance.config.get("stages", [provenance.config])[-1])
    config |= config.pop("training", {})
    rows = [(key.replace("_", " "), value) for key, value in config.items() if value is not None and value != ()]
    rows += [
        (name, facts[key]) for key, name in CARD_FACTS.items() if key not in config and isinstance(facts.get(key), int)
    ]
    # A fence that no run of backticks in the command can close.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    shown = f"{fence}sh\n{command}\n{fence}\n\n" if command else ""
    return f"### {provenance.command}\n\n{shown}" + markdown_table(("setting", "value"), rows)


def _base_table(bases: Sequence[CardSource]) -> str:
    """Each base with its licence; those of its own bases for a local model that lvctx wrote."""
    lines = []
    for base in bases:
        metadata = base.metadata
        licence = _texts(metadata.get("license_name")) or _texts(metadata.get("license")) or ["not stated"]
        name = escape_markdown(base.id or base.architecture)
        link = f"[{name}](https://huggingface.co/{base.id})" if base.id else name
        own = [] if base.id else read_section(base.text, BASES)[0].splitlines()[2:]
        lines += own or [f"| {link} | {escape_markdown(', '.join(licence))} |"]
    return "\n".join(["| model | licence |", "|---|---|", *_unique(lines)])


def _license(bases: Sequence[CardSource]) -> dict[str, Any]:
    """The licence metadata that all bases state alike; none where they differ or one states none."""
    stated = []
    for base in bases:
        keys = ("license", "license_name", "license_link")
        one = {key: texts[0] for key in keys if len(texts := _texts(base.metadata.get(key))) == 1}
        link = one.get("license_link", "")
        if base.id and link and ":" not in link:
            one["license_link"] = f"https://huggingface.co/{base.id}/blob/main/{link}"
        stated.append(one)
    return stated[0] if stated and all(one == stated[0] and "license" in one for one in stated) else {}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of any values: text is escaped, numbers have separators, other values are JSON."""
    lines = [f"| {' | '.join(map(_cell_text, cells))} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def _cell_text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return escape_markdown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def escape_markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", " ".join(text.split()))


def _architecture(config: Mapping[str, Any]) -> str:
    return (_texts(config.get("architectures")) or [str(config["model_type"])])[0]


def _texts(value: Any) -> list[str]:
    """A value of metadata that is a text or a list of texts; empty for anything else."""
    values = value if isinstance(value, list) else [value]
    return values if all(isinstance(one, str) and one for one in values) else []


def _unique(values: Any) -> list[str]:
    return list(dict.fromkeys(values))
