"""The ranks of a run: data parallel x context parallel on one DeviceMesh, their collectives, and their errors.

Ranks of a CP group have the same sample, each a part of it; DP groups have different samples. For one process all of
this is the identity, so one process runs the same code as eight GPUs.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lvctx.device import CpKind, Dtype, resolve_device, resolve_dtype
from lvctx.errors import EXIT_INTERRUPTED, EXIT_STOPPED, InputError, LvctxError, Stopped, UsageError, memory_errors
from lvctx.parallel.ring_attention import ALONE, Ring

log = logging.getLogger(__name__)
ValueT = TypeVar("ValueT")
STEP_TIMEOUT = timedelta(minutes=10)
"""Timeout of a collective in training: longer than a first step at the longest sequences, below torch's 30 minutes."""
SHARED_WORK_TIMEOUT = timedelta(days=7)
"""Timeout where ranks divide independent work: as long as the largest share, or the wait for a user's next question.
torchrun ends all processes when one dies."""


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """All ranks of a run, as known to one of them."""

    device: str
    """Device of this rank, e.g. `cuda:3`."""
    rank: int = 0
    """0-based; rank 0 writes files and output."""
    size: int = 1
    """Number of ranks: dp x cp."""
    cp: int = 1
    """Ranks that share a sample."""
    ring: Ring = ALONE
    """This rank's index among those."""
    compute_dtype: torch.dtype = torch.float32
    """Type of a training's matrix products."""
    mesh: Any = None
    """DeviceMesh over all ranks (one dimension), over which parameters are sharded; None for a single process."""
    control: Any = None
    """CPU process group for flags, separate from the gradients' collectives."""
    saving: Any = None
    """CPU process group for checkpoints, which another thread writes concurrently."""

    def autocast(self) -> torch.autocast:
        """Compute matrix products in `compute_dtype`; nothing for float32."""
        kind, enabled = torch.device(self.device).type, self.compute_dtype != torch.float32
        return torch.autocast(kind, self.compute_dtype if enabled else None, enabled=enabled)

    @property
    def dp(self) -> int:
        """Number of groups that have different samples."""
        return self.size // self.cp

    @property
    def dp_rank(self) -> int:
        """Index of this rank's group."""
        return self.rank // self.cp

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        """Largest over all ranks."""
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, operation, group=self.control)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def follow(self, values: Iterable[ValueT]) -> Iterator[ValueT]:
        """Rank 0's values, on every rank; the `values` of other ranks are not used."""
        if self.size == 1:
            yield from values
            return
        source = iter(values)
        while True:
            box = [list(islice(source, 1)) if self.rank == 0 else None]
            dist.broadcast_object_list(box, group=self.control)
            if not box[0]:
                return
            yield box[0][0]

    def announce(self, value: list[Any]) -> None:
        """From rank 0, give one value to the ranks that `follow`, or end their iteration by an empty list."""
        if self.size > 1:
            dist.broadcast_object_list([value], group=self.control)

    def send(self, tensor: Tensor) -> None:
        """Give a tensor in host memory to rank 0, which must `receive` it."""
        if tensor.numel():
            dist.send(tensor, 0, group=self.control)

    def receive(self, into: Tensor, rank: int) -> None:
        """Fill a tensor in host memory with the one that `rank` sends."""
        if into.numel():
            dist.recv(into, rank, group=self.control)

    def add_up(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum([0.0])


def make_context(
    *, device: str, cp: int, cp_kind: CpKind = "ring", dtype: Dtype = "auto", timeout: timedelta = STEP_TIMEOUT
) -> ParallelContext:
    """The context of an initialised process group, or of a single process.

    Raises UsageError where `cp` does not divide the number of processes, and for another kind than `ring` without it.
    """
    if cp == 1 and cp_kind != "ring":
        raise UsageError(f"--cp-kind {cp_kind} has no effect with --cp 1", fix="raise --cp, or drop it")
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size % cp:
        raise UsageError(
            f"--cp {cp} does not divide the run's {size} process{'es' if size > 1 else ''}",
            fix=f"start it with `torchrun --nproc-per-node {cp} -m lvctx ...`",
        )
    compute_dtype = getattr(torch, resolve_dtype(dtype, torch.device(device).type))
    if not dist.is_initialized():
        return ParallelContext(device=device, compute_dtype=compute_dtype)
    kind = torch.device(device).type
    groups = init_device_mesh(kind, (size // cp, cp), mesh_dim_names=("dp", "cp"))
    ring = Ring(rank=groups.get_local_rank("cp"), world=cp, group=groups["cp"].get_group(), kind=cp_kind)
    mesh: DeviceMesh = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    control, saving = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return ParallelContext(
        device=device,
        rank=dist.get_rank(),
        size=size,
        cp=cp,
        ring=ring,
        compute_dtype=compute_dtype,
        mesh=mesh,
        control=control,
        saving=saving,
    )


@contextmanager
def open_context(
    *,
    device: str,
    cp: int = 1,
    cp_kind: CpKind = "ring",
    dtype: Dtype = "auto",
    sharded: bool = False,
    timeout: timedelta = STEP_TIMEOUT,
) -> Iterator[ParallelContext]:
    """The process group that torchrun started this process in, or this single process; closed at the end.

    `device` and `dtype` may be `auto` (`lvctx.device`). `sharded` creates a process group, and so a mesh, for a single
    process too. `timeout` is how long a rank waits for another. An error on one rank is raised on the others instead of
    a lost connection.
    """
    device = resolve_device(device)
    if not under_torchrun() and not sharded:
        yield make_context(device=device, cp=cp, cp_kind=cp_kind, dtype=dtype)
        return
    backend = "gloo"
    if torch.device(device).type == "cuda":
        device = f"cuda:{dist.get_node_local_rank(0)}"
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if under_torchrun():
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with propagate_errors():
            yield make_context(device=device, cp=cp, cp_kind=cp_kind, dtype=dtype, timeout=timeout)
    finally:
        # Closing may fail when other ranks have ended; the run's own error is more useful than that failure.
        with suppress(RuntimeError):
            dist.destroy_process_group()


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


@contextmanager
def joined(store: Path, *, rank: int, size: int) -> Iterator[None]:
    """A CPU process group of processes on this machine that share a file."""
    dist.init_process_group("gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def propagate_errors() -> Iterator[None]:
    """Raise the error of the first rank that failed on every rank, instead of the lost connections that follow it."""
    store = dist.distributed_c10d._get_default_store()
    try:
        with memory_errors():
            yield
    except BaseException as e:
        if isinstance(e, UsageError):  # flags are the same on every rank, and so are their errors
            raise
        try:
            first = store.add("lvctx/failures", 1) == 1
            if first:
                store.set("lvctx/failure", json.dumps(_describe(e)))
            else:
                store.wait(["lvctx/failure"], timedelta(seconds=5))
            origin = json.loads(store.get("lvctx/failure"))
        except RuntimeError:  # the store ended with its owner
            raise e from None
        if first or isinstance(e, LvctxError | Stopped | KeyboardInterrupt):
            raise
        raise _error(origin) from e


def _describe(e: BaseException) -> dict[str, Any]:
    codes = {Stopped: EXIT_STOPPED, KeyboardInterrupt: EXIT_INTERRUPTED}
    code = e.exit_code if isinstance(e, LvctxError) else codes.get(type(e), 1)
    return {"rank": dist.get_rank(), "code": code, "what": str(e) if code != 1 else f"{type(e).__name__}: {e}"}


def _error(origin: dict[str, Any]) -> BaseException:
    if origin["code"] == EXIT_STOPPED:
        return Stopped()
    if origin["code"] == EXIT_INTERRUPTED:
        return KeyboardInterrupt()
    error = InputError(origin["what"], where=f"rank {origin['rank']}")
    error.exit_code = origin["code"]
    return error
