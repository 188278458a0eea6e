"""Precision and recall on sets whose answer is known, against brute force, and what they refuse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics import neighbours
from ado_tasks.metrics.coverage import precision_recall


def brute(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    radii = [sorted(np.delete(row, i))[k - 1] for i, row in enumerate(cdist(manifold, manifold))]
    return float(np.mean([any(d <= r for d, r in zip(row, radii, strict=True)) for row in cdist(points, manifold)]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 40), st.integers(1, 6), st.integers(1, 4), st.integers(1, 50))
def test_equals_brute_force_in_any_blocks(seed: int, n: int, d: int, k: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)), 0.7 + 1.3 * rng.normal(size=(n, d))
    usual = neighbours.BLOCK
    try:
        neighbours.BLOCK = block
        found = precision_recall(x, y, k=k)
    finally:
        neighbours.BLOCK = usual
    assert found.precision == pytest.approx(brute(x, y, k))
    assert found.recall == pytest.approx(brute(y, x, k))


def test_the_same_set_is_perfect_and_a_far_one_worthless() -> None:
    x = np.random.default_rng(0).normal(size=(50, 4))
    same, far = precision_recall(x, x), precision_recall(x + 100, x)
    assert (same.precision, same.recall, same.n) == (1.0, 1.0, 50)
    assert (far.precision, far.recall) == (0.0, 0.0)


def test_a_collapsed_model_is_precise_and_covers_little() -> None:
    rng = np.random.default_rng(1)
    centres = np.repeat([[0.0, 0.0], [50.0, 0.0]], 100, axis=0)
    real = centres + rng.normal(size=(200, 2))
    one_mode = rng.normal(size=(200, 2))
    found = precision_recall(one_mode, real)
    assert found.precision > 0.9
    assert 0.4 < found.recall <= 0.51
    turned = precision_recall(real, one_mode)
    assert (turned.precision, turned.recall) == (found.recall, found.precision)


def test_a_model_with_strays_covers_all_and_is_less_precise() -> None:
    rng = np.random.default_rng(2)
    real = rng.normal(size=(200, 2))
    half_strays = np.concatenate([rng.normal(size=(100, 2)), 1000 + 100 * rng.normal(size=(100, 2))])
    found = precision_recall(half_strays, real)
    assert 0.4 < found.precision <= 0.5
    assert found.recall > 0.85


def test_identical_samples_are_inside_their_own_ball() -> None:
    x = np.full((10, 3), 0.1)
    assert precision_recall(x, x).precision == 1.0


def test_unequal_or_too_few_samples_are_named() -> None:
    x = np.zeros((10, 3))
    with pytest.raises(StatisticsError, match="equal n"):
        precision_recall(x, x[:9])
    with pytest.raises(StatisticsError, match="generated: at least 4"):
        precision_recall(x[:3], x[:3])
    with pytest.raises(StatisticsError, match="k: must be"):
        precision_recall(x, x, k=0)
