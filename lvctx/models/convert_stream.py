"""Write a converted model: shard by shard, each complete or absent; configuration and manifest last."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lvctx.artifacts.lock import LOCK
from lvctx.artifacts.manifest import MANIFEST, STARTED, Provenance, listed_files, open_output, write_manifest
from lvctx.artifacts.store import read_json, write_json
from lvctx.artifacts.weights import Weight, write_weights
from lvctx.config import OnProgress
from lvctx.errors import InputError
from lvctx.models.saving import model_files


def write_converted(
    out: Path,
    provenance: Provenance,
    *,
    shards: Callable[[], list[Mapping[str, Weight]]],
    finish: Callable[[], Mapping[str, Any]],
    resume: str,
    force: bool,
    on_progress: OnProgress,
) -> None:
    """Write a model directory, or continue one; a finished one is not changed.

    `shards` returns the weights to write; `finish` writes everything but the weights and returns facts for the
    manifest. Raises InputError if another model is there, unless `force`.
    """
    with open_output(out, provenance, resume=resume, force=force) as unfinished:
        if not unfinished:
            return
        started = out / STARTED
        stored_hash = read_json(started).get("config_hash") if started.is_file() else None
        if force or resume == "never" or stored_hash != provenance.config_hash:
            _clear(out, force=force)
            write_json(started, provenance.to_dict())
        write_weights(out, shards(), on_progress=on_progress)
        facts = finish()
        nested = [
            f"{folder.name}/{name}" for folder in out.iterdir() if folder.is_dir() for name in model_files(folder)
        ]
        write_manifest(out, provenance, [*model_files(out), *nested], **facts)
        started.unlink(missing_ok=True)


def _clear(out: Path, *, force: bool) -> None:
    """Remove what an earlier conversion wrote. Raises InputError if other files are there."""
    ours = (out / STARTED).is_file() or (out / MANIFEST).is_file()
    if not ours and not force and any(p.name != LOCK for p in out.iterdir()):
        raise InputError("already holds files", where=out, fix="choose another -o, or --force to write into it")
    if (out / MANIFEST).is_file():
        names = listed_files(out)
        (out / MANIFEST).unlink()
        for name in names:
            (out / name).unlink(missing_ok=True)
    for weights in out.glob("model*.safetensors*"):
        weights.unlink()
