"""Accuracy with a 95% interval for clustered questions: three about one video are not three independent answers.

The estimate is a ratio, right answers over counted ones. Its standard error is the cluster-robust one (the linearised
ratio of Cochran, Sampling Techniques, section 6.3): with r_g the sum of (x - mean) in video g,

    se^2 = G / (G - 1) * sum_g r_g^2 / n^2        over G videos and n counted questions,

and the interval is mean +- 1.96 se, clipped to the scale. It needs some tens of videos. If all videos have the
same result (se 0: all right, or all wrong), Wilson's interval for G answers is given instead of an empty one.

Two models that answered the same questions are compared by the mean of their differences, with the same standard error.
Its p-value is two-sided and of the normal distribution, so that p < 0.05 where the interval excludes 0. To find a
difference d with power 0.8 at p = 0.05, n (se / d)^2 (1.96 + 0.84)^2 such questions are needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, erfc, sqrt

import numpy as np

Z = 1.959963984540054
"""Normal quantile of 0.975."""
POWER = 0.8416212335729143
"""Normal quantile of 0.8."""
DETECT = 0.02
"""A difference that is worth finding, if none is given: two points."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over clustered values."""

    mean: float | None
    """None if nothing was counted."""
    low: float | None
    """Lower end of the 95% interval; None with fewer than two videos."""
    high: float | None
    """Upper end."""
    counted: int
    """Number of values in the mean."""
    clusters: int
    """Number of videos that they come from."""


def clustered_mean(values: Sequence[float], clusters: Sequence[str], *, lowest: float = 0.0) -> Estimate:
    """The mean of `values` in [`lowest`, 1], with its interval clustered by the equally long `clusters`."""
    if not len(values):
        return Estimate(mean=None, low=None, high=None, counted=0, clusters=0)
    mean, groups = float(np.mean(np.asarray(values, dtype=np.float64))), len(set(clusters))
    low = high = None
    if groups > 1:
        half = Z * _standard_error(values, clusters)
        low, high = max(lowest, mean - half), min(1.0, mean + half)
        if half < 1e-12 and lowest == 0.0:
            low, high = wilson_interval(mean, groups)
    return Estimate(mean=mean, low=low, high=high, counted=len(values), clusters=groups)


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """The mean of paired differences."""

    p_value: float | None
    """Two-sided; None with fewer than two videos."""
    needed: int | None
    """Questions like these with which a difference of a given size would be found; None with fewer than two videos, or
    where these say nothing about it, since all videos differ alike."""


def paired_difference(values: Sequence[float], clusters: Sequence[str], *, detect: float = DETECT) -> Difference:
    """The mean of differences in [-1, 1], clustered; `needed` is for one of `detect`."""
    estimate = clustered_mean(values, clusters, lowest=-1.0)
    p_value = needed = None
    if estimate.clusters > 1 and estimate.mean is not None:
        error = _standard_error(values, clusters)
        # Where all videos differ alike, the p-value is that of a sign test over them.
        alike = 1.0 if estimate.mean == 0 else 0.5 ** (estimate.clusters - 1)
        p_value = erfc(abs(estimate.mean) / error / sqrt(2)) if error > 1e-12 else alike
        if error > 1e-12:
            needed = max(1, ceil(estimate.counted * (error / detect * (Z + POWER)) ** 2))
    return Difference(**vars(estimate), p_value=p_value, needed=needed)


def macro_mean(strata: Sequence[tuple[Sequence[float], Sequence[str]]]) -> Estimate:
    """The mean of the means of several independent sets of values in [0, 1], each with its clusters.

    With s_t the cluster-robust standard error of the mean of one of T sets, that of the whole is sqrt(sum_t s_t^2) / T.
    No interval where a set has only one cluster.
    """
    parts = [clustered_mean(values, clusters) for values, clusters in strata if len(values)]
    if not parts:
        return clustered_mean([], [])
    mean = sum(part.mean or 0.0 for part in parts) / len(parts)
    low = high = None
    if all(part.clusters > 1 for part in parts):
        half = Z * sqrt(sum(_standard_error(*stratum) ** 2 for stratum in strata if len(stratum[0]))) / len(parts)
        low, high = max(0.0, mean - half), min(1.0, mean + half)
    counted, clusters = sum(part.counted for part in parts), sum(part.clusters for part in parts)
    return Estimate(mean=mean, low=low, high=high, counted=counted, clusters=clusters)


def _standard_error(values: Sequence[float], clusters: Sequence[str]) -> float:
    """The cluster-robust standard error of the mean of `values`, of at least two clusters."""
    x = np.asarray(values, dtype=np.float64)
    _, which = np.unique(np.asarray(clusters), return_inverse=True)
    residuals = np.bincount(which, weights=x - x.mean())
    groups = len(residuals)
    return sqrt(groups / (groups - 1) * float(residuals @ residuals)) / len(x)


def wilson_interval(mean: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion `mean` of `n` independent answers (Wilson 1927)."""
    centre, scale = mean + Z * Z / (2 * n), 1 + Z * Z / n
    half = Z * sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
