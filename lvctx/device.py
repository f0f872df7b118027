"""What `auto` means for --device and --dtype, and the GPUs in use. torch is imported when it is needed."""

from typing import Any, Literal

from lvctx.errors import MissingError

Dtype = Literal["auto", "float32", "bfloat16"]
CpKind = Literal["ring", "ulysses", "both"]
"""How processes that share a row attend; see `training.parallel_config`."""
DeviceMap = str | dict[str, Any]
"""Device of each of a model's modules, as in accelerate: `auto`, `balanced`, `sequential`, or devices by name."""


def resolve_device(device: str) -> str:
    """`device` itself; for `auto`, `cuda` if there is one, else `mps`, else `cpu`.

    Raises MissingError for a CUDA device where there is none.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise MissingError("no CUDA device is available", where=f"--device {device}", fix="--device auto")
    return device


def weights_dtype(dtype: str, device: str) -> str:
    """`dtype` itself; `auto`, the checkpoint's own, becomes `float32` on a resolved device that emulates bfloat16."""
    return "float32" if dtype == "auto" and resolve_dtype("auto", device) == "float32" else dtype


def resolve_dtype(dtype: Dtype, device: str) -> Literal["float32", "bfloat16"]:
    """`dtype` itself; for `auto`, `bfloat16` if a resolved device computes it natively, else `float32`."""
    import torch

    if dtype != "auto":
        return dtype
    # A CPU without such instructions emulates bfloat16, several times slower than float32.
    native = device != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


def gpus_in_use() -> list[int]:
    """Numbers of the CUDA devices on which this process has allocated memory."""
    import torch

    if not torch.cuda.is_initialized():
        return []
    # A device that is only asked to synchronize would be given a context, which takes hundreds of megabytes.
    return [gpu for gpu in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(gpu)]


def free_memory() -> int:
    """Bytes that tensors can still take on each of the GPUs in use; 0 if none is known to be in use."""
    import torch

    # torch keeps freed blocks for its next tensors, which the driver counts as taken.
    held = {gpu: torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu) for gpu in gpus_in_use()}
    return min((torch.cuda.mem_get_info(gpu)[0] + unused for gpu, unused in held.items()), default=0)


def synchronize() -> None:
    """Wait until the GPUs in use have computed what was queued, so that a clock can be read; at once on a CPU."""
    import torch

    for gpu in gpus_in_use():
        torch.cuda.synchronize(gpu)
