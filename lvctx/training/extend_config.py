"""Configuration of `extend-lm`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from lvctx.config import Flag, Seed, parse_integers, parse_numbers

TRAINING = "Training"


@dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """The settings that decide an extended model."""

    stage_keys: ClassVar[dict[str, Callable[[str], Any]]] = {
        "seq_len": int,
        "context": int,
        "steps": int,
        "batch_tokens": int,
        "rope_theta": float,
        "factor": float,
        "lr": float,
        "data": Path,
    }
    """Fields that a stage may set, and their parsers."""

    model: Annotated[str, Flag(in_hash=False)]
    """Language model, or a VLM with one: directory or hub id."""
    out: Annotated[Path, Flag(names=("-o", "--out"), in_hash=False)]
    """Directory of the extended model."""
    rope: Literal["theta", "pi", "ntk", "yarn", "mrope++", "none"] = "theta"
    """RoPE scaling: a new base (theta), scaled positions (pi, ntk, yarn; mrope++ for Qwen2-VL and Qwen2.5-VL), or those
    of the model (none)."""
    rope_theta: Annotated[float | None, Flag(min=1.0)] = None
    """RoPE base. Default: 1e9 (LongVA) with --rope theta, else the model's."""
    factor: Annotated[float | None, Flag(min=1.0)] = None
    """Scaling factor relative to the pretrained length (pi, ntk, yarn, mrope++). Default: enough for --context."""
    attention_factor: Annotated[float | None, Flag(min=0.1)] = None
    """YaRN attention factor (multiplies cos and sin). Default: 0.1 ln(factor) + 1."""
    context: Annotated[int | None, Flag(min=2)] = None
    """Context length in tokens that config.json gets. Default: the longer of the model's and the rows'."""
    original_length: Annotated[int | None, Flag(min=2)] = None
    """Pretrained length in tokens (pi, ntk, yarn, mrope++). Default: from config.json."""
    data: Annotated[Path | None, Flag(in_hash=False, panel=TRAINING)] = None
    """Packed rows to train on (pack-text)."""
    seq_len: Annotated[int | None, Flag(min=2, panel=TRAINING)] = None
    """Cut rows into pieces of this many tokens. Default: whole rows."""
    steps: Annotated[int, Flag(min=0, panel=TRAINING)] = 1000
    """Optimizer steps; 0 changes the positions only."""
    batch_tokens: Annotated[int, Flag(min=1, panel=TRAINING)] = 1_000_000
    """Tokens per step, rounded down to whole rows."""
    lr: Annotated[float, Flag(min=0.0, panel=TRAINING)] = 1e-5
    """Learning rate, constant."""
    lora: Annotated[int, Flag(min=0, panel=TRAINING)] = 0
    """Rank of LoRA on the attention projections; 0 trains all parameters."""
    adapter: Annotated[Path | None, Flag(in_hash=False, panel=TRAINING)] = None
    """LoRA to start from, with --lora: adapter/ of an earlier run."""
    doc_mask: Annotated[bool, Flag(panel=TRAINING)] = False
    """Let tokens attend within their own document only, instead of the whole row."""
    pose: Annotated[bool, Flag(panel=TRAINING)] = False
    """PoSE: cut each row in two and move the parts apart, so that short rows cover all positions of --context."""
    stages: Annotated[
        tuple[str, ...], Flag(names=("--stage",), metavar="KEY=VALUE,...", in_hash=False, panel=TRAINING)
    ] = ()
    """One of several runs, each starting from the previous result. Keys: seq-len, context, rope-theta, factor,
    steps, lr, batch-tokens, data. Repeat the option; a recipe has [[extend-lm.stages]]."""
    seed: Seed = 0
    """Seed of the order of the rows and of LoRA's initialisation."""


@dataclass(frozen=True, kw_only=True)
class BaseSearchConfig:
    """Settings of the search for the RoPE base before training."""

    panel: ClassVar[str] = "Search for the RoPE base"

    search_base: Annotated[str | None, Flag(metavar="LOW:HIGH")] = None
    """Set --rope-theta by needle-in-a-haystack tests of untrained bases in this range."""
    search_points: Annotated[int, Flag(min=2, needs=("search_base",))] = 5
    """Number of bases to try."""
    search_lengths: Annotated[
        tuple[int, ...] | None, Flag(parse=parse_integers, metavar="N,...", needs=("search_base",))
    ] = None
    """Context lengths in tokens. Default: --context."""
    search_depths: Annotated[tuple[float, ...], Flag(parse=parse_numbers, metavar="X,...", needs=("search_base",))] = (
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
    )
    """Needle depths, from 0 to 1."""
    search_trials: Annotated[int, Flag(min=1, needs=("search_base",))] = 1
    """Trials per length and depth."""
    haystack: Annotated[tuple[Path, ...], Flag(needs=("search_base",))] = ()
    """Text of the haystack: files or directories."""
