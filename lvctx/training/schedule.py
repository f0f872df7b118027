"""Learning-rate schedules of the papers: constant (LongVA's extension), cosine with warm-up (LLaVA's alignment)."""

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "linear"]


def rate(step: int, *, steps: int, schedule: Schedule, warmup: float) -> float:
    """Factor on the peak learning rate at 0-based `step` of `steps`; linear over the first `warmup` fraction."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    if schedule == "constant":
        return 1.0
    done = (step - rise) / max(1, steps - rise)
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
