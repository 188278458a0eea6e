"""Kernel distance (KID): unbiased squared maximum mean discrepancy of a cubic kernel, from sums that are computed once.

Almost all that follows (the distance, its interval, the difference of two models with its interval) is a function of
row sums of three Gram matrices, O(n) numbers, so the teacher's are computed once and shared by all its students.
"""

from dataclasses import dataclass

import numpy as np

from ado_tasks.metrics.checks import AnyArray, FloatArray, features, group_codes, same_width

BLOCK = 512  # rows and columns of a Gram block: 512 x 512 doubles are 2 MiB, which stays in a core's cache


@dataclass(frozen=True)
class RealSums:
    """Gram sums within the reference, all (m,): `rows` over samples of other groups, `pairs` how many, `groups`."""

    rows: FloatArray
    pairs: FloatArray
    groups: AnyArray


@dataclass(frozen=True)
class KernelSums:
    """A model's features (n, d), those of the reference (m, d), and their Gram sums.

    `rows` (n,): each sample over the model's others. `cross` (n,): each over the reference. `columns` (m,): each real
    one over the model.
    """

    generated: FloatArray
    real: FloatArray
    rows: FloatArray
    cross: FloatArray
    columns: FloatArray


def cubic_kernel(x: FloatArray, y: FloatArray) -> FloatArray:
    """k(x, y) = (x.y / d + 1)^3 for all pairs, (n, d) and (m, d) to (n, m)  (Bińkowski et al. 2018, section 4).

    Standardise the features first: the cube makes raw ReLU features' distances enormous and ruled by a few units.
    """
    base = x @ y.T
    base /= x.shape[1]
    base += 1.0
    cube = base * base
    cube *= base
    return cube


def kid(generated: AnyArray, real: AnyArray, *, groups: AnyArray | None = None) -> float:
    """Unbiased KID of generated (n, d) against real (m, d) features; may be negative, and is never clamped.

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean k(x_i, y_j)  (Gretton et al. 2012, eq. 3). The
    diagonals are left out. `groups` (m,) names the block (a photograph, say) each real sample comes from: pairs inside
    a block are not independent and are left out like the diagonal.
    """
    return kid_from_sums(kernel_sums(generated, real), real_sums(real, groups=groups))


def kid_from_sums(model: KernelSums, real: RealSums) -> float:
    """The same from sums made before."""
    n, m = len(model.cross), len(real.rows)
    within = model.rows.sum() / (n * (n - 1))
    return float(within + real.rows.sum() / real.pairs.sum() - 2 * model.cross.sum() / (n * m))


def kernel_sums(generated: AnyArray, real: AnyArray) -> KernelSums:
    """Row sums of the Gram matrices generated-generated, its diagonal left out, and generated-real, block by block."""
    x, y = features(generated, "generated"), features(real, "real")
    same_width(x, y, "generated, real")
    cross, columns = np.zeros(len(x)), np.zeros(len(y))
    for rows in blocks(len(x)):
        gram = cubic_kernel(x[rows], y)
        cross[rows] = gram.sum(axis=1)
        columns += gram.sum(axis=0)
    return KernelSums(generated=x, real=y, rows=_within(x), cross=cross, columns=columns)


def real_sums(real: AnyArray, *, groups: AnyArray | None = None) -> RealSums:
    """Row sums of the Gram matrix real-real, pairs of the same group (without `groups`: the diagonal) left out."""
    y = features(real, "real")
    codes = group_codes(groups, len(y))
    sizes = np.bincount(codes)
    if len(sizes) == len(y):
        return RealSums(rows=_within(y), pairs=np.full(len(y), len(y) - 1.0), groups=codes)
    rows = np.zeros(len(y))
    for block in blocks(len(y)):
        gram = cubic_kernel(y[block], y)
        gram[codes[block, None] == codes[None, :]] = 0.0
        rows[block] = gram.sum(axis=1)
    return RealSums(rows=rows, pairs=(len(y) - sizes[codes]).astype(np.float64), groups=codes)


def _within(x: FloatArray) -> FloatArray:
    """Row sums of the Gram matrix of x without its diagonal; each block above the diagonal serves twice."""
    sums = np.zeros(len(x))
    cuts = blocks(len(x))
    for position, rows in enumerate(cuts):
        square = cubic_kernel(x[rows], x[rows])
        np.fill_diagonal(square, 0.0)
        sums[rows] += square.sum(axis=1)
        for columns in cuts[position + 1 :]:
            gram = cubic_kernel(x[rows], x[columns])
            sums[rows] += gram.sum(axis=1)
            sums[columns] += gram.sum(axis=0)
    return sums


def blocks(count: int) -> list[slice]:
    """Slices that cut `count` rows in blocks whose Gram matrices stay small."""
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
