"""Provenance: which command, configuration, inputs and seed made an artifact, and whether it is finished.

A safetensors artifact carries it under the one metadata key `lvctx`; a directory carries it in MANIFEST.json, written
last, so a directory without one is unfinished. No wall-clock time and no host name: equal inputs give equal bytes.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvctx import __version__
from lvctx.artifacts.lock import LOCK, only_writer
from lvctx.artifacts.store import read_json, read_safetensors_header, read_sha256, sha256_file, write_json
from lvctx.errors import InputError

MANIFEST, VERIFIED = "MANIFEST.json", ".verified.json"
STARTED, CHECKPOINTS = ".started.json", "checkpoint"
"""What only an unfinished output has: the identity of its run, and a training's checkpoints."""


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
            f"no {MANIFEST}: not an lvctx artifact, or unfinished", where=directory, fix="run its command again"
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


def listed_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Files of a finished directory by name, with their `bytes` and `sha256`; none where it has no manifest.

    Raises InputError for a manifest that does not list files of this directory.
    """
    if not (directory / MANIFEST).is_file():
        return {}
    files = read_manifest(directory).get("files", {})
    for name, stored in files.items() if isinstance(files, dict) else [("", None)]:
        inside = name and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or not isinstance(stored, dict) or not {"bytes", "sha256"} <= stored.keys():
            raise InputError(f"no list of files ({name!r})", where=directory / MANIFEST, fix=AGAIN)
    return files


AGAIN = "write the artifact again: its command with --force, or delete it first"
"""What to do about a damaged artifact."""


def check_sizes(directory: Path) -> None:
    """Raise InputError for a file of a finished directory that is missing or has another size than it was given."""
    for name, stored in listed_files(directory).items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != stored["bytes"]:
            what = "missing" if size is None else f"{size} bytes instead of {stored['bytes']}"
            raise InputError(f"damaged: {what}", where=path, fix=AGAIN)


def verify_files(directory: Path, *, cached: bool = True) -> int:
    """Compare a finished directory's files with the hashes in its manifest; returns the number of files.

    With `cached`, a file with the inode, size and time at which it was last found correct is not read again;
    `.verified.json` in the directory has them, where it can be written. Raises InputError for the first file that
    differs.
    """
    check_sizes(directory)
    files = listed_files(directory)
    memory = directory / VERIFIED
    before = read_json(memory) if cached and memory.is_file() else {}
    after = {}
    for name, stored in files.items():
        path = directory / name
        state = path.stat()
        after[name] = [state.st_ino, state.st_size, state.st_mtime_ns, stored["sha256"]]
        if before.get(name) != after[name] and read_sha256(path) != stored["sha256"]:
            raise InputError("damaged: its bytes are not those that were written", where=path, fix=AGAIN)
    if cached and after != before:
        with suppress(InputError):  # a directory that cannot be written is read again next time
            write_json(memory, after)
    return len(files)


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
    if target.is_dir():
        check_sizes(target)
        _remove_leftovers(target)
    return True


@contextmanager
def open_output(out: Path, provenance: Provenance, *, resume: str = "auto", force: bool = False) -> Iterator[bool]:
    """Hold the lock of an output directory that is not finished; yields whether there is anything to do.

    Raises InputError if another process is writing there, and what `is_finished` raises.
    """
    if is_finished(out, provenance, resume=resume, force=force):
        yield False
        return
    with only_writer(out):
        # Another process may have finished it between the first look and the lock.
        yield not is_finished(out, provenance, resume=resume, force=force)


def _remove_leftovers(out: Path) -> None:
    """Remove from a finished output what a process that was killed right after writing the manifest has left."""
    if not any((out / name).exists() for name in (LOCK, STARTED, CHECKPOINTS)):
        return
    with suppress(InputError), only_writer(out):  # another process is writing, or the disk is read-only
        (out / STARTED).unlink(missing_ok=True)
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


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
