"""Visual tokens of frames that all have as many, without a model; features of frames, in a file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from lvctx.artifacts.manifest import Provenance
from lvctx.models.vlm_assembly import VIDEO_TOKEN
from lvctx.vlm.feature_cache import open_frames
from lvctx.vlm.llava_onevision import FrameRows


def even_tokens(*, vocabulary: int, per_frame: int, frames: int, inserted: int) -> Any:
    """What a needle task asks of `VisualTokens`."""
    rows = FrameRows(vocabulary=vocabulary, tokens=[per_frame] * frames, sizes=[per_frame], inserted=inserted)
    facts = {"tokens_per_frame": [per_frame]}
    return SimpleNamespace(placeholder=VIDEO_TOKEN, frames_per_grid=1, facts=facts, ids=rows.ids)


def write_frames(
    target: Path, features_FPD: Tensor, pts: list[float], index: list[int], provenance: Provenance
) -> None:
    """Write a whole frames artifact at once."""
    with open_frames(target, provenance, {}) as writer:
        writer.append(features_FPD, pts, index)
