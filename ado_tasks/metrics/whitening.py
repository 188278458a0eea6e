"""Whitening: features in which the training images spread alike in every direction.

A classifier's features spread most along what tells classes apart, and a polynomial kernel of them hears little else.
In whitened features (Mahalanobis' distance in the place of Euclid's) KID tells teacher and student apart with a tenth
of the samples (JOURNAL.md, 2026-11-24).
"""

import numpy as np
import numpy.typing as npt

from ado_tasks.errors import StatisticsError

SMALLEST = 1e-6  # of the largest variance: below it a direction is constant, and its noise is not blown up


def whitening(features: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """The symmetric W with which centred features become white: W = C^(-1/2) for their covariance C.

    The nearest white features to the given ones (ZCA: Kessy, Lewin & Strimmer 2018, eq. 12). Directions in which the
    features do not vary become 0.

    Args:
        features: (n, d), of the train part.

    Returns:
        (d, d) float32; `(x - mean) @ W` has the identity as covariance over the given features.

    Raises:
        StatisticsError: fewer than two images, or a feature that is not finite.
    """
    if features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all():
        raise StatisticsError(f"whitening needs finite features (n >= 2, d), got {features.shape}")
    covariance = np.atleast_2d(np.cov(features.astype(np.float64).T))
    variances, directions = np.linalg.eigh(covariance)
    alive = variances > SMALLEST * max(float(variances[-1]), 0.0)
    scale = np.where(alive, 1 / np.sqrt(np.where(alive, variances, 1)), 0)
    return ((directions * scale) @ directions.T).astype(np.float32)
