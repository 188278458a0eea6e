"""Euclidean distances to nearest neighbours, in blocks of bounded memory."""

from collections.abc import Iterator

import numpy as np

from ado_tasks.metrics.checks import FloatArray

BLOCK = 512  # rows at a time: 512 x 10,000 distances are 40 MB


def distance_blocks(x: FloatArray, y: FloatArray) -> Iterator[tuple[slice, FloatArray]]:
    """Distances from (n, d) to (m, d), some rows of the (n, m) at a time, with the slice that they are.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x.y is off by about 1e-16 (|x|^2 + |y|^2) and can show a copy at a distance of 1e-7
    instead of 0; `nearest` mends it.
    """
    squares = np.einsum("ij,ij->i", y, y)
    for start in range(0, len(x), BLOCK):
        rows = slice(start, min(start + BLOCK, len(x)))
        gram = x[rows] @ y.T
        squared = np.einsum("ij,ij->i", x[rows], x[rows])[:, None] + squares - 2 * gram
        yield rows, np.sqrt(np.maximum(squared, 0.0))


def nearest(x: FloatArray, y: FloatArray) -> FloatArray:
    """Distance (n,) from each x (n, d) to its nearest y (m, d); exactly 0 for a copy."""
    found = np.empty(len(x))
    for rows, distances in distance_blocks(x, y):
        found[rows] = np.linalg.norm(x[rows] - y[distances.argmin(axis=1)], axis=1)
    return found


def kth_within(x: FloatArray, k: int) -> FloatArray:
    """Distance (n,) from each x (n, d) to its k-th nearest among the others, n > k."""
    found = np.empty(len(x))
    for rows, distances in distance_blocks(x, x):
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = np.inf
        found[rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return found
