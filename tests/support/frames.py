"""Visual tokens of frames that all have as many, without a model."""

from types import SimpleNamespace
from typing import Any

from lvctx.models.vlm_assembly import VIDEO_TOKEN
from lvctx.vlm.llava_onevision import FrameRows


def even_tokens(*, vocabulary: int, per_frame: int, frames: int, inserted: int) -> Any:
    """What a needle task asks of `VisualTokens`."""
    rows = FrameRows(vocabulary=vocabulary, tokens=[per_frame] * frames, sizes=[per_frame], inserted=inserted)
    facts = {"tokens_per_frame": [per_frame]}
    return SimpleNamespace(placeholder=VIDEO_TOKEN, frames_per_grid=1, facts=facts, ids=rows.ids)
