"""The samples of a global step: a function of seed and step alone, so a resumed run uses the same ones."""

from functools import lru_cache

import numpy as np


def indices(step: int, *, batch: int, samples: int, seed: int) -> list[int]:
    """Sample numbers of a global step: a new permutation per epoch, without a gap between epochs."""
    places = (divmod(position, samples) for position in range(step * batch, (step + 1) * batch))
    return [int(_permutation(seed, epoch, samples)[place]) for epoch, place in places]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(samples)
