"""A model of ours as others want it: a plain Hugging Face directory, or the format in which LongVA was released."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lvctx.artifacts import schemas
from lvctx.artifacts.config import read_model_config
from lvctx.artifacts.manifest import Provenance
from lvctx.artifacts.store import disk_error, fingerprint, is_disk_error, link_file, read_json, sha256_file, write_json
from lvctx.artifacts.weights import Weight, read_weights, write_weights
from lvctx.errors import InputError, UsageError
from lvctx.model import llava
from lvctx.model.card import CARD
from lvctx.model.export import model_files
from lvctx.model.fit import check_shapes
from lvctx.model.load import VLM_TYPE, context_length, load_config, resolve_model
from lvctx.model.vlm import PIXELS_FILE, VLM_FILES, own_template
from lvctx.stages.convert import Report, write_converted
from lvctx.vision.grids import image_max_grids

Format = Literal["hf", "llava"]
TEMPLATE = "chat_template.jinja"


def export_model(model: str, to: Format, out: Path, *, resume: str, force: bool, report: Report) -> dict[str, Any]:
    """Write the model in that format, or go on with it; facts about it. A finished one is left as it is.

    Raises UsageError for a model that has no such form, InputError for one that is not whole or where another stands.
    """
    source = resolve_model(model)
    if out.resolve() == source.resolve():
        raise UsageError("-o is the model itself", fix="choose another directory")
    if to == "llava":
        _export_llava(source, out, resume=resume, force=force, report=report)
    else:
        _export_hf(source, out, force=force)
    return {"schema": schemas.MODEL, "path": str(out), "sha256": fingerprint(out), "format": to}


def _export_hf(source: Path, out: Path, *, force: bool) -> None:
    """Link or copy a model's files, config.json last; what stands there already is compared and left."""
    names = sorted((name for name in model_files(source) if "/" not in name), key="config.json".__eq__)
    try:
        out.mkdir(parents=True, exist_ok=True)
        standing = {name for name in names if (out / name).exists() and _same(source / name, out / name)}
        other = [p.name for p in out.iterdir() if p.name not in standing and not p.name.startswith(".")]
        if other and not force:
            raise InputError(
                f"holds {', '.join(sorted(other)[:3])}, which is not of this model",
                where=out,
                fix="choose another -o, or --force to write into it",
            )
        for name in names:
            if name not in standing:
                link_file(source / name, out / name)
    except OSError as e:
        if is_disk_error(e):
            raise disk_error(e, out) from e
        raise


def _same(a: Path, b: Path) -> bool:
    return a.samefile(b) or (a.stat().st_size == b.stat().st_size and sha256_file(a) == sha256_file(b))


def _export_llava(source: Path, out: Path, *, resume: str, force: bool, report: Report) -> None:
    config = load_config(source)
    if config.model_type != VLM_TYPE:
        raise UsageError(f"{source} is a {config.model_type} model and has no form of LLaVA's", fix="--to hf")
    raw = read_model_config(source)
    image_max_grids(config)
    flat = llava.llava_config(raw, context_length(config))
    wanted = llava.expected(config.text_config, config.vision_config)
    wanted[llava.NEWLINE] = (config.text_config.hidden_size,)
    stored = list(read_weights(source).values())
    names = llava.rename({name for shard in stored for name in shard}, to_llava=True)
    found = {names.get(name, name): weight.shape for shard in stored for name, weight in shard.items()}
    check_shapes(found, wanted, source)

    def shards() -> list[Mapping[str, Weight]]:
        return [{names[name]: weight for name, weight in shard.items()} for shard in stored]

    def finish() -> dict[str, Any]:
        _write_tower(source, raw["vision_config"], stored, out / "tower")
        not_there = {"config.json", CARD, TEMPLATE, PIXELS_FILE, *VLM_FILES}
        for name in model_files(source):
            if "/" not in name and name not in not_there and not name.startswith("model"):
                shutil.copyfile(source / name, out / name)
        if (source / TEMPLATE).is_file():
            template = (source / TEMPLATE).read_text(encoding="utf-8")
            (out / TEMPLATE).write_text(own_template(template), encoding="utf-8")
        if llava.CONFIG_5 in flat.get("configuration_files", ()):
            write_json(out / llava.CONFIG_5, llava.config_for_5(flat))
        write_json(out / "config.json", flat)
        return {"context": context_length(config)}

    made = Provenance(
        schema=schemas.MODEL, command="export", config={"to": "llava"}, inputs={"model": fingerprint(source)}
    )
    write_converted(out, made, shards=shards, finish=finish, resume=resume, force=force, report=report)


def _write_tower(source: Path, vision: dict[str, Any], shards: list[dict[str, Weight]], out: Path) -> None:
    """What LLaVA's config.json does not say of the tower; its weights too where it is none that the hub has."""
    out.mkdir(exist_ok=True)
    write_json(out / "config.json", vision)
    pixels = read_json(source / PIXELS_FILE)
    write_json(out / PIXELS_FILE, llava.pixels_of(pixels))
    if not llava.is_clip_336(vision):
        prefix = "vision_tower."
        inside = {n.removeprefix(prefix): w for shard in shards for n, w in shard.items() if n.startswith(prefix)}
        write_weights(out, [inside])
