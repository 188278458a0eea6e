"""Paired distances by hand, the one-sided test against SciPy and by its size, Holm against its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.paired import holm, paired_distance, paired_less


def test_distance_is_a_mean_over_all_numbers_of_a_sample() -> None:
    target = np.zeros((3, 2, 2, 1), np.float32)
    found = target.copy()
    found[0, 0, 0, 0], found[1] = 2.0, 1.0
    distance = paired_distance(found, target)
    np.testing.assert_allclose(distance.values, [1.0, 1.0, 0.0])
    assert distance.mean == pytest.approx(2 / 3)
    interval = distance.interval()
    half = stats.t.ppf(0.975, 2) * np.std([1, 1, 0], ddof=1) / np.sqrt(3)
    assert (interval.low, interval.high) == pytest.approx((2 / 3 - half, 2 / 3 + half))


def test_distance_takes_features_and_refuses_unlike_shapes() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20, 5))
    assert paired_distance(a, b).mean == pytest.approx(np.mean((a - b) ** 2))
    with pytest.raises(StatisticsError, match="same shape"):
        paired_distance(a, b[:19])
    with pytest.raises(StatisticsError, match="same shape"):
        paired_distance(a.reshape(20, 5, 1), b)
    b[3, 2] = np.inf
    with pytest.raises(StatisticsError, match="target: 1 of 100"):
        paired_distance(a, b)


def test_bytes_do_not_wrap_around() -> None:
    assert paired_distance(np.zeros((2, 3), np.uint8), np.full((2, 3), 255, np.uint8)).mean == 255.0**2


def test_p_is_that_of_scipy_and_looks_one_way() -> None:
    rng = np.random.default_rng(1)
    baseline = rng.exponential(size=80)
    candidate = baseline * 0.9 + 0.1 * rng.normal(size=80)
    p = paired_less(candidate, baseline)
    assert p == pytest.approx(stats.ttest_rel(candidate, baseline, alternative="less").pvalue, rel=1e-9)
    assert p < 0.05
    assert paired_less(baseline, candidate) == pytest.approx(1 - p)


def test_test_keeps_its_level_on_skewed_distances() -> None:
    rng = np.random.default_rng(2)
    rejected = [paired_less(*rng.exponential(size=(2, 256))) < 0.05 for _ in range(2000)]
    assert stats.binomtest(sum(rejected), 2000, 0.05).pvalue > 0.001


def test_differences_that_do_not_vary() -> None:
    values = np.arange(5.0)
    assert paired_less(values, values) == 1.0
    assert paired_less(values - 1, values) == 0.0
    assert paired_less(values + 1, values) == 1.0


def test_bad_values_are_named() -> None:
    with pytest.raises(StatisticsError, match="equal n"):
        paired_less(np.zeros(5), np.zeros(6))
    with pytest.raises(StatisticsError, match="at least 2"):
        paired_less(np.zeros(1), np.zeros(1))
    with pytest.raises(StatisticsError, match="one value a sample"):
        paired_less(np.zeros((5, 2)), np.zeros((5, 2)))
    for bad in ([], [0.5, 1.1], [-0.1], [float("nan")]):
        with pytest.raises(StatisticsError, match="p_values"):
            holm(bad)


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.5))
def test_holm_rejects_what_its_step_down_procedure_rejects(p: list[float], level: float) -> None:
    rejected = [False] * len(p)
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        if p[index] * (len(p) - rank) > level:
            break
        rejected[index] = True
    assert [adjusted <= level for adjusted in holm(p)] == rejected
