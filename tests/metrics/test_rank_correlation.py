"""Spearman's correlation against SciPy's, and how often its interval holds the truth."""

import numpy as np
import pytest
from scipy import stats

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.rank_correlation import rank_correlation


def test_the_value_is_scipys_ties_included():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 40), rng.integers(0, 7, 40)
    assert rank_correlation(x, y).value == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
    assert rank_correlation(np.exp(x), y) == rank_correlation(x, y)  # ranks alone count


@pytest.mark.parametrize(("r", "n"), [(0.0, 10), (0.6, 10), (0.6, 60), (-0.8, 30)])
def test_the_interval_covers_the_truth_as_often_as_it_says(r, n):
    rng = np.random.default_rng(1)
    truth = 6 / np.pi * np.arcsin(r / 2)  # of a normal pair with correlation r
    covered = 0
    for _ in range(1500):
        x = rng.standard_normal(n)
        covered += rank_correlation(x, r * x + np.sqrt(1 - r * r) * rng.standard_normal(n)).covers(truth)
    assert 0.92 <= covered / 1500 <= 0.985


def test_a_perfect_order_has_an_interval_too():
    found = rank_correlation(np.arange(10), np.arange(10) ** 2)
    assert found.value == found.high == 1.0 and 0.9 < found.low < 1.0
    assert rank_correlation(np.arange(10), -np.arange(10)).low == -1.0


@pytest.mark.parametrize(
    ("x", "y", "named"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], "at least 5"),
        ([1] * 6, range(6), "equal"),
        ([1, 2, 3, 4, np.nan], range(5), "finite"),
    ],
)
def test_what_has_no_order_is_refused(x, y, named):
    with pytest.raises(StatisticsError, match=named):
        rank_correlation(np.array(x, float), np.array(y, float))
