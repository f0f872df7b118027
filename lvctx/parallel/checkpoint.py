"""Training checkpoints with torch's distributed checkpoint (DCP): complete or absent, at any number of ranks.

`checkpoint/step-N` exists only if every rank's part is complete: it is written under a temporary name, together with
the run's identity, and renamed by rank 0. The newest `KEEP` are kept. A state is copied first and written while
training continues. A checkpoint written by W ranks can be loaded by any number. Nothing from the user is unpickled.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from lvctx.artifacts.manifest import Provenance, differences
from lvctx.artifacts.store import disk_error, fsync_directory, is_disk_error
from lvctx.errors import InputError
from lvctx.parallel.context import ParallelContext

FOLDER, RUN = "checkpoint", "run.json"
# DCP warns about a single process, also from its writing thread; a single process is supported here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
KEEP = 2
"""Number of complete checkpoints that are kept: the newest, and one in case it is damaged on disk."""


class Checkpoints:
    """The checkpoints of one run's output. Every rank calls every method at the same point of the run."""

    def __init__(self, out: Path, run: Provenance, world: ParallelContext) -> None:
        """Remove incomplete checkpoints of a killed run. Raises InputError for the checkpoint of another run."""
        self.folder, self.run, self.world = out / FOLDER, run, world
        self._pending: tuple[int, Future[Any]] | None = None
        self.saved = world.gather(self.newest())[0]  # on a network file system other ranks may see it later
        """Step of the newest complete checkpoint, or None."""
        if self.saved is not None:
            stored = json.loads((self._path(self.saved) / RUN).read_text(encoding="utf-8"))
            if stored["config_hash"] != run.config_hash:
                raise InputError(
                    f"holds the checkpoint of a run with other settings ({differences(stored, run.to_dict())})",
                    where=out,
                    fix="choose another -o, or --force to start over",
                )
        if world.rank == 0:
            for torn in self.folder.glob(".step-*"):
                shutil.rmtree(torn, ignore_errors=True)
        world.barrier()

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def newest(self) -> int | None:
        """Step of the newest complete checkpoint on disk, or None."""
        steps = [int(p.name.partition("-")[2]) for p in self.folder.glob("step-*")]
        return max(steps, default=None)

    def save(self, step: int, state: dict[str, Any], *, wait: bool) -> None:
        """Write `state` (tensors and nested dicts of them) as the checkpoint of `step`; returns once it is copied.

        With `wait`, returns once it is complete. Raises InputError if writing this or the previous one fails.
        """
        self.finish()
        if self.saved != step:
            partial = self._partial(step)
            partial.mkdir(parents=True, exist_ok=True)
            with self._disk_errors():
                if wait:
                    done: Future[Any] = Future()
                    done.set_result(dcp.save(state, checkpoint_id=partial, **self._group))
                else:
                    done = dcp.async_save(state, checkpoint_id=partial, **self._group)  # type: ignore[assignment]
            self._pending = step, done
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
            (self._partial(step) / RUN).write_text(json.dumps(self.run.to_dict()), encoding="utf-8")
            fsync_directory(self._partial(step))
            os.replace(self._partial(step), self._path(step))
            fsync_directory(self.folder)
            for old in sorted(self.folder.glob("step-*"))[:-KEEP]:
                shutil.rmtree(old, ignore_errors=True)
        self.saved = step

    def load(self, state: dict[str, Any]) -> None:
        """Fill `state` in place from the newest checkpoint."""
        assert self.saved is not None
        with self._disk_errors():
            dcp.load(state, checkpoint_id=self._path(self.saved), **self._group)

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
        except Exception as e:
            causes = [e, e.__cause__, *getattr(e, "failures", {}).values()]
            refused = next((x for c in causes if (x := _exception(c)) and is_disk_error(x)), None)
            if refused is not None:
                raise disk_error(refused, self.folder) from e
            raise


def _exception(cause: Any) -> BaseException | None:
    """DCP keeps each rank's failure as a pair of exception and traceback."""
    return cause[0] if isinstance(cause, tuple) else cause


def remove(out: Path) -> None:
    """Delete the checkpoints of a finished run."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)
