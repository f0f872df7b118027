"""LongTimeScope: TimeScope's retrieval (`QA`) and synthesis (`OCR`) in videos of about ten hours.

Its task in lmms-eval is TimeScope's, but two commas are missing in its list of phrases: `Best answer: C` is read as B.
"""

from collections.abc import Sequence
from typing import Any

from lvctx.eval.benchmarks import timescope
from lvctx.eval.benchmarks.answers import PHRASES_2024

NAME = "longtimescope"
STYLES = timescope.STYLES
GROUPS = timescope.GROUPS
FREE_ANSWERS = False
COLUMNS = timescope.COLUMNS
samples = timescope.samples
prompt = timescope.prompt


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Breakdown by kind and by length, and its own rule by both and by each pair."""
    return timescope.score_with(rows, PHRASES_2024)
