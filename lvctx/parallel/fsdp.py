"""Parameters, gradients and optimizer state sharded over all ranks: FSDP2 (Zhao et al. 2023), layer by layer.

Master weights and accumulated gradients are float32; a layer is gathered in the type of its computation.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lvctx.artifacts.stored_tensors import read_rows
from lvctx.parallel.context import ParallelContext


def shard_model(
    model: nn.Module, layers: Iterable[nn.Module], world: ParallelContext, *, offload: bool = False
) -> None:
    """Shard `model` in place over all ranks, each of `layers` separately and the rest with `model`.

    From then on `model` must be entered through its own forward. Trained parameters become float32 here. A parameter
    that is still in its file (`lvctx.artifacts.stored_tensors`) is read here: a rank reads its own rows, one tensor
    after another, so that it never holds more of the model than its shard. `offload` keeps parameters, gradients and
    optimizer state in host memory between their uses. Without a mesh (a single process) nothing is sharded, and frozen
    parameters become float32 too if that is the type of the computation.
    """
    all_float32 = world.mesh is None and world.compute_dtype == torch.float32
    for part in (*layers, model):
        if world.mesh is not None:
            _shard(part, world, offload=offload)
            continue
        for p in part.parameters():
            if p.requires_grad or all_float32:
                p.data = p.data.float()


def _shard(part: nn.Module, world: ParallelContext, *, offload: bool) -> None:
    """Shard the parameters of `part` that are not yet sharded. FSDP gets them without values, and values of a shard."""
    originals = {n: p for n, p in part.named_parameters(remove_duplicate=False) if not isinstance(p, DTensor)}
    shapes: dict[nn.Parameter, nn.Parameter] = {}
    for name, p in originals.items():
        if p not in shapes:  # tied weights stay one parameter
            empty = torch.empty(p.shape, dtype=torch.float32 if p.requires_grad else p.dtype, device="meta")
            shapes[p] = nn.Parameter(empty, requires_grad=p.requires_grad)
        module, _, attribute = name.rpartition(".")
        setattr(part.get_submodule(module), attribute, shapes[p])
    precision = MixedPrecisionPolicy(param_dtype=world.compute_dtype, reduce_dtype=torch.float32)
    where = CPUOffloadPolicy(pin_memory=torch.device(world.device).type == "cuda") if offload else OffloadPolicy()
    fully_shard(part, mesh=world.mesh, mp_policy=precision, offload_policy=where)
    device, shards, state = "cpu" if offload else world.device, dict[nn.Parameter, nn.Parameter](), {}
    for name, p in originals.items():
        if p not in shards:
            shards[p] = _read_shard(p, part.get_parameter(name), world, device)
        state[name] = shards[p]
    part.load_state_dict(state, strict=False, assign=True)


def _read_shard(source: nn.Parameter, target: Any, world: ParallelContext, device: str) -> nn.Parameter:
    """This rank's part of `source` as a parameter like `target`, which has no values."""
    first, end = _rows(source, world.rank, world.size)
    local = read_rows(source, first, end).to(device, target.dtype, copy=True)
    whole = {"shape": target.shape, "stride": target.stride()}
    values = DTensor.from_local(local, target.device_mesh, target.placements, run_check=False, **whole)
    return nn.Parameter(values, requires_grad=source.requires_grad)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (every rank must call this); other tensors are returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def keep_in_graph(total: Tensor, *tensors: Tensor) -> Tensor:
    """`total` unchanged, with `tensors` added to its graph with zero gradient.

    A rank's part of a row may hold no counted token. It must still go through the backward pass, where the others wait
    for its keys and for its share of each parameter's gradient.
    """
    return total + sum(t.flatten()[:0].sum() for t in tensors)


@contextmanager
def gathering(model: nn.Module, world: ParallelContext) -> Iterator[Callable[[Tensor], Tensor] | None]:
    """On rank 0 a function that returns the full tensor of a parameter, on the CPU.

    A tensor that is not sharded is unchanged, or read from its file (`lvctx.artifacts.stored_tensors`).

    Other ranks get None once rank 0 leaves the context, and until then send their parts of what it asks for, through
    host memory. Only rank 0 ever holds a full tensor, one at a time.
    """
    parameters = list(model.parameters())
    if world.rank:
        wanted: Iterator[int] = world.follow(())
        for number in wanted:
            world.send(_local(parameters[number]))
        yield None
        return
    numbers: dict[Tensor, int] = {parameter: i for i, parameter in enumerate(parameters)}

    def gather(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return read_rows(tensor, 0, len(tensor)) if tensor.ndim else tensor.detach()
        world.announce([numbers[tensor]])
        full = torch.empty(tensor.shape, dtype=tensor.dtype)
        for rank in range(world.size):
            part = full[slice(*_rows(tensor, rank, world.size))]
            if rank == 0:
                part.copy_(_local(tensor))
            else:
                world.receive(part, rank)
        return full

    try:
        yield gather
    finally:
        world.announce([])


def _rows(tensor: Tensor, rank: int, ranks: int) -> tuple[int, int]:
    """First and last + 1 of a rank's rows: FSDP cuts the first axis as torch.chunk."""
    rows = -(-len(tensor) // ranks)
    return min(rank * rows, len(tensor)), min((rank + 1) * rows, len(tensor))


def _local(parameter: Any) -> Tensor:
    """This rank's rows of a sharded parameter, on the CPU."""
    return parameter.detach().to_local().cpu()
