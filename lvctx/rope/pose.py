"""Positional skip-wise training, PoSE (Zhu et al. 2023, section 3.2): short rows that cover a long context.

A row is cut in two (the paper's N = 2) and its second part moved away, both by chance, so that over many rows a model
trains on every distance up to the context at the price of the row.
"""

import numpy as np


def skipped(length: int, context: int, rng: np.random.Generator) -> np.ndarray:
    """Positions, int64 (length,): 0, 1, 2, ... up to a cut, then on from a point `context - length` later at most.

    The cut is uniform over the row and the skip uniform over 0 to `context - length`; no position reaches `context`,
    which must not be less than `length`.
    """
    cut = int(rng.integers(1, length)) if length > 1 else length
    positions = np.arange(length)
    positions[cut:] += rng.integers(context - length + 1)
    return positions
