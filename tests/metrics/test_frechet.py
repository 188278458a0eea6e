"""Fréchet distance against closed forms, its invariances, its floor, and what excess it finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.frechet import _halves, excess, floor, frechet_distance, half_size


def with_moments(rng: np.random.Generator, n: int, mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """Samples whose sample mean and unbiased sample covariance are exactly those given."""
    raw = rng.normal(size=(n, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    values, vectors = np.linalg.eigh(cov)
    return mean + white @ (vectors * np.sqrt(np.maximum(values, 0))).T


def covariance(rng: np.random.Generator, d: int, rank: int) -> np.ndarray:
    root = rng.normal(size=(rank, d))
    return root.T @ root / rank


def test_equals_closed_form_of_commuting_gaussians() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    s, t, shift = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6), rng.normal(size=6)
    a = with_moments(rng, 50, np.zeros(6), basis @ np.diag(s**2) @ basis.T)
    b = with_moments(rng, 50, shift, basis @ np.diag(t**2) @ basis.T)
    assert frechet_distance(a, b) == pytest.approx(np.sum(shift**2) + np.sum((s - t) ** 2), rel=1e-10)


def test_equals_matrix_square_root_for_any_gaussians() -> None:
    rng = np.random.default_rng(1)
    mean_a, mean_b = rng.normal(size=(2, 8))
    cov_a, cov_b = covariance(rng, 8, 12), covariance(rng, 8, 20)
    a, b = with_moments(rng, 64, mean_a, cov_a), with_moments(rng, 64, mean_b, cov_b)
    truth = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(truth, rel=1e-9)


def test_rank_deficient_covariances_keep_full_precision() -> None:
    rng = np.random.default_rng(2)
    values, scale = rng.normal(size=(10, 40)), rng.uniform(0.5, 2.0)  # n < d: rank 9 of 40
    values -= values.mean(axis=0)
    values[:, 7] = 0.0  # a dead feature
    truth = (1 - scale) ** 2 * np.trace(np.cov(values, rowvar=False))
    assert frechet_distance(values, scale * values) == pytest.approx(truth, rel=1e-10)


def test_disjoint_supports_add_their_traces() -> None:
    rng = np.random.default_rng(3)
    a, b = np.zeros((20, 6)), np.zeros((20, 6))
    a[:, :3], b[:, 3:] = rng.normal(size=(2, 20, 3))
    traces = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False))
    assert frechet_distance(a, b) == pytest.approx(traces + np.sum((a.mean(0) - b.mean(0)) ** 2), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 12))
def test_invariances(seed: int, n: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, d)), 0.5 + 2 * rng.normal(size=(n, d))
    rotation, shift = np.linalg.qr(rng.normal(size=(d, d)))[0], rng.normal(size=d)
    value = frechet_distance(a, b)
    near = pytest.approx(value, rel=1e-8, abs=1e-8)
    assert value >= 0
    assert frechet_distance(b, a) == near
    assert frechet_distance(a[rng.permutation(n)] @ rotation + shift, b @ rotation + shift) == near
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * value, rel=1e-8, abs=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_float32_features_are_summed_in_float64() -> None:
    rng = np.random.default_rng(4)
    a, b = (1000 + rng.normal(size=(2, 100, 5))).astype(np.float32)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a.astype(float), b.astype(float)), rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((10, 3)), np.zeros((11, 3)), "equal n"),
        (np.zeros((10, 3)), np.zeros((10, 4)), "same number of features"),
        (np.zeros((1, 3)), np.zeros((1, 3)), "at least 2"),
        (np.full((10, 3), np.nan), np.zeros((10, 3)), "a: 30 of 30 values are not finite"),
        (np.zeros((10, 3)), np.full((10, 3), np.inf), "b: 30"),
        (np.zeros((10, 3, 1)), np.zeros((10, 3)), "shape"),
        (np.array([["x"], ["y"]]), np.zeros((2, 1)), "real numbers"),
    ],
)
def test_bad_input_is_named(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        frechet_distance(a, b)


def test_floor_is_the_mean_over_halves_and_repeats_with_its_seed() -> None:
    real = np.random.default_rng(5).normal(size=(201, 4))
    first, again = (floor(real, draws=60, rng=np.random.default_rng(6)) for _ in range(2))
    assert first == again
    assert (first.n, first.draws) == (100, 60)
    assert 0 < first.low < first.mean < first.high
    fresh = np.random.default_rng(7)
    independent = [frechet_distance(*fresh.normal(size=(2, 100, 4))) for _ in range(300)]
    assert first.mean == pytest.approx(np.mean(independent), rel=0.15)


def test_floor_halves_are_disjoint() -> None:
    # One far outlier: disjoint halves never share it, so every distance is large.
    real = np.random.default_rng(8).normal(size=(20, 1))
    real[0] = 1000.0
    assert floor(real, draws=50, rng=np.random.default_rng(9)).low > 5000


def test_halves_share_no_group() -> None:
    # Ten groups of unequal size, each far from the others: a group in both halves would bring them near one another.
    rng = np.random.default_rng(10)
    groups = rng.permutation(np.repeat(np.arange(10), [2, 7, 3, 3, 5, 1, 4, 2, 6, 7]))
    real = 1000.0 * 2.0 ** groups[:, None]
    for half, other in _halves(real, groups, 50, rng):
        assert len(half) == len(other) == (40 - 6) // 2 == half_size(groups)
        assert not set(half[:, 0]) & set(other[:, 0])


def test_without_groups_the_halves_are_those_of_single_samples() -> None:
    real = np.random.default_rng(5).normal(size=(51, 2))
    rng = np.random.default_rng(0)
    order = np.random.default_rng(0).permutation(51)
    half, other = next(_halves(real, np.arange(51), 1, rng))
    np.testing.assert_array_equal(half, real[order[:25]])
    np.testing.assert_array_equal(other, real[order[25:50]])


def test_groups_raise_the_floor_of_samples_that_depend_on_one_another() -> None:
    """20 groups of 10 samples that share 90 % of their variance: the floor is that of few samples, not of 200."""
    rng = np.random.default_rng(16)
    groups = np.repeat(np.arange(20), 10)
    real = np.sqrt(0.9) * rng.normal(size=(20, 4))[groups] + np.sqrt(0.1) * rng.normal(size=(200, 4))
    naive, honest = (floor(real, draws=50, rng=np.random.default_rng(17), groups=g) for g in (None, groups))
    assert honest.mean > 3 * naive.mean
    beside = excess(real, real, real, draws=50, rng=np.random.default_rng(17), groups=groups)
    assert beside.n == honest.n == (200 - 9) // 2
    assert beside.floor.mean > 3 * naive.mean


def test_one_group_that_holds_too_much_is_named() -> None:
    with pytest.raises(StatisticsError, match="groups: one holds so much of 10 samples"):
        floor(np.random.default_rng(0).normal(size=(10, 2)), draws=50, rng=np.random.default_rng(0),
              groups=np.array([0] * 8 + [1, 2]))  # fmt: skip


def test_excess_vanishes_for_fresh_samples_and_shows_a_shift() -> None:
    same, shifted = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        real, train, fresh = rng.normal(size=(400, 8)), rng.normal(size=(1000, 8)), rng.normal(size=(2000, 8))
        same.append(excess(fresh, train, real, draws=50, rng=np.random.default_rng(11)))
        shifted.append(excess(fresh + 0.25, train, real, draws=50, rng=np.random.default_rng(11)))
    # Spread of one excess over data sets, measured on 40 others: 0.019 without and 0.083 with the shift.
    assert abs(np.mean([one.excess for one in same])) < 4 * 0.019 / np.sqrt(10)
    assert abs(np.mean([one.excess for one in shifted]) - 8 * 0.25**2) < 4 * 0.083 / np.sqrt(10)
    one = shifted[0]
    assert (one.n, one.draws, one.floor.n) == (200, 50, 200)
    assert one.low < one.excess < one.high
    assert one.excess == pytest.approx(one.model - one.train)
    assert one.ratio == pytest.approx(one.excess / one.floor.mean)
    assert one.over_floor == pytest.approx(one.model - one.floor.mean)
    assert not one.below_floor


def test_leaked_report_images_show_as_a_distance_below_the_floor() -> None:
    rng = np.random.default_rng(12)
    real, train = rng.normal(size=(400, 8)), rng.normal(size=(1000, 8))
    leaked = excess(real[:200], train, real, draws=50, rng=np.random.default_rng(13))
    honest = excess(rng.normal(size=(200, 8)), train, real, draws=50, rng=np.random.default_rng(13))
    assert leaked.below_floor
    assert leaked.excess < 0
    assert not honest.below_floor


def test_too_few_draws_or_samples_are_named() -> None:
    real = np.random.default_rng(14).normal(size=(100, 3))
    rng = np.random.default_rng(15)
    with pytest.raises(StatisticsError, match="draws: at least 50"):
        floor(real, draws=49, rng=rng)
    with pytest.raises(StatisticsError, match="train: at least 50 samples"):
        excess(real, real[:49], real, draws=50, rng=rng)
    with pytest.raises(StatisticsError, match="real: all samples are the same"):
        floor(np.ones((100, 3)), draws=50, rng=rng)
