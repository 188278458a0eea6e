"""Accuracy by hand; exact intervals against SciPy and by their coverage; Student's interval by its coverage."""

import numpy as np
import pytest
from scipy import stats

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.accuracy import class_accuracy
from ado_tasks.metrics.interval import mean_interval, proportion_interval


def test_accuracy_counts_and_has_the_exact_interval() -> None:
    found = class_accuracy(np.array([0, 1, 2, 2, 1]), np.array([0, 1, 2, 0, 1]))
    exact = stats.binomtest(4, 5).proportion_ci(0.95, method="exact")
    assert found.value == 0.8
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


def test_all_attributes_must_be_right() -> None:
    assert class_accuracy(np.array([[1, 2], [1, 2], [0, 2]]), np.array([[1, 2], [1, 3], [0, 2]])).value == 2 / 3


@pytest.mark.parametrize(
    ("predicted", "wanted", "message"),
    [
        (np.zeros(3, int), np.zeros(4, int), "one shape"),
        (np.zeros(0, int), np.zeros(0, int), "one shape"),
        (np.zeros(3), np.zeros(3, int), "predicted: must be integer"),
        (np.zeros(3, int), np.zeros(3), "wanted: must be integer"),
    ],
)
def test_bad_classes_are_named(predicted: np.ndarray, wanted: np.ndarray, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        class_accuracy(predicted, wanted)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (3, 10), (930, 1000)])
def test_proportion_interval_is_clopper_and_pearsons(successes: int, trials: int) -> None:
    exact = stats.binomtest(successes, trials).proportion_ci(0.9, method="exact")
    found = proportion_interval(successes, trials, 0.9)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    assert found.covers(successes / trials)


def test_impossible_proportions_and_levels_are_named() -> None:
    for successes, trials in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(StatisticsError, match="proportion"):
            proportion_interval(successes, trials)
    for level in (0.0, 1.0, float("nan")):
        with pytest.raises(StatisticsError, match="level"):
            mean_interval(np.arange(5), level)
    with pytest.raises(StatisticsError, match="at least 2"):
        mean_interval(np.ones(1))


def test_mean_interval_covers_its_level() -> None:
    rng = np.random.default_rng(0)
    covered = sum(mean_interval(rng.normal(2, 3, size=5), 0.8).covers(2) for _ in range(2000))
    assert stats.binomtest(covered, 2000, 0.8).pvalue > 0.001
