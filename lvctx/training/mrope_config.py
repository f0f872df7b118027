"""Configuration of `mrope-extend`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from lvctx.config import Flag, Seed

COUNT, TRAINING = "Tokens and positions of a video", "Training"


@dataclass(frozen=True, kw_only=True)
class MropeConfig:
    """The settings of an extended Qwen-VL model; the fields in the hash are those of the training."""

    stage_keys: ClassVar[dict[str, Callable[[str], Any]]] = {
        "scale": float,
        "data": Path,
        "seq_len": int,
        "steps": int,
        "batch": int,
        "lr": float,
        "merger_lr": float,
        "tower_lr": float,
    }
    """Fields that a stage may set, and their parsers."""

    model: Annotated[str, Flag(in_hash=False)]
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL: directory or hub id."""
    out: Annotated[Path, Flag(names=("-o", "--out"), in_hash=False)]
    """Directory of the extended model."""
    scale: Annotated[float, Flag(in_hash=False)]
    """Ratio of new context length to pretrained length; at least 1."""
    original_length: Annotated[int | None, Flag(min=2, in_hash=False)] = None
    """Pretrained length in tokens. Default: from config.json."""
    method: Annotated[Literal["mrope++", "pi", "ntk", "yarn", "none"] | None, Flag(in_hash=False)] = None
    """RoPE scaling; none: direct extrapolation. Default: mrope++, for Qwen3-VL yarn."""
    ramp: Annotated[Literal["index", "wavelength", "ntk"], Flag(in_hash=False)] = "index"
    """Height frequencies of mrope++: wavelength is the formula of the paper (GIRAFFE), ntk its released code; index is
    YaRN's ramp, which every runtime can compute."""
    verify: Annotated[bool, Flag(in_hash=False)] = False
    """Compare the frequencies that transformers computes with the formula, channel by channel."""
    plot: Annotated[Path | None, Flag(in_hash=False)] = None
    """Draw the frequencies of all methods to this .png or .svg."""
    frames: Annotated[int | None, Flag(min=1, in_hash=False, panel=COUNT)] = None
    """Count the tokens of a video of this many frames."""
    size: Annotated[str, Flag(metavar="WxH", in_hash=False, panel=COUNT)] = "1280x720"
    """Width and height of the video."""
    fps: Annotated[float, Flag(min=0.001, in_hash=False, panel=COUNT)] = 2.0
    """Sampled frames per second."""
    hybrid: Annotated[str | None, Flag(metavar="L,M,S", in_hash=False, panel=COUNT)] = None
    """Hybrid resolution, as for vqa; also for training. Default: 1,240,1."""
    hybrid_mode: Annotated[Literal["pair", "image", "literal"], Flag(in_hash=False, panel=COUNT)] = "pair"
    """How hybrid resolution merges frames, as for vqa."""
    data: Annotated[Path | None, Flag(in_hash=False, panel=TRAINING)] = None
    """Training data: packed chat (pack-chat), or JSON or JSONL of chat samples."""
    media: Annotated[Path, Flag(in_hash=False, panel=TRAINING, needs=("data",))] = Path(".")
    """Directory that the paths in the samples are relative to."""
    allow_partial: Annotated[bool, Flag(in_hash=False, panel=TRAINING)] = False
    """Use what can be decoded of truncated or damaged videos."""
    seq_len: Annotated[int | None, Flag(panel=TRAINING, needs=("data",))] = None
    """Maximum tokens per row. Default: that of the packed rows; for samples, --scale times the pretrained length."""
    steps: Annotated[int, Flag(min=1, panel=TRAINING)] = 100
    """Optimizer steps."""
    batch: Annotated[int, Flag(min=1, panel=TRAINING)] = 1
    """Rows per step."""
    lr: Annotated[float, Flag(min=0, panel=TRAINING)] = 1e-4
    """Peak learning rate of the language model, constant after the warm-up; 0 freezes it."""
    merger_lr: Annotated[float, Flag(min=0, panel=TRAINING)] = 0.0
    """Peak learning rate of the merger between tower and language model; 0 freezes it, as in the paper."""
    tower_lr: Annotated[float, Flag(min=0, panel=TRAINING)] = 0.0
    """Peak learning rate of the vision tower; 0 freezes it, as in the paper."""
    warmup: Annotated[float, Flag(min=0, max=1, panel=TRAINING)] = 0.03
    """Fraction of the steps over which the learning rate rises."""
    lora: Annotated[int, Flag(min=0, panel=TRAINING)] = 16
    """Rank of LoRA on the language model's attention; 0 trains the whole language model."""
    stages: Annotated[
        tuple[str, ...], Flag(names=("--stage",), metavar="KEY=VALUE,...", in_hash=False, panel=TRAINING)
    ] = ()
    """One of several trainings, each starting from the result of the previous one. Keys: scale, data, seq-len, steps,
    batch, lr, merger-lr, tower-lr. Repeat the option; a recipe has [[mrope-extend.stages]]."""
    seed: Seed = 0
    """Seed of the order of the rows and of LoRA's initialisation."""
