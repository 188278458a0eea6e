"""The interval of a KID difference: jackknife against brute force, coverage on fresh draws, margin and verdict."""

import numpy as np
import pytest
from scipy import stats

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.interval import Interval
from ado_tasks.metrics.kernel import kernel_sums, kid, real_sums
from ado_tasks.metrics.noninferiority import (
    kid_difference,
    kid_interval,
    margin,
    non_inferior,
)


def test_difference_is_the_difference() -> None:
    rng = np.random.default_rng(0)
    student, teacher, real = rng.normal(size=(30, 4)), rng.normal(size=(30, 4)), rng.normal(size=(20, 4))
    interval = kid_difference(student, teacher, real)
    assert interval.value == pytest.approx(kid(student, real) - kid(teacher, real), rel=1e-9)
    assert interval.low < interval.value < interval.high
    turned = kid_difference(teacher, student, real)
    assert (turned.low, turned.high) == pytest.approx((-interval.high, -interval.low))


def jackknife(values: list[float]) -> float:
    return (len(values) - 1) * float(np.var(values))


def interaction(table: np.ndarray) -> float:
    """Variance of the mean of table (n, G) that neither rows nor columns explain: two-way analysis of variance."""
    n, count = table.shape
    left = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    return float(np.sum(left**2)) / ((n - 1) * (count - 1)) / (n * count)


def half_width(noise: list[float], real: list[float], both: float) -> float:
    a, b = jackknife(noise), jackknife(real)
    total = max(a + b - both, a, b)
    freedom = total**2 / (a**2 / (len(noise) - 1) + b**2 / (len(real) - 1))
    return float(stats.t.ppf(0.975, freedom)) * np.sqrt(total)


@pytest.mark.parametrize("groups", [None, np.array([0, 0, 1, 2, 2, 2, 3, 4, 4])])
def test_interval_equals_brute_force_delete_one(groups: np.ndarray | None) -> None:
    rng = np.random.default_rng(1)
    student, teacher, real = rng.normal(size=(12, 3)), rng.normal(size=(12, 3)), 0.4 + rng.normal(size=(9, 3))
    codes = np.arange(9) if groups is None else groups

    def difference(rows: np.ndarray, kept: np.ndarray) -> float:
        return kid(student[rows], real[kept]) - kid(teacher[rows], real[kept])

    def by_block(gram: np.ndarray) -> np.ndarray:
        """What each sample and each block add beyond their own effects, on the scale of the mean."""
        left = gram - gram.mean(axis=1, keepdims=True) - gram.mean(axis=0) + gram.mean()
        labels = np.unique(codes)
        return np.stack([left[:, codes == g].sum(axis=1) for g in labels], axis=1) * len(labels) / len(real)

    def gram(x: np.ndarray) -> np.ndarray:
        return np.array([[(a @ b / 3 + 1) ** 3 for b in real] for a in x])

    everyone, all_real = np.ones(12, bool), np.ones(9, bool)
    noise = [difference(np.arange(12) != i, all_real) for i in range(12)]
    blocks = [difference(everyone, codes != g) for g in np.unique(codes)]
    interval = kid_difference(student, teacher, real, groups=groups)
    both = 4 * interaction(by_block(gram(student) - gram(teacher)))
    assert 0 < both < jackknife(noise) + jackknife(blocks)
    assert (interval.high - interval.low) / 2 == pytest.approx(half_width(noise, blocks, both), rel=1e-9)

    noise = [kid(student[np.arange(12) != i], real, groups=groups) for i in range(12)]
    blocks = [
        kid(student, real[codes != g], groups=None if groups is None else groups[codes != g]) for g in np.unique(codes)
    ]
    single = kid_interval(kernel_sums(student, real), real_sums(real, groups=groups))
    both = 4 * interaction(by_block(gram(student)))
    assert (single.high - single.low) / 2 == pytest.approx(half_width(noise, blocks, both), rel=1e-9)
    assert single.value == pytest.approx(kid(student, real, groups=groups), rel=1e-12)


def test_identical_models_differ_by_exactly_nothing() -> None:
    rng = np.random.default_rng(2)
    same = rng.normal(size=(30, 4))
    assert kid_difference(same, same, rng.normal(size=(20, 4))) == Interval(0.0, 0.0, 0.0)


def test_margin_is_a_tenth_and_must_be_positive() -> None:
    assert margin(0.51) == pytest.approx(0.051)
    for bad in (0.0, -0.2, float("nan"), float("inf")):
        with pytest.raises(StatisticsError, match="margin"):
            margin(bad)
    with pytest.raises(StatisticsError, match="margin"):
        non_inferior(Interval(0, -1, 1), 0.0)


def test_verdict_looks_at_the_upper_end() -> None:
    assert non_inferior(Interval(0.0, -0.1, 0.049), 0.05)
    assert not non_inferior(Interval(-0.1, -0.3, 0.05), 0.05)
    assert not non_inferior(Interval(-0.1, -0.3, 0.06), 0.05)


def test_unequal_noise_and_too_few_samples_are_named() -> None:
    rng = np.random.default_rng(3)
    a, b, real = rng.normal(size=(30, 4)), rng.normal(size=(29, 4)), rng.normal(size=(20, 4))
    with pytest.raises(StatisticsError, match="equal n"):
        kid_difference(a, b, real)
    with pytest.raises(StatisticsError, match="generated: at least 3"):
        kid_difference(a[:2], b[:2], real)
    with pytest.raises(StatisticsError, match="level"):
        kid_difference(a, a, real, level=1.0)
    with pytest.raises(StatisticsError, match="at least 3 groups"):
        kid_interval(kernel_sums(a, real[:2]), real_sums(real[:2]))
