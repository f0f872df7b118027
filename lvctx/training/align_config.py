"""Configuration of `align`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lvctx.config import Flag, Seed
from lvctx.video.sampling import Rate, parse_rate

IMAGES, TRAINING = "Images", "Training"
Template = Literal["chat", "plain"]


def parse_max_grids(text: str) -> int:
    """Text of --max-grids. Raises ValueError."""
    if not text.isdecimal() or int(text) < 2:
        raise ValueError("write a whole number of at least 2")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """The settings that decide an aligned model."""

    data: Annotated[Path, Flag(in_hash=False)]
    """LLaVA rows or OpenAI messages, for dpo preference pairs: JSON, JSONL, Parquet, a directory saved by datasets,
    or a hub id; or packed chat (pack-chat). Images inside the rows are written to --images."""
    images: Annotated[Path, Flag(in_hash=False)]
    """Directory that the paths of images and videos are relative to."""
    out: Annotated[Path, Flag(names=("-o", "--out"), in_hash=False)]
    """Directory of the aligned model."""
    stage: Literal["projector", "full", "dpo"] = "projector"
    """Trained parts. projector: the MLP only. full: the whole model. dpo: the whole model, on preferences."""
    lm: Annotated[str | None, Flag(in_hash=False)] = None
    """Language model: directory or hub id."""
    tower: Annotated[str | None, Flag(in_hash=False)] = None
    """CLIP or SigLIP vision tower: directory or hub id."""
    init: Annotated[str | None, Flag(in_hash=False)] = None
    """VLM to start from, instead of --lm and --tower."""
    adapter: Annotated[tuple[Path, ...], Flag(in_hash=False)] = ()
    """adapter/ of an earlier run with --lora, to start from; if several overlap, the last one is used."""
    image_encoding: Annotated[Literal["unires", "anyres", "single", "single-unpooled"] | None, Flag(panel=IMAGES)] = (
        None
    )
    """unires: grids that are encoded like video frames. anyres: a base image and at most 4 grids (LLaVA-NeXT). single:
    one padded grid. single-unpooled: one cropped grid without pooling (LLaVA's first stage). Default: that of --init,
    else unires."""
    unires_rule: Annotated[Literal["code", "paper"] | None, Flag(panel=IMAGES)] = None
    """UniRes as in LongVA's released code or as in its paper. Default: that of --init, else code."""
    max_grids: Annotated[
        int | tuple[tuple[int, int], ...] | None, Flag(parse=parse_max_grids, metavar="INTEGER", panel=IMAGES)
    ] = None
    """UniRes: maximum grids per image. Default: that of --init, else 49 (LongVA)."""
    frames: Annotated[int | None, Flag(min=1, panel=IMAGES)] = None
    """Frames of each video, evenly spread; each is a cropped grid, as at inference. Default: 10 (LongVA-DPO)."""
    fps: Annotated[Rate | None, Flag(parse=parse_rate, metavar="RATE|native", panel=IMAGES)] = None
    """Frames per second of each video file, instead of --frames."""
    template: Annotated[Template, Flag(panel=TRAINING)] = "chat"
    """chat: the model's chat template. plain: image, caption, newline, no instruction (LLaVA's first stage)."""
    loss_on: Annotated[Literal["answers", "markup"], Flag(needs=("template=chat",), panel=TRAINING)] = "answers"
    """answers: the loss counts the assistant's text and the end of its turn. markup: also the control tokens around
    every turn and the white space after them, as in LongVA's code, although a model generates only those of its own
    turns."""
    steps: Annotated[int | None, Flag(min=1, panel=TRAINING)] = None
    """Optimizer steps. Default: --epochs."""
    epochs: Annotated[float | None, Flag(in_hash=False, panel=TRAINING)] = None
    """Passes over the data, instead of --steps. Default: 1, for dpo 3."""
    batch: Annotated[int | None, Flag(min=1, panel=TRAINING)] = None
    """Samples per step, or packed rows. Default (LongVA): 128 for projector, 32 for full, 128 for dpo; 1 packed row."""
    lr: Annotated[float | None, Flag(panel=TRAINING)] = None
    """Peak learning rate. Default (LongVA): 1e-3 for projector, 1e-5 for full, 5e-7 for dpo."""
    projector_lr: Annotated[float | None, Flag(min=0, panel=TRAINING)] = None
    """Peak learning rate of the projector for full and dpo; 0 freezes it. Default: --lr."""
    tower_lr: Annotated[float | None, Flag(min=0, panel=TRAINING)] = None
    """Peak learning rate of the vision tower; 0 freezes it. Default: 2e-6 for full, else 0."""
    warmup: Annotated[float, Flag(min=0, max=1, panel=TRAINING)] = 0.03
    """Fraction of the steps over which the learning rate rises; then cosine decay, for dpo linear."""
    lora: Annotated[int, Flag(min=0, panel=TRAINING)] = 0
    """Rank of LoRA on the language model's attention for full and dpo; 0 trains all of its parameters."""
    beta: Annotated[float | None, Flag(panel=TRAINING)] = None
    """DPO: strength of the penalty for deviating from the starting model. Default: 0.1."""
    max_length: Annotated[int | None, Flag(min=2, panel=TRAINING)] = None
    """Maximum tokens of a sample; longer ones are truncated. Default: 32,768; packed rows stay whole."""
    pose: Annotated[bool, Flag(panel=TRAINING)] = False
    """PoSE: cut each sample in two and move the parts apart, so that short samples cover the whole context."""
    plot: Annotated[Path | None, Flag(needs=("dry_run",), in_hash=False)] = None
    """Draw the sizes of the images and the tokens of the samples to this .png or .svg."""
    seed: Seed = 0
    """Seed of the order of the samples and of the initialisation of projector and LoRA."""
