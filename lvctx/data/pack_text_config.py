"""Configuration of `pack-text`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lvctx.config import Flag, Seed, parse_token_count

SELECTION, READING = "Selection of documents", "Reading"


@dataclass(frozen=True, kw_only=True)
class PackTextConfig:
    """The documents to pack, and how."""

    inputs: Annotated[tuple[str, ...], Flag(argument=True, metavar="INPUT", in_hash=False)]
    """JSON, Parquet or text files (also .gz, .zst, .xz, .bz2), directories, - for stdin, or a datasets hub id."""
    out: Annotated[Path, Flag(names=("-o", "--out"), in_hash=False)]
    """Directory of the packed rows."""
    tokenizer: Annotated[str, Flag(in_hash=False)]
    """Model directory, tokenizer.json or hub id."""
    seq_len: Annotated[int, Flag(max=1 << 27)]
    """Tokens per row (LongVA: 224,000)."""
    tokens: Annotated[int | None, Flag(parse=parse_token_count, metavar="COUNT")] = None
    """Tokens to pack, separators included: 500000, 300K, 2B. Default: as many as the mix allows."""
    min_long: Annotated[int, Flag(min=0, panel=SELECTION)] = 4096
    """Keep every document with more tokens than this."""
    keep_short: Annotated[float, Flag(min=0.0, max=1.0, panel=SELECTION)] = 0.1
    """Probability of keeping a shorter document."""
    mix: Annotated[str, Flag(panel=SELECTION)] = "auto"
    """Proportions of the sources: slimpajama, keep (those of the input), none, or a TOML or JSON file. auto: slimpajama
    if the documents name a source, else none."""
    separator: Annotated[str, Flag(panel=SELECTION)] = "auto"
    """Token or token id before each document. auto: bos, else <|endoftext|>, else eos."""
    keep_tail: Annotated[bool, Flag(panel=SELECTION)] = False
    """Keep the last, partial row, padded with separators."""
    text_field: Annotated[str, Flag(panel=READING)] = "text"
    """Field that holds the document; a.b is field b of object a."""
    source_field: Annotated[str | None, Flag(panel=READING)] = None
    """Field that names the source of a document. Default: source, else meta.redpajama_set_name."""
    split: Annotated[str, Flag(panel=READING)] = "train"
    """Split of a dataset."""
    invalid: Annotated[Literal["replace", "skip", "error"], Flag(panel=READING)] = "replace"
    """Invalid UTF-8: replace the bytes, skip the document, or stop."""
    skip_malformed: Annotated[bool, Flag(panel=READING)] = False
    """Count malformed records and leave them out, instead of stopping."""
    shard_tokens: Annotated[int, Flag(min=1, panel=READING)] = 1 << 24
    """Tokens per shard; a stopped run repeats at most one shard."""
    workers: Annotated[int | None, Flag(min=1, panel=READING, in_hash=False)] = None
    """Tokenizer processes; does not change the result. Default: one per core."""
    seed: Seed = 0
    """Seed that decides which short documents are kept."""
