"""Training checkpoints with torch's distributed checkpoint (DCP): complete or absent, at any number of ranks.

`checkpoint/step-N` exists only if every rank's part is complete: it is written under a temporary name, then its
MANIFEST.json with the run's identity and the hash of every file, and it is renamed by rank 0. The newest `KEEP` are
kept; one whose files differ from their hashes is not loaded but the one before. A state is copied first and written
while training continues. A checkpoint written by W ranks can be loaded by any number. The files are safetensors:
nothing is unpickled, unlike with torch's own format, whose `.metadata` is a pickle.
"""

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from lvctx.artifacts.manifest import (
    CHECKPOINTS,
    MANIFEST,
    Provenance,
    differences,
    read_manifest,
    verify_files,
    write_manifest,
)
from lvctx.artifacts.store import disk_error, fsync_directory, is_disk_error
from lvctx.errors import InputError
from lvctx.parallel.context import ParallelContext

log = logging.getLogger(__name__)

FILE_BYTES = 1 << 28
"""Approximate size of a rank's file. Each is serialized in memory before it is written."""
# DCP warns about a single process, also from its writing thread; a single process is supported here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
KEEP = 2
"""Number of complete checkpoints that are kept: the newest, and one in case it is damaged on disk."""


class Checkpoints:
    """The checkpoints of one run's output. Every rank calls every method at the same point of the run."""

    def __init__(self, out: Path, run: Provenance, world: ParallelContext) -> None:
        """Find the newest complete checkpoint, and remove the incomplete ones of a killed run.

        Raises InputError for the checkpoint of another run, and where all checkpoints are damaged.
        """
        self.folder, self.run, self.world = out / CHECKPOINTS, run, world
        self._pending: tuple[int, Future[Any]] | None = None
        newest = None
        if world.rank == 0:
            for torn in self.folder.glob(".step-*"):
                shutil.rmtree(torn, ignore_errors=True)
            newest = self._newest()
        self.saved = world.gather(newest)[0]  # on a network file system other ranks may see it later
        """Step of the newest complete checkpoint, or None."""

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _newest(self) -> int | None:
        """Step of the newest checkpoint that is as it was written, or None if there is none; newer ones are removed."""
        damaged: list[Path] = []
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                stored = read_manifest(path)
                verify_files(path, cached=False)
            except InputError as e:
                log.warning("%s; trying the checkpoint before it", e)
                damaged.append(path)
                continue
            if stored.get("config_hash") != self.run.config_hash:
                raise InputError(
                    f"holds the checkpoint of a run with other settings ({differences(stored, self.run.to_dict())})",
                    where=self.folder.parent,
                    fix="choose another -o, or --force to start over",
                )
            for newer in damaged:
                shutil.rmtree(newer)
            return int(path.name.partition("-")[2])
        if damaged:
            raise InputError("no checkpoint can be used", where=self.folder, fix="--force to start over")
        return None

    def save(self, step: int, state: dict[str, Any], *, wait: bool) -> None:
        """Write `state` (tensors and nested dicts of them) as the checkpoint of `step`; returns once it is copied.

        With `wait`, returns once it is complete. Raises InputError if writing this or the previous one fails.
        """
        self.finish()
        if self.saved != step:
            partial = self._partial(step)
            partial.mkdir(parents=True, exist_ok=True)
            with self._disk_errors():
                writer = HuggingFaceStorageWriter(
                    str(partial), _file_numbers(state, FILE_BYTES * self.world.size), save_distributed=True
                )
                if wait:
                    written: Future[Any] = Future()
                    written.set_result(dcp.save(state, storage_writer=writer, **self._group))
                else:
                    written = dcp.async_save(state, storage_writer=writer, **self._group)  # type: ignore[assignment]
            self._pending = step, _THREAD.submit(self._seal, partial, written)
        if wait:
            self.finish()
            self.world.barrier()

    def poll(self) -> None:
        """Mark the pending checkpoint as complete if it has been written."""
        if self._pending is not None and self._pending[1].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the pending checkpoint, and mark it as complete."""
        if self._pending is None:
            return
        (step, done), self._pending = self._pending, None
        with self._disk_errors():
            done.result()
        if self.world.rank == 0:
            os.replace(self._partial(step), self._path(step))
            fsync_directory(self.folder)
            for old in sorted(self.folder.glob("step-*"))[:-KEEP]:
                shutil.rmtree(old, ignore_errors=True)
        self.saved = step

    def _seal(self, partial: Path, written: Future[Any]) -> None:
        """Write the manifest once all ranks have written; in a thread, since it reads all files."""
        written.result()
        if self.world.rank == 0:
            write_manifest(partial, self.run, [path.name for path in partial.iterdir() if path.name != MANIFEST])

    def load(self, state: dict[str, Any]) -> None:
        """Fill `state` in place from the newest checkpoint."""
        assert self.saved is not None
        with self._disk_errors():
            reader = HuggingFaceStorageReader(str(self._path(self.saved)))
            dcp.load(state, storage_reader=reader, **self._group)

    def _partial(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.partial"

    @property
    def _group(self) -> dict[str, Any]:
        return {"no_dist": self.world.saving is None, "process_group": self.world.saving}

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Raise disk errors as InputError."""
        try:
            yield
        except (Exception, CheckpointException) as e:  # the latter is no Exception
            causes = [e, e.__cause__, *getattr(e, "failures", {}).values()]
            refused = next((x for c in causes if (x := _exception(c)) and is_disk_error(x)), None)
            if refused is not None:
                raise disk_error(refused, self.folder) from e
            raise


_THREAD = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")


def _file_numbers(state: dict[str, Any], file_bytes: int) -> dict[str, int]:
    """DCP's name of each tensor -> number of its file, from 1; every rank writes its part to a file of its own."""
    numbers, size, todo = {}, 0, list(state.items())
    for name, value in todo:  # grows
        if isinstance(value, Tensor):
            numbers[name] = 1 + size // file_bytes
            size += value.numel() * value.element_size()
        else:
            todo += [(f"{name}.{key}", inner) for key, inner in value.items()]
    return numbers


def _exception(cause: Any) -> BaseException | None:
    """DCP keeps each rank's failure as a pair of exception and traceback."""
    return cause[0] if isinstance(cause, tuple) else cause


def remove(out: Path) -> None:
    """Delete the checkpoints of a finished run."""
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
