"""KID against a brute-force U-statistic and the closed form for mixtures; unbiased, not clamped, blocks agree."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics import kernel
from ado_tasks.metrics.kernel import kernel_sums, kid, kid_from_sums, real_sums
from ado_tasks.metrics.simulation import Mixture, true_kid


def brute_kid(x: np.ndarray, y: np.ndarray, groups: np.ndarray | None = None) -> float:
    """The definition, one pair at a time."""
    labels = np.arange(len(y)) if groups is None else groups

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    within = np.mean([k(x[i], x[j]) for i, j in itertools.permutations(range(len(x)), 2)])
    apart = [(i, j) for i, j in itertools.permutations(range(len(y)), 2) if labels[i] != labels[j]]
    real = np.mean([k(y[i], y[j]) for i, j in apart])
    return float(within + real - 2 * np.mean([k(a, b) for a in x for b in y]))


@pytest.mark.parametrize("grouped", [False, True])
def test_equals_brute_force(grouped: bool) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(13, 5)), 0.3 + rng.normal(size=(9, 5))
    groups = np.array([4, 4, 7, 7, 7, 1, 2, 2, 4]) if grouped else None
    assert kid(x, y, groups=groups) == pytest.approx(brute_kid(x, y, groups), rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(2, 40), st.integers(1, 9), st.integers(1, 50))
def test_blocks_do_not_change_the_sums(seed: int, n: int, m: int, d: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(m, d))
    whole, groups = kernel_sums(x, y), np.arange(m) // 2 if m > 2 else None
    real, usual = real_sums(y, groups=groups), kernel.BLOCK
    try:
        kernel.BLOCK = block
        pieces, pieces_real = kernel_sums(x, y), real_sums(y, groups=groups)
    finally:
        kernel.BLOCK = usual
    for name in ("rows", "cross", "columns"):
        np.testing.assert_allclose(getattr(pieces, name), getattr(whole, name), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(pieces_real.rows, real.rows, rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_invariant_to_order_and_rotation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(20, 4)), rng.normal(size=(15, 4))
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    value = kid(x, y)
    assert kid(x[rng.permutation(20)] @ rotation, y[rng.permutation(15)] @ rotation) == pytest.approx(value, abs=1e-9)
    assert kid(y, x) == pytest.approx(value, abs=1e-9)


def test_unbiased_and_below_zero_half_the_time() -> None:
    rng = np.random.default_rng(1)
    values = np.array([kid(rng.normal(size=(40, 6)), rng.normal(size=(30, 6))) for _ in range(2000)])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    assert np.mean(values < 0) > 0.4  # a clamped or biased estimate would show none


def test_mean_is_the_closed_form_for_mixtures(random_mixture: Callable[..., Mixture]) -> None:
    rng = np.random.default_rng(2)
    p, q = random_mixture(rng, 3, 5), random_mixture(rng, 2, 5)
    values = np.array([kid(p.draw(60, rng), q.draw(40, rng)) for _ in range(2000)])
    assert abs(values.mean() - true_kid(p, q)) < 4 * values.std() / np.sqrt(len(values))


def test_pairs_of_one_photograph_bias_kid_unless_left_out() -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(10), 6)
    plain, blocked = [], []
    for _ in range(400):
        y = rng.normal(size=(10, 5))[groups] * np.sqrt(0.8) + rng.normal(size=(60, 5)) * np.sqrt(0.2)
        x = rng.normal(size=(60, 5))
        sums = kernel_sums(x, y)
        plain.append(kid_from_sums(sums, real_sums(y)))
        blocked.append(kid_from_sums(sums, real_sums(y, groups=groups)))
    assert np.mean(plain) > 5 * np.std(plain) / 20
    assert abs(np.mean(blocked)) < 4 * np.std(blocked) / 20


@pytest.mark.parametrize(
    ("x", "y", "groups", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), None, "generated: at least 2"),
        (np.zeros((5, 3)), np.zeros((1, 3)), None, "real: at least 2"),
        (np.zeros((5, 3)), np.zeros((5, 2)), None, "same number of features"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), None, "not finite"),
        (np.zeros((5, 3)), np.zeros((5, 3)), np.zeros(4), "one label a real sample"),
        (np.zeros((5, 3)), np.zeros((5, 3)), np.zeros(5), "at least 2 different groups"),
    ],
)
def test_bad_input_is_named(x: np.ndarray, y: np.ndarray, groups: np.ndarray | None, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        kid(x, y, groups=groups)
