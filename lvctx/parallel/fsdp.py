"""Parameters, gradients and optimizer state sharded over all ranks: FSDP2 (Zhao et al. 2023), layer by layer.

Master weights and accumulated gradients are float32; a layer is gathered in the type of its computation.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lvctx.parallel.context import ParallelContext


def shard_model(
    model: nn.Module,
    layers: Iterable[nn.Module],
    world: ParallelContext,
    *,
    offload: bool = False,
) -> None:
    """Shard `model` in place over all ranks, each of `layers` separately and the rest with `model`.

    From then on `model` must be entered through its own forward. Trained parameters become float32 here, a layer at a
    time, so that no rank ever holds the whole model in float32. `offload` keeps parameters, gradients and optimizer
    state in host memory between their uses. Without a mesh (a single process) nothing is sharded, and frozen parameters
    become float32 too if that is the type of the computation.
    """
    precision = MixedPrecisionPolicy(param_dtype=world.compute_dtype, reduce_dtype=torch.float32)
    all_float32 = world.mesh is None and world.compute_dtype == torch.float32
    where = CPUOffloadPolicy(pin_memory=torch.device(world.device).type == "cuda") if offload else OffloadPolicy()
    for part in (*layers, model):
        for p in part.parameters():
            if (p.requires_grad or all_float32) and not isinstance(p, DTensor):
                p.data = p.data.float()
        if world.mesh is not None:
            fully_shard(part, mesh=world.mesh, mp_policy=precision, offload_policy=where)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (every rank must call this); other tensors are returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def keep_in_graph(total: Tensor, *tensors: Tensor) -> Tensor:
    """`total` unchanged, with `tensors` added to its graph with zero gradient.

    A rank's part of a row may hold no counted token. It must still go through the backward pass, where the others wait
    for its keys and for its share of each parameter's gradient.
    """
    return total + sum(t.flatten()[:0].sum() for t in tensors)


@torch.no_grad()
def gather_into(target: nn.Module | None, model: nn.Module) -> None:
    """Copy the parameters of a sharded model into an unsharded copy, one at a time; ranks without a copy give None."""
    into = dict(target.named_parameters(remove_duplicate=False)) if target is not None else {}
    for name, parameter in model.named_parameters():
        full = full_tensor(parameter.detach())
        if target is not None:
            into[name].copy_(full)
