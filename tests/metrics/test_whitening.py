"""Whitening: the covariance of what it was made from becomes the identity; what is constant stays so."""

import numpy as np
import pytest

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.whitening import whitening


def correlated(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 5)) @ rng.normal(size=(5, 5)) * [1, 10, 0.1, 1, 1]


def test_covariance_becomes_the_identity() -> None:
    features = correlated(500)
    white = (features - features.mean(axis=0)) @ whitening(features)
    np.testing.assert_allclose(np.cov(white.T), np.eye(5), atol=1e-4)


def test_it_is_symmetric_and_leaves_white_features_alone() -> None:
    features = correlated(500)
    matrix = whitening(features)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-5 * np.abs(matrix).max())
    white = (features - features.mean(axis=0)) @ matrix
    np.testing.assert_allclose(whitening(white), np.eye(5), atol=1e-3)


def test_a_constant_direction_becomes_0() -> None:
    features = correlated(300)
    features[:, 3] = 7
    matrix = whitening(features)
    assert np.isfinite(matrix).all()
    assert max(np.abs(matrix[3]).max(), np.abs(matrix[:, 3]).max()) < 1e-9
    white = (features - features.mean(axis=0)) @ matrix
    np.testing.assert_allclose(np.diag(np.cov(white.T)), [1, 1, 1, 0, 1], atol=1e-4)


@pytest.mark.parametrize("bad", [np.zeros((1, 3)), np.zeros(4), np.full((4, 2), np.nan)])
def test_bad_features_are_a_named_error(bad: np.ndarray) -> None:
    with pytest.raises(StatisticsError, match="whitening"):
        whitening(bad)
