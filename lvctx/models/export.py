"""Export a model for other programs: a plain Hugging Face directory, or the format in which LongVA was released."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from lvctx.artifacts import schemas
from lvctx.artifacts.bounded import read_utf8
from lvctx.artifacts.lock import only_writer
from lvctx.artifacts.manifest import MANIFEST, Provenance, read_manifest, write_manifest
from lvctx.artifacts.model_config import read_model_config
from lvctx.artifacts.result_log import short_hash
from lvctx.artifacts.store import atomic_file, fingerprint, link_file, read_json, sha256_file, write_json
from lvctx.artifacts.weights import Weight, read_weights, write_weights
from lvctx.config import OnProgress
from lvctx.errors import InputError, UsageError
from lvctx.models import llava_format as llava
from lvctx.models.card import CARD
from lvctx.models.card_metadata import CARD_FACTS, write_card, write_results
from lvctx.models.convert_config import ExportConfig
from lvctx.models.convert_stream import write_converted
from lvctx.models.loading import VLM_TYPE, context_length, load_config, resolve_model
from lvctx.models.saving import model_files
from lvctx.models.unires import image_max_grids
from lvctx.models.vlm_assembly import PIXELS_FILE, VLM_FILES, text_template
from lvctx.models.weight_check import check_shapes

TEMPLATE = "chat_template.jinja"
ADDED_FILES = frozenset({"config.json", CARD, TEMPLATE, PIXELS_FILE, *VLM_FILES})
"""Files that LLaVA's format does not have, or has in another form."""


@dataclass(frozen=True, kw_only=True)
class LlavaExport:
    """A model in the format of LLaVA's checkpoints."""

    config: dict[str, Any]
    """LLaVA's flat config.json."""
    vision_config: dict[str, Any]
    """Configuration of the vision tower."""
    shards: list[dict[str, Weight]]
    """The weights as stored."""
    names: dict[str, str]
    """Stored name -> LLaVA's name."""
    context: int
    """Context length in tokens."""


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """A checked export."""

    config: ExportConfig
    """As given."""
    source: Path
    """Resolved model directory."""
    llava: LlavaExport | None
    """For `to="llava"` only."""
    results: Sequence[EvalResult]
    """For the model card."""
    command: str
    """The command line for the model card, without local paths."""

    @property
    def facts(self) -> dict[str, Any]:
        """For the row."""
        return {"format": self.config.to or "card", "results": len(self.results)}

    @property
    def provenance(self) -> Provenance:
        """What identifies the export."""
        inputs = {"model": fingerprint(self.source)}
        if self.results:
            inputs["results"] = short_hash([vars(result) for result in self.results])
        return Provenance(schema=schemas.MODEL, command="export", config={"to": self.config.to}, inputs=inputs)


def plan_export(config: ExportConfig, command: str = "") -> ExportJob:
    """Check the model, from its headers only; `command` is the command line, without local paths, for its card.

    Raises UsageError for a model that the format does not support, InputError for an incomplete one.
    """
    source = resolve_model(config.model)
    if config.out.resolve() == source.resolve():
        raise UsageError("-o is the model's own directory", fix="choose another directory")
    llava = _plan_llava(source) if config.to == "llava" else None
    return ExportJob(config=config, source=source, llava=llava, results=(), command=command)


def _plan_llava(source: Path) -> LlavaExport:
    config = load_config(source)
    if config.model_type != VLM_TYPE:
        raise UsageError(f"{source} is a {config.model_type} model not supported by LLaVA's format", fix="--to hf")
    raw = read_model_config(source)
    image_max_grids(config)
    flat = llava.llava_config(raw, context_length(config))
    expected = llava.expected(config.text_config, config.vision_config)
    expected[llava.NEWLINE] = (config.text_config.hidden_size,)
    shards = list(read_weights(source).values())
    names = llava.rename({name for shard in shards for name in shard}, to_llava=True)
    stored = {names.get(name, name): weight.shape for shard in shards for name, weight in shard.items()}
    check_shapes(stored, expected, source)
    return LlavaExport(
        config=flat, vision_config=raw["vision_config"], shards=shards, names=names, context=context_length(config)
    )


