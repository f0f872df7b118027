"""Processes that share out independent work: who this one is, and what they tell each other at the start and the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: as long as their share of the work may take. torchrun ends all when one dies."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """All processes of a run, seen from one of them; alone, it is rank 0 of 1."""

    rank: int = 0
    """0-based; rank 0 writes and speaks."""
    size: int = 1
    """Number of processes."""
    local: int = 0
    """Number of this process on its machine: which GPU is its own."""

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks, on every one of them."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


@contextmanager
def open_ranks() -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone."""
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size(), local=dist.get_node_local_rank(0))
    finally:
        dist.destroy_process_group()
