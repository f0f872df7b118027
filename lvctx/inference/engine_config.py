"""Options of where and how a model runs; only the data type affects results.

No heavy module is imported here, since the commands' help needs this file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from lvctx.artifacts.store import read_json
from lvctx.config import Flag
from lvctx.device import DeviceMap, resolve_device, weights_dtype
from lvctx.errors import UsageError

CachePlacement = Literal["device", "host", "int8"]
FEATURE_CACHE = Path("~/.cache/lvctx/features")
"""Default folder for features of videos."""
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def parse_device_map(text: str) -> DeviceMap:
    """A device map name of accelerate, or a JSON file of module: device. Raises UsageError, InputError."""
    if text in DEVICE_MAPS:
        return text
    if not Path(text).is_file():
        fix = "give auto, balanced, sequential or a JSON file of module: device"
        raise UsageError(f"--device-map {text!r} is not a file", fix=fix)
    return read_json(Path(text))


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """One model on one device, or on the ranks of torchrun."""

    panel: ClassVar[str] = "Device"

    device: str = "auto"
    """Device: cpu, cuda or mps. auto takes the first GPU, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights in memory. auto: the checkpoint's own, or float32 on a CPU without
    bfloat16 instructions."""
    prefill_chunk: Annotated[int | None, Flag(min=1)] = None
    """Tokens per forward pass while a prompt is computed; smaller values need less memory. Default: 2048, on CUDA up to
    32768 if their activations take at most an eighth of the memory that the model leaves free."""
    reuse: bool = True
    """Compute the common prefix of prompts only once."""
    cp: Annotated[int, Flag(min=1)] = 1
    """Context parallelism: processes that share each sequence and its KV cache (torchrun)."""

    @property
    def weights_dtype(self) -> str:
        """`dtype` as it is loaded: see `lvctx.device.weights_dtype`."""
        return weights_dtype(self.dtype, resolve_device(self.device))


@dataclass(frozen=True, kw_only=True)
class VideoDeviceConfig(DeviceConfig):
    """The same, for a model that is shown videos."""

    feature_cache: Path | None = None
    """Folder that keeps the vision features of videos, for models with a CLIP or SigLIP tower."""

    @property
    def features_folder(self) -> Path:
        """`feature_cache`, or the default folder."""
        return (self.feature_cache or FEATURE_CACHE).expanduser()


@dataclass(frozen=True, kw_only=True)
class EngineConfig(VideoDeviceConfig):
    """The same, for questions about videos."""

    device_map: Annotated[DeviceMap | None, Flag(parse=parse_device_map, metavar="MAP")] = None
    """Spread the model over devices with accelerate: auto, balanced, sequential, or a JSON file of module: device."""
    batch: Annotated[int, Flag(min=1)] = 1
    """Replies that are generated together, also about different videos: faster, but each needs a KV cache in memory."""

    def __post_init__(self) -> None:
        if self.device_map is not None and self.cp > 1:
            raise UsageError("--device-map is for a single process", fix="drop --cp")
        if self.batch > 1 and self.cp > 1:
            raise UsageError("--batch is for a single process", fix="drop --cp")
