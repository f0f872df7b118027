"""`torch.compile` of the decoder layers of a training."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from lvctx.errors import MissingError, UsageError
from lvctx.parallel import hf_attention


def check_compiler(device: str) -> None:
    """Raise MissingError if torch cannot compile for `device` here, UsageError for a device other than CUDA and CPU."""
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--compile does not support the device {kind}", fix="drop it")
    if kind == "cuda" and find_spec("triton") is None:
        raise MissingError("--compile needs triton on CUDA", fix="install triton, or drop it")
    if kind == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as e:
            raise MissingError("--compile needs a C++ compiler on a CPU", fix="install g++, or drop it") from e


def compile_layers(decoder: Any, *, backend: str = "inductor") -> None:
    """Compile each layer's forward pass; call it after `checkpoint_layers` and `hf_attention.use`, before sharding.

    The compiled function is what a checkpoint calls, in both passes. The hooks that move its inputs to host memory stay
    outside. A layer without a checkpoint calls it in place of one. Parameters keep their names. Raises UsageError for
    layers that transformers cannot recompute.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not all(isinstance(layer, GradientCheckpointingLayer) for layer in decoder.layers):
        raise UsageError(
            "--compile does not support this model's layers", where=decoder.config.name_or_path, fix="drop it"
        )
    hf_attention.keep_uncompiled()
    compiled = torch.compile(_call, backend=backend)
    decoder.train()
    for layer in decoder.layers:
        outer = layer._gradient_checkpointing_func if layer.gradient_checkpointing else _call
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(_run, compiled, outer)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _run(compiled: Callable[..., Any], outer: Callable[..., Any], function: Any, *args: Any) -> Any:
    # transformers makes a new partial for every call: compiled as it is, it would be compiled each time.
    return outer(partial(compiled, function.func, *function.args, **function.keywords), *args)
