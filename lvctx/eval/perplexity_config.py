"""Configuration of `perplexity`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lvctx.config import Flag


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig:
    """What is measured, and how a model runs."""

    models: Annotated[tuple[str, ...], Flag(argument=True, metavar="MODEL...")]
    """Language models or VLMs: directories or hub ids. They need the tokenizer that the rows were made with."""
    data: Path
    """Packed rows of pack-text, preferably of documents that were not trained on."""
    out: Annotated[Path | None, Flag(names=("-o", "--out"))] = None
    """.png or .svg: the perplexity of all models over the position."""
    rows: Annotated[int, Flag(min=1)] = 8
    """Number of rows, from the first on."""
    seq_len: Annotated[int | None, Flag(min=2)] = None
    """Tokens per row; longer rows are split. Default: all of a row."""
    points: Annotated[int, Flag(min=1)] = 32
    """Number of ranges of positions, each with its own perplexity."""
    device: str = "auto"
    """Device: cpu, cuda or mps. auto takes the first GPU, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights in memory. auto: the checkpoint's own, or float32 on a CPU without
    bfloat16 instructions."""
    prefill_chunk: Annotated[int | None, Flag(min=1)] = None
    """Tokens per forward pass; smaller values need less memory. Default: 2048, on CUDA up to 32768 if their activations
    take at most an eighth of the memory that the model leaves free."""
