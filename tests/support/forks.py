"""Processes forked from one that has imported what training needs, so that a process costs little."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from torch.multiprocessing.spawn import start_processes

FORKS = multiprocessing.get_context("forkserver")


def ensure_running() -> None:
    FORKS.set_forkserver_preload(["support.killing"])
    # Python 3.11's fork server looks on PYTHONPATH alone for what it imports ahead.
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        forkserver.ensure_running()


def start_ranks(function: Callable[..., None], *given: Any, ranks: int) -> None:
    """Call `function(rank, *given)` in so many processes; an error in one is raised here."""
    ensure_running()
    start_processes(function, args=given, nprocs=ranks, start_method="forkserver")
