"""The interval of a KID difference: jackknife against brute force, coverage on fresh draws, margin and verdict."""

from collections.abc import Callable
from functools import partial

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
    samples_needed,
)
from ado_tasks.metrics.simulation import Mixture, independent, naive_bootstrap, run_trials, same_noise, true_kid


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


Pairing = Callable[[Mixture, Mixture, int, np.random.Generator], tuple[np.ndarray, np.ndarray]]


@pytest.mark.parametrize(
    ("shift", "narrower", "pairing"),
    [
        pytest.param(0.0, 1.0, independent, id="A/A, teacher = real"),
        pytest.param(0.2, 1.0, independent, id="A/A, teacher is not real"),
        pytest.param(0.2, 0.6, same_noise, id="student of the same noise"),
        pytest.param(0.0, 0.5, same_noise, id="student of a perfect teacher"),
        pytest.param(0.2, 0.6, independent, id="student of other noise"),
    ],
)
def test_interval_of_fresh_draws_covers_the_truth(
    random_mixture: Callable[..., Mixture], shift: float, narrower: float, pairing: Pairing
) -> None:
    """200 trials; `bench/statistics_coverage.py` runs 1,000 of full size."""
    rng = np.random.default_rng(4)
    real = random_mixture(rng, 4, 16)
    teacher = real.moved(np.full(16, shift))
    student = teacher.narrowed(narrower)
    truth = true_kid(student, real) - true_kid(teacher, real)
    trials = run_trials(truth, 200, partial(pairing, student, teacher, 400, rng), partial(real.draw, 100, rng))
    assert trials.covered() >= 0.93 * 200
    width = np.mean([one.high - one.low for one in trials.intervals]) / 2 / 1.96
    assert width < 1.3 * trials.spread()  # the jackknife without the part counted twice: 1.35 to 1.4 in the first case
    assert np.mean([one.value for one in trials.intervals]) == pytest.approx(truth, abs=4 * trials.spread() / 200**0.5)


def test_naive_bootstrap_fails_where_this_interval_holds(random_mixture: Callable[..., Mixture]) -> None:
    rng = np.random.default_rng(5)
    real = random_mixture(rng, 4, 16)
    student = real.narrowed(0.3)
    truth = true_kid(student, real)
    pair, reference = partial(same_noise, student, real, 100, rng), partial(real.draw, 300, rng)
    naive = partial(naive_bootstrap, draws=100, rng=rng)
    assert run_trials(truth, 150, pair, reference).covered() >= 0.93 * 150
    assert run_trials(truth, 150, pair, reference, naive).covered() < 0.8 * 150


def test_interval_of_one_kid_covers_and_the_naive_one_does_not(random_mixture: Callable[..., Mixture]) -> None:
    rng = np.random.default_rng(6)
    real = random_mixture(rng, 4, 16)
    model = real.moved(np.full(16, 0.3))
    for generated in (real, model):
        pair, reference = partial(independent, generated, generated, 300, rng), partial(real.draw, 150, rng)

        def ours(x: np.ndarray, _: np.ndarray, y: np.ndarray) -> Interval:
            return kid_interval(kernel_sums(x, y), real_sums(y))

        assert run_trials(true_kid(generated, real), 150, pair, reference, ours).covered() >= 0.93 * 150

    def naive(x: np.ndarray, _: np.ndarray, y: np.ndarray) -> Interval:
        return naive_bootstrap(x, None, y, draws=100, rng=rng)

    pair = partial(independent, real, real, 300, rng)
    assert run_trials(0.0, 60, pair, partial(real.draw, 150, rng), naive).covered() < 0.2 * 60


def test_reference_in_blocks_needs_groups(random_mixture: Callable[..., Mixture]) -> None:
    rng = np.random.default_rng(7)
    real = random_mixture(rng, 4, 16)
    student = real.moved(np.full(16, 0.2))
    truth = true_kid(student, real)
    pair = partial(same_noise, student, real, 400, rng)
    reference = partial(real.draw_blocks, 40, 5, 0.8, rng)
    by_block = partial(kid_difference, groups=np.arange(200) // 5)
    assert run_trials(truth, 200, pair, reference, by_block).covered() >= 0.92 * 200  # 40 blocks, not 400 samples
    assert run_trials(truth, 200, pair, reference).covered() < 0.85 * 200


def test_same_noise_narrows_the_interval(random_mixture: Callable[..., Mixture]) -> None:
    rng = np.random.default_rng(8)
    real = random_mixture(rng, 4, 16)
    student = real.narrowed(0.95)
    reference = real.draw(100, rng)
    paired = kid_difference(*same_noise(student, real, 400, rng), reference)
    apart = kid_difference(*independent(student, real, 400, rng), reference)
    assert paired.high - paired.low < 0.3 * (apart.high - apart.low)


def test_samples_needed_give_an_aa_pair_its_power(random_mixture: Callable[..., Mixture]) -> None:
    rng = np.random.default_rng(9)
    teacher = random_mixture(rng, 4, 16)
    real = teacher.moved(np.full(16, 0.3))
    reference = partial(real.draw, 150, rng)
    few = run_trials(0.0, 100, partial(independent, teacher, teacher, 100, rng), reference)
    widths = sorted(few.intervals, key=lambda one: one.high - one.low)
    limit = 1.2 * few.spread()
    assert few.passed(limit) < 0.5 * 100
    n = samples_needed(widths[50], 100, limit)
    assert 400 < n < 1000
    assert run_trials(0.0, 100, partial(independent, teacher, teacher, n, rng), reference).passed(limit) >= 0.75 * 100
    assert samples_needed(widths[50], 100, 100 * limit) == 100


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
