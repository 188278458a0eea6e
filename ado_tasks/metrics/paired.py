"""Paired distances: the same noise through two samplers, one by one; a one-sided test and Holm's correction.

The most sensitive figure for schedules and students: the noise, and with it nearly all variance between samples, is
common to both sides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.checks import AnyArray, FloatArray, same_count, samples
from ado_tasks.metrics.interval import Interval, mean_interval


@dataclass(frozen=True)
class PairedDistance:
    """Mean squared distance: its mean over samples, and the value of each sample (n,)."""

    mean: float
    values: FloatArray

    def interval(self) -> Interval:
        """The mean with its 95 % interval over noise (Student's t)."""
        return mean_interval(self.values)


def paired_distance(found: AnyArray, target: AnyArray) -> PairedDistance:
    """Squared difference averaged over all numbers of a sample, for pixels (n, h, w, c) or features (n, d), n >= 2.

    Row i of both must come from the same noise. `StatisticsError` for different shapes or values that are not finite.
    """
    if np.shape(found) != np.shape(target):
        raise StatisticsError(f"found, target: must have the same shape, got {np.shape(found)} and {np.shape(target)}")
    a, b = samples(found, "found"), samples(target, "target")
    values = np.mean(np.square(a - b), axis=1)
    return PairedDistance(float(values.mean()), values)


def paired_less(candidate: AnyArray, baseline: AnyArray) -> float:
    """One-sided p of "the candidate's mean is not lower than the baseline's", from values (n,) of the same noises.

    The paired t test (Student 1908): t = mean(c - b) / (s / sqrt(n)), p = P(T_{n-1} <= t). It is about means, like the
    figure it guards; values may be skewed, so give it hundreds. Differences that do not vary: p = 0 where the candidate
    is lower, 1 otherwise.
    """
    a, b = samples(np.asarray(candidate)[..., None], "candidate"), samples(np.asarray(baseline)[..., None], "baseline")
    same_count(a, b, "candidate, baseline", "a value a noise")
    if a.shape[1] != 1 or b.shape[1] != 1:
        raise StatisticsError(f"candidate, baseline: one value a sample is needed, got {a.shape[1]} and {b.shape[1]}")
    difference = (a - b)[:, 0]
    mean, error = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(len(difference))
    if error == 0.0:
        return 0.0 if mean < 0 else 1.0
    return float(stats.t.cdf(mean / error, len(difference) - 1))


def holm(p_values: Sequence[float] | FloatArray) -> FloatArray:
    """Adjusted p-values, in the order given: reject those under the level and the family-wise error stays under it.

    Holm (1979): sorted p_(1) <= ... <= p_(k), adjusted max_{i <= j} min(1, (k - i + 1) p_(i)); valid however the tests
    depend on one another.
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or len(p) == 0 or not np.all((p >= 0) & (p <= 1)):
        raise StatisticsError(f"p_values: must be numbers in [0, 1], at least one, got {p_values}")
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(1.0, p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(stepped)
    return adjusted
