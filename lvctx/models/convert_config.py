"""Configurations of `import-longva` and `export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lvctx.config import Flag
from lvctx.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ImportLongvaConfig:
    """The model to convert."""

    source: Annotated[str, Flag(argument=True, metavar="SRC")]
    """LLaVA checkpoint: directory, or hub id such as lmms-lab/LongVA-7B or lmms-lab/LLaVA-NeXT-Video-7B-32K."""
    out: Annotated[Path, Flag(names=("-o", "--out"))]
    """Directory of the converted model."""
    tower: str | None = None
    """CLIP vision tower: its configuration, and its weights if SRC has none. Default: the tower named by SRC."""
    context: Annotated[int | None, Flag(min=1)] = None
    """Context length in tokens that config.json gets. Default: that of SRC."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The model to export, and its format."""

    model: Annotated[str, Flag(argument=True, metavar="MODEL")]
    """Model: directory or hub id."""
    to: Literal["hf", "llava"] | None = None
    """hf: only the standard Hugging Face files, weights linked. llava: the format in which LongVA was released (for
    VLMs with a CLIP tower)."""
    out: Annotated[Path, Flag(names=("-o", "--out"))]
    """Directory to write."""
    card: bool = False
    """Write only the model card, README.md, instead of --to: for a model that is published already."""
    results: tuple[Path, ...] = ()
    """Results of this model for the model card: directory or file of niah, videomme, bench or perplexity. Repeat the
    option."""
    push_to_hub: Annotated[str | None, Flag(metavar="ID")] = None
    """Upload the written files to this model repository of the Hugging Face hub, which is created if needed. The login
    is HF_TOKEN or that of `hf auth login`."""

    def __post_init__(self) -> None:
        if self.card == (self.to is not None):
            raise UsageError("either --to or --card is needed, and not both", fix="give one of them")
        if self.card and self.push_to_hub is not None:
            raise UsageError("--push-to-hub uploads a whole model", where="--card", fix="give --to hf instead")