def run_export(job: ExportJob, *, resume: str, force: bool, on_progress: OnProgress) -> dict[str, Any]:
    """Write the model in that format, or continue; returns the row of the result. A finished one is not changed.

    Raises InputError if another model is there.
    """
    out = job.config.out
    if job.config.card:
        with only_writer(out):
            _refuse_others(out, {CARD}, force=force)
            _write_own_card(job, _own_facts(job.source))
        return {"schema": schemas.MODEL, "path": str(out / CARD), "sha256": sha256_file(out / CARD), **job.facts}
    if job.llava is None:
        with only_writer(out):
            _export_hf(job, force=force)
    else:
        _export_llava(job, job.llava, resume=resume, force=force, on_progress=on_progress)
    return {"schema": schemas.MODEL, "path": str(out), "sha256": fingerprint(out), **job.facts}


def _export_hf(job: ExportJob, *, force: bool) -> None:
    """Link or copy a model's files, config.json last; existing files are compared and kept. Card and manifest follow.

    The card is the model's own, with the results added; a model without one gets one.
    """
    source, out = job.source, job.config.out
    names = sorted((name for name in model_files(source) if "/" not in name and name != CARD), key="config.json".__eq__)
    present = {name for name in names if (out / name).exists() and _same(source / name, out / name)}
    _refuse_others(out, {*present, CARD, MANIFEST}, force=force)
    for name in names:
        if name not in present:
            link_file(source / name, out / name)
    facts = _own_facts(source)
    _write_own_card(job, facts)
    write_manifest(out, job.provenance, [*names, CARD], **facts)


def _refuse_others(out: Path, kept: Collection[str], *, force: bool) -> None:
    """Raise InputError if a directory has other files."""
    other = [p.name for p in out.iterdir() if p.name not in kept and not p.name.startswith(".")]
    if other and not force:
        raise InputError(
            f"holds {', '.join(sorted(other)[:3])}, not part of this model",
            where=out,
            fix="choose another -o, or --force to write into it",
        )


def _own_facts(source: Path) -> dict[str, Any]:
    manifest = read_manifest(source) if (source / MANIFEST).is_file() else {}
    return {key: manifest[key] for key in CARD_FACTS if key in manifest}


def _write_own_card(job: ExportJob, facts: Mapping[str, Any]) -> None:
    source, out = job.source, job.config.out
    if (source / CARD).is_file():
        with atomic_file(out / CARD) as partial:
            shutil.copyfile(source / CARD, partial)
    else:
        (out / CARD).unlink(missing_ok=True)
        write_card(out, job.provenance, facts, sources=[source], command=job.command, described=source)
    if job.results:
        write_results(out, job.results)


def _same(a: Path, b: Path) -> bool:
    return a.samefile(b) or (a.stat().st_size == b.stat().st_size and sha256_file(a) == sha256_file(b))


def _export_llava(job: ExportJob, model: LlavaExport, *, resume: str, force: bool, on_progress: OnProgress) -> None:
    source, out = job.source, job.config.out

    def shards() -> list[Mapping[str, Weight]]:
        return [{model.names[name]: weight for name, weight in shard.items()} for shard in model.shards]

    def finish() -> dict[str, Any]:
        _write_tower(source, model, out / "tower")
        for name in model_files(source):
            if "/" not in name and name not in ADDED_FILES and not name.startswith("model"):
                shutil.copyfile(source / name, out / name)
        if (source / TEMPLATE).is_file():
            template = read_utf8(source / TEMPLATE)
            (out / TEMPLATE).write_text(text_template(template), encoding="utf-8")
        if llava.CONFIG_5 in model.config.get("configuration_files", ()):
            write_json(out / llava.CONFIG_5, llava.config_for_5(model.config))
        write_json(out / "config.json", model.config)
        facts = {"context": model.context}
        # transformers does not load this format.
        write_card(out, job.provenance, facts, sources=[source], command=job.command, library=None)
        if job.results:
            write_results(out, job.results)
        return facts

    write_converted(
        out, job.provenance, shards=shards, finish=finish, resume=resume, force=force, on_progress=on_progress
    )


def _write_tower(source: Path, model: LlavaExport, out: Path) -> None:
    """Write the vision tower's settings that LLaVA's config.json lacks, and its weights if it is not on the hub."""
    out.mkdir(exist_ok=True)
    write_json(out / "config.json", model.vision_config)
    pixels = read_json(source / PIXELS_FILE)
    write_json(out / PIXELS_FILE, llava.pixels_of(pixels))
    if not llava.is_clip_336(model.vision_config):
        prefix = "vision_tower."
        inside = {n.removeprefix(prefix): w for shard in model.shards for n, w in shard.items() if n.startswith(prefix)}
        write_weights(out, [inside])
