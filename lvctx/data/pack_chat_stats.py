"""Statistics of packed chat samples, for the manifest: proportions, lengths before and after, omitted samples."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lvctx.data.chat_sample_store import ChatSampleStore
from lvctx.data.pack_chat_config import PackChatConfig
from lvctx.data.row_packing import BINS, add_to_histogram, bin_names

TOO_LONG, SHORT_VIDEO, NOT_NEEDED = "too long", "short video", "not needed"
"""Reasons to leave out a sample that is not malformed."""


def packing_stats(
    config: PackChatConfig,
    mix: Mapping[str, float],
    samples: ChatSampleStore,
    packed: np.ndarray,
    left_out: Sequence[Mapping[str, Any]],
    *,
    rows: int,
) -> dict[str, Any]:
    """Requested and achieved values; `packed` marks the samples that went into the rows, bool (N,)."""
    lengths, kinds = np.array(samples.lengths), np.array(samples.kinds)
    total, long = int(lengths[packed].sum()), packed & (lengths > config.long_over)
    known = (TOO_LONG, SHORT_VIDEO, NOT_NEEDED)
    reasons = Counter((r["kind"], r["why"] if r["why"] in known else "malformed") for r in left_out)
    sources = {}
    for kind, share in mix.items():
        members = kinds == kind
        sources[kind] = {
            "share_requested": share,
            "share_achieved": int(lengths[packed & members].sum()) / total,
            "samples": sum(reasons[kind, why] for why in (TOO_LONG, SHORT_VIDEO, "malformed")) + int(members.sum()),
            "tokens": int(lengths[members].sum()),
            "packed_samples": int((packed & members).sum()),
            "packed": int(lengths[packed & members].sum()),
            "not_needed": reasons[kind, NOT_NEEDED],
            "too_long": reasons[kind, TOO_LONG],
            "short_video": reasons[kind, SHORT_VIDEO],
            "malformed": reasons[kind, "malformed"],
            **_histogram("before", lengths[members]),
            **_histogram("after", lengths[packed & members]),
        }
    return {
        "target_length": config.target_length,
        "rows": rows,
        "tokens": total,
        "fill": total / (rows * config.target_length),
        "samples": int(packed.sum()),
        "long": {
            "over": config.long_over,
            "share_requested": config.long_share,
            "share_achieved": int(lengths[long].sum()) / total,
            "samples": int(long.sum()),
            "share_of_samples": int(long.sum()) / int(packed.sum()),
        },
        "too_long": [r["source"] for r in left_out if r["why"] == TOO_LONG][:20],
        "length_bins": bin_names(),
        "sources": sources,
    }


def _histogram(when: str, lengths: np.ndarray) -> dict[str, list[int]]:
    samples, tokens = [0] * BINS, [0] * BINS
    add_to_histogram(samples, tokens, lengths)
    return {f"{when}_samples": samples, f"{when}_tokens": tokens}
