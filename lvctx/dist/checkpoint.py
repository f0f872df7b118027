"""Training checkpoints through torch's distributed checkpoint (DCP): whole or absent, and never a pickle of the user's.

`save` writes beside the target and renames, so a directory named `checkpoint` is always complete.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from lvctx.artifacts.store import disk_error, fsync_directory, is_disk_error

CHECKPOINT = "checkpoint"


@contextmanager
def _alone() -> Iterator[None]:
    """DCP warns that a single process is a single process; that is what we asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def save(state: dict[str, Any], directory: Path) -> None:
    """Replace `directory/checkpoint` by `state` (tensors and nested dicts of them)."""
    target, partial, old = (directory / name for name in (CHECKPOINT, ".checkpoint.partial", ".checkpoint.old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _alone():
            dcp.save(state, checkpoint_id=partial, no_dist=True)
    except Exception as e:
        shutil.rmtree(partial, ignore_errors=True)
        cause = e.__cause__ or e
        if is_disk_error(cause):
            raise disk_error(cause, target) from e
        raise
    # A directory cannot replace another in one step: the old one steps aside, and `find` knows where it went.
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    fsync_directory(directory)
    shutil.rmtree(old, ignore_errors=True)


def find(directory: Path) -> Path | None:
    """The complete checkpoint in `directory`, if there is one (`.old` where a kill fell between two renames)."""
    return next((p for name in (CHECKPOINT, ".checkpoint.old") if (p := directory / name).is_dir()), None)


def load(state: dict[str, Any], found: Path) -> None:
    """Fill `state` in place from a checkpoint that `find` gave."""
    with _alone():
        dcp.load(state, checkpoint_id=found, no_dist=True)


def remove(directory: Path) -> None:
    """Delete the checkpoint of a finished run."""
    for name in (CHECKPOINT, ".checkpoint.partial", ".checkpoint.old"):
        shutil.rmtree(directory / name, ignore_errors=True)
