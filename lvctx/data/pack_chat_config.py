"""Configuration of `pack-chat`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lvctx.config import Flag, Seed, parse_token_count

SAMPLES, SELECTION, COUNTING = (
    "Samples (rows of LLaVA, OpenAI, LongAlpaca or M3IT: JSON, JSONL, Parquet, datasets; repeatable)",
    "Selection of samples",
    "Visual tokens",
)


def parse_proportions(text: str) -> dict[str, float]:
    """`text=20,image=25` as numbers by kind. Raises ValueError."""
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        proportions = {kind.strip(): float(share) for kind, _, share in pairs}
    except ValueError:
        raise ValueError("write it as text=20,image=25,interleaved=25,video=30") from None
    if not all(0 <= share < float("inf") for share in proportions.values()):
        raise ValueError("proportions have to be numbers of at least 0")
    return proportions


def parse_share(text: str) -> float | None:
    """A number from 0 to 1; None for `any`. Raises ValueError."""
    if text == "any":
        return None
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError("write a number from 0 to 1, or any")
    return share


@dataclass(frozen=True, kw_only=True)
class PackChatConfig:
    """The samples to pack, and how."""

    out: Annotated[Path, Flag(names=("-o", "--out"), in_hash=False)]
    """Directory of the packed rows."""
    model: Annotated[str, Flag(in_hash=False)]
    """Model to be trained: directory or hub id; its weights are not read."""
    target_length: Annotated[int, Flag(min=2)]
    """Longest row, in tokens (GIRAFFE: 64K, then 128K)."""
    text: Annotated[tuple[Path, ...], Flag(panel=SAMPLES, in_hash=False)] = ()
    """Samples of long text."""
    image: Annotated[tuple[Path, ...], Flag(panel=SAMPLES, in_hash=False)] = ()
    """Short samples with images."""
    interleaved: Annotated[tuple[Path, ...], Flag(panel=SAMPLES, in_hash=False)] = ()
    """Samples with several images each."""
    video: Annotated[tuple[Path, ...], Flag(panel=SAMPLES, in_hash=False)] = ()
    """Samples with videos."""
    media: Annotated[Path, Flag(panel=SAMPLES, in_hash=False)] = Path(".")
    """Directory that the paths of images and videos are relative to."""
    mix: Annotated[dict[str, float] | None, Flag(parse=parse_proportions, metavar="KIND=N,...", panel=SELECTION)] = None
    """Proportions of the kinds, by tokens. Default: text=20,image=25,interleaved=25,video=30, of the kinds given."""
    long_share: Annotated[float | None, Flag(parse=parse_share, metavar="SHARE|any", panel=SELECTION)] = 0.6
    """Share of the tokens that is in long samples (GIRAFFE: 0.6); any: as many as the samples have."""
    long_over: Annotated[int, Flag(min=0, panel=SELECTION)] = 8192
    """A sample with more tokens than this is long."""
    tokens: Annotated[int | None, Flag(parse=parse_token_count, metavar="COUNT", panel=SELECTION)] = None
    """Tokens to pack: 500000, 300K, 2B. Default: as many as the mix allows."""
    min_video_seconds: Annotated[float, Flag(min=0, panel=SELECTION)] = 0.0
    """Leave out samples with a shorter video (GIRAFFE: those of MLVU under 300)."""
    template: Annotated[Literal["chatml", "own"], Flag(panel=SELECTION)] = "chatml"
    """Chat template: ChatML, or the tokenizer's own."""
    video_fps: Annotated[float, Flag(min=0.001, panel=COUNTING)] = 2.0
    """Frames per second of a video."""
    max_frames: Annotated[int, Flag(min=1, panel=COUNTING)] = 768
    """Maximum frames of a video; a longer one gets this many, evenly spaced."""
    hybrid: Annotated[str | None, Flag(metavar="L,M,S", panel=COUNTING)] = None
    """Hybrid resolution: of every L frames one has M tokens, the others M/S. Default: all frames have 240 tokens, or
    for LlavaOnevision the tokens of its frames."""
    hybrid_mode: Annotated[Literal["pair", "image", "literal"], Flag(panel=COUNTING)] = "pair"
    """If the model merges two frames into one: L counts merged pairs (pair), no frames are merged (image), or each run
    of frames of one size is merged (literal)."""
    allow_partial: bool = False
    """Use what can be decoded of truncated or damaged videos; their rows have `partial`."""
    skip_malformed: bool = False
    """Leave out samples that are malformed, and list them, instead of stopping."""
    shard_tokens: Annotated[int, Flag(min=1)] = 1 << 24
    """Tokens after which a shard is closed."""
    seed: Seed = 0
    """Seed that decides which samples are packed, and their order."""
