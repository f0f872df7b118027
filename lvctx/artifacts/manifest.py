"""Provenance: which command, configuration, inputs and seed made an artifact, and whether it is finished.

A safetensors artifact carries it under the one metadata key `lvctx`; a directory carries it in MANIFEST.json, written
last, so a directory without one is unfinished. No wall-clock time and no host name: equal inputs give equal bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvctx import __version__
from lvctx.artifacts.store import read_json, read_safetensors_header, sha256_file, write_json
from lvctx.errors import InputError

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What decided an artifact's bytes."""

    schema: str
    """One of `lvctx.artifacts.schemas`, e.g. `lvctx.frames/1`."""
    command: str
    """The command that wrote it, e.g. `encode-video`."""
    config: Mapping[str, Any]
    """Every resolved option that changes the result; JSON values only, no paths of outputs."""
    inputs: Mapping[str, str]
    """Role of each input (`model`, `video`, ...) -> its fingerprint (`store.fingerprint`)."""
    seed: int = 0

    @property
    def config_hash(self) -> str:
        """Hex SHA-256 over command, configuration, inputs and seed."""
        decided = {
            "schema": self.schema,
            "command": self.command,
            "config": dict(self.config),
            "inputs": dict(self.inputs),
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The JSON form stored in artifacts."""
        return {
            "schema": self.schema,
            "version": __version__,
            "command": self.command,
            "config": dict(self.config),
            "config_hash": self.config_hash,
            "inputs": dict(self.inputs),
            "seed": self.seed,
        }

    def to_metadata(self, **facts: Any) -> dict[str, str]:
        """The safetensors metadata: the single key `lvctx` holding compact JSON, with facts found while writing."""
        return {"lvctx": json.dumps({**self.to_dict(), **facts}, sort_keys=True, separators=(",", ":"))}


def read_provenance(path: Path) -> dict[str, Any] | None:
    """Provenance of an artifact (safetensors file or directory), or None if it is unfinished or not ours."""
    if path.is_dir():
        manifest = path / MANIFEST
        return read_manifest(path) if manifest.is_file() else None
    if not path.is_file():
        return None
    raw = read_safetensors_header(path).get("__metadata__", {}).get("lvctx")
    return json.loads(raw) if raw else None


def read_manifest(directory: Path) -> dict[str, Any]:
    """MANIFEST.json of a finished artifact directory. Raises InputError if it is missing or not JSON."""
    path = directory / MANIFEST
    if not path.exists():
        raise InputError(
            f"no {MANIFEST}: not an artifact of ours, or unfinished",
            where=directory,
            fix="run its command again",
        )
    try:
        return read_json(path)
    except InputError as e:
        raise InputError(f"unreadable {MANIFEST} ({e.what})", where=directory, fix="write the artifact again") from e


def write_manifest(directory: Path, provenance: Provenance, files: list[str], **facts: Any) -> None:
    """Finish a directory: hash `files` (names relative to it), then write MANIFEST.json with `facts` beside them."""
    listed = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)}
        for name in sorted(files)
    }
    write_json(directory / MANIFEST, {**provenance.to_dict(), **facts, "files": listed})


def is_finished(target: Path, provenance: Provenance, *, resume: str = "auto", force: bool = False) -> bool:
    """Whether `target` already is this run's finished artifact, so that there is nothing to do.

    `resume` is `auto` (use an existing artifact), `never` or `must`. Raises InputError when another run's finished
    artifact exists there (naming what differs) or when `must` finds nothing; `force` is to overwrite instead.
    """
    existing = read_provenance(target) if target.exists() and not force else None
    if existing is None:
        if resume == "must" and not target.exists():
            raise InputError("nothing to resume", where=target, fix="drop --resume must")
        return False
    if existing.get("config_hash") != provenance.config_hash:
        raise InputError(
            f"holds another run's output ({differences(existing, provenance.to_dict())})",
            where=target,
            fix="choose another -o, or --force to overwrite it",
        )
    if resume == "never":
        raise InputError("is finished already", where=target, fix="drop --resume never, or --force to redo it")
    return True


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two provenances, as `key: old -> new` pairs."""
    changes = []
    for group in ("schema", "command", "config", "inputs", "seed"):
        a, b = old.get(group), new.get(group)
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys()):
                if a.get(key) != b.get(key):
                    short = [str(v)[:12] if group == "inputs" else v for v in (a.get(key), b.get(key))]
                    changes.append(f"{key}: {short[0]} -> {short[1]}")
        elif a != b:
            changes.append(f"{group}: {a} -> {b}")
    return ", ".join(changes)
