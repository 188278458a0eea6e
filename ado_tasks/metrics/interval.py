"""A figure with its interval, and two ways to make one: Student's t for means, Clopper-Pearson for proportions."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.checks import AnyArray, samples

LEVEL = 0.95  # docs/science.md, Metrics: every interval of a report is a 95 % interval


@dataclass(frozen=True)
class Interval:
    """A figure, and the two ends of its two-sided interval: low <= value <= high."""

    value: float
    low: float
    high: float

    def covers(self, truth: float) -> bool:
        """Whether `truth` lies inside, ends included."""
        return self.low <= truth <= self.high


def check_level(level: float) -> None:
    """Raise unless the level of an interval lies strictly between 0 and 1."""
    if not 0.0 < level < 1.0:
        raise StatisticsError(f"level: must lie strictly between 0 and 1, got {level}")


def mean_interval(values: AnyArray, level: float = LEVEL) -> Interval:
    """Mean of independent values (n,), n >= 2, with Student's t interval: mean +- t_{n-1} s / sqrt(n)."""
    check_level(level)
    flat = samples(np.asarray(values).reshape(-1), "values")[:, 0]
    mean = float(flat.mean())
    half = float(stats.t.ppf(0.5 + level / 2, len(flat) - 1)) * float(flat.std(ddof=1)) / math.sqrt(len(flat))
    return Interval(mean, mean - half, mean + half)


def proportion_interval(successes: int, trials: int, level: float = LEVEL) -> Interval:
    """Proportion with the exact interval of Clopper & Pearson (1934): it covers at least `level` of the time."""
    check_level(level)
    if trials < 1 or not 0 <= successes <= trials:
        raise StatisticsError(f"proportion: needs 0 <= successes <= trials >= 1, got {successes} of {trials}")
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(stats.beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return Interval(successes / trials, low, high)
