"""Positional skip-wise training, PoSE (Zhu et al. 2023, section 3.2): short rows that cover a long context.

A row is cut in two (the paper's N = 2) and the positions of its second part are shifted, both at random, so over many
rows a model trains on every distance up to the context at the cost of a short row.
"""

import numpy as np


def skipped(length: int, context: int, rng: np.random.Generator) -> np.ndarray:
    """Positions, int64 (length,): 0, 1, 2, ... up to a cut, then continuing after a skip of at most `context - length`.

    The cut is uniform over the row and the skip uniform over 0 to `context - length`; no position reaches `context`,
    which must not be less than `length`.
    """
    cut = int(rng.integers(1, length)) if length > 1 else length
    positions = np.arange(length)
    positions[cut:] += rng.integers(context - length + 1)
    return positions
