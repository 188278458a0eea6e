"""Does one number predict the order of another? Spearman's rank correlation with an interval."""

import math

import numpy as np
from scipy import stats

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.checks import AnyArray
from ado_tasks.metrics.interval import LEVEL, Interval, check_level

MIN_PAIRS = 5  # the interval divides by √(n − 3) and is an approximation; below it says nothing


def rank_correlation(x: AnyArray, y: AnyArray, *, level: float = LEVEL) -> Interval:
    """Spearman's ρ of pairs (n,), (n,), ties at their mean rank, with Bonett & Wright's interval.

    Fisher's z = artanh ρ ± z_level √((1 + ρ²/2)/(n − 3)) (Bonett & Wright 2000), taken back by tanh. The pairs
    must be independent: samples of one class that share a predictor are not; give one pair a class.

    `StatisticsError` for fewer than 5 pairs, values that are not finite, or a side that does not vary.
    """
    check_level(level)
    a, b = (np.asarray(values, np.float64) for values in (x, y))
    if a.ndim != 1 or a.shape != b.shape or len(a) < MIN_PAIRS:
        raise StatisticsError(f"x, y: at least {MIN_PAIRS} pairs are needed, got shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise StatisticsError("x, y: not all are finite")
    ranks = [stats.rankdata(values) for values in (a, b)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        raise StatisticsError("x, y: all values of a side are equal; there is no order to predict")
    rho = float(np.clip(np.corrcoef(*ranks)[0, 1], -1.0, 1.0))
    nearest = 1 - 6 * 2 / (len(a) * (len(a) ** 2 - 1))  # with two neighbours swapped: the largest ρ under 1
    if abs(rho) > (1 + nearest) / 2:  # a perfect order, for which z would be infinite
        rho = math.copysign(1.0, rho)
        low, high = _interval(math.copysign(nearest, rho), len(a), level)
        return Interval(rho, min(low, rho), max(high, rho))
    return Interval(rho, *_interval(rho, len(a), level))


def _interval(rho: float, n: int, level: float) -> tuple[float, float]:
    half = float(stats.norm.ppf(0.5 + level / 2)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)
