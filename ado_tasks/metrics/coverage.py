"""Improved precision and recall: are samples plausible, and is everything real covered?"""

from dataclasses import dataclass

import numpy as np

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.checks import AnyArray, FloatArray, features, same_count, same_width
from ado_tasks.metrics.neighbours import distance_blocks, kth_within

NEIGHBOURS = 3  # Kynkäänniemi et al. 2019, section 3: k = 3
ROUNDING = 1e-7  # of a distance by way of a matrix product, relative: decides nothing but exact ties


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares of the generated samples inside the real manifold, and of the real inside the generated; n of each."""

    precision: float
    recall: float
    n: int


def precision_recall(generated: AnyArray, real: AnyArray, *, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1-3) of features (n, d) and (n, d), n > k.

    The manifold of a set is the union of balls around its samples that reach to their k-th nearest neighbour in the
    set. Balls shrink as n grows, so both sets must have equal n: `StatisticsError` otherwise.
    """
    if k < 1:
        raise StatisticsError(f"k: must be at least 1, got {k}")
    x, y = features(generated, "generated", minimum=k + 1), features(real, "real", minimum=k + 1)
    same_width(x, y, "generated, real")
    same_count(x, y, "generated, real", "the size of the manifolds depends on n")
    return PrecisionRecall(precision=_inside(x, y, k), recall=_inside(y, x, k), n=len(x))


def _inside(points: FloatArray, manifold: FloatArray, k: int) -> float:
    radii = kth_within(manifold, k) * (1 + ROUNDING)
    inside = [np.any(distances <= radii, axis=1) for _, distances in distance_blocks(points, manifold)]
    return float(np.mean(np.concatenate(inside)))
