"""The mixtures that coverage is measured with: what they draw, what is paired, and what their exact distance is."""

from collections.abc import Callable

import numpy as np
import pytest

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.interval import Interval
from ado_tasks.metrics.simulation import Mixture, Trials, expected_kernel, run_trials, same_noise, true_kid

Make = Callable[[np.random.Generator, int, int], Mixture]


def test_fitted_mixture_has_the_moments_of_the_features() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(-2, 0.5, size=(300, 3)), rng.normal(1, 1.0, size=(600, 3))])
    drawn = Mixture.fitted(values, 2, seed=0).draw(20_000, rng)
    np.testing.assert_allclose(drawn.mean(axis=0), values.mean(axis=0), atol=0.06)
    np.testing.assert_allclose(np.cov(drawn, rowvar=False), np.cov(values, rowvar=False), atol=0.15)


def test_expected_kernel_is_the_mean_over_draws(random_mixture: Make) -> None:
    rng = np.random.default_rng(1)
    p, q = random_mixture(rng, 3, 4), random_mixture(rng, 2, 4)
    x, y = p.draw(200_000, rng), q.draw(200_000, rng)
    values = (np.sum(x * y, axis=1) / 4 + 1) ** 3
    assert abs(values.mean() - expected_kernel(p, q)) < 4 * values.std() / np.sqrt(len(values))
    assert true_kid(p, p) == 0.0
    assert true_kid(p, q) == pytest.approx(true_kid(q, p))
    assert true_kid(p, q) > 0


def test_expected_kernel_of_two_gaussians_by_their_moments() -> None:
    """Independent coordinates: E x_i^k and E y_i^k are known, u = x_1 y_1 + x_2 y_2; then everything is turned."""
    rng = np.random.default_rng(8)
    a, b = rng.uniform(0.5, 2, size=(2, 2))
    s, t = rng.uniform(0.5, 2, size=(2, 2))
    one, two, three = a * b, (a**2 + s**2) * (b**2 + t**2), (a**3 + 3 * a * s**2) * (b**3 + 3 * b * t**2)
    square = two.sum() + 2 * one.prod()
    cube = three.sum() + 3 * two[0] * one[1] + 3 * two[1] * one[0]
    truth = 1 + 3 * one.sum() / 2 + 3 * square / 4 + cube / 8
    turn = np.linalg.qr(rng.normal(size=(2, 2)))[0]
    p = Mixture(np.ones(1), (turn @ a)[None], (turn * s)[None])
    q = Mixture(np.ones(1), (turn @ b)[None], (turn * t)[None])
    assert expected_kernel(p, q) == pytest.approx(truth, rel=1e-12)


def test_narrowed_and_moved_keep_what_they_should(random_mixture: Make) -> None:
    p = random_mixture(np.random.default_rng(2), 3, 4)
    np.testing.assert_allclose(p.moved(np.ones(4)).mean(), p.mean() + 1)
    np.testing.assert_allclose(p.narrowed(0.5).mean(), p.mean())
    near, far = same_noise(p.narrowed(0.5), p, 50, np.random.default_rng(3))
    assert near.std() < far.std()
    np.testing.assert_allclose(*same_noise(p.moved(np.ones(4)), p.moved(np.ones(4)), 50, np.random.default_rng(4)))
    with pytest.raises(StatisticsError, match="same components"):
        same_noise(random_mixture(np.random.default_rng(5), 2, 4), p, 50, np.random.default_rng(6))


def test_blocks_share_what_they_should_and_stay_distributed_as_the_mixture() -> None:
    rng = np.random.default_rng(7)
    one = Mixture(np.ones(1), np.zeros((1, 2)), np.diag([1.0, 3.0])[None])
    drawn = one.draw_blocks(20_000, 2, 0.6, rng).reshape(20_000, 2, 2)
    np.testing.assert_allclose(drawn.std(axis=(0, 1)), [1, 3], rtol=0.03)
    for axis in range(2):
        assert np.corrcoef(drawn[:, 0, axis], drawn[:, 1, axis])[0, 1] == pytest.approx(0.6, abs=0.03)


def test_trials_count_what_they_say() -> None:
    intervals = (Interval(0.0, -1.0, 1.0), Interval(1.0, 0.5, 1.5), Interval(2.0, 1.0, 3.0))
    trials = Trials(0.7, intervals)
    assert (trials.covered(), trials.passed(1.5), trials.passed(4.0)) == (2, 1, 3)
    assert trials.spread() == 1.0
    pair = iter([(np.full(1, i), np.full(1, 10 * i)) for i in range(3)])
    made = run_trials(
        0.0, 3, lambda: next(pair), lambda: np.ones(1), lambda s, t, r: Interval(s[0] + t[0] + r[0], 0, 0)
    )
    assert [one.value for one in made.intervals] == [1, 12, 23]
