"""Is a student as good as its teacher? The interval of a KID difference, the margin, and the verdict."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.checks import AnyArray, FloatArray, group_codes
from ado_tasks.metrics.interval import LEVEL, Interval, check_level
from ado_tasks.metrics.kernel import KernelSums, RealSums, blocks, cubic_kernel, kernel_sums, kid_from_sums

MARGIN_SHARE = 0.10  # docs/science.md, Metrics: 10 % of what 4 instead of 50 teacher steps lose
MIN_NOISE = 3  # a delete-one jackknife of a statistic over pairs needs two samples left


def kid_difference(
    student: AnyArray, teacher: AnyArray, real: AnyArray, *, groups: AnyArray | None = None, level: float = LEVEL
) -> Interval:
    """KID(student) - KID(teacher) with its interval, on features (n, d), (n, d) and (m, d).

    Row i of student and of teacher are resampled together (noise index i; where the noises are independent this costs
    nothing), and the reference jointly for both. See `difference_from_sums`.
    """
    student_sums, teacher_sums = kernel_sums(student, real), kernel_sums(teacher, real)
    return difference_from_sums(student_sums, teacher_sums, groups=groups, level=level)


def difference_from_sums(
    student: KernelSums, teacher: KernelSums, *, groups: AnyArray | None = None, level: float = LEVEL
) -> Interval:
    """KID(student) - KID(teacher) from sums against one reference: a corrected delete-one jackknife, Student's t.

    The within-reference term is common to both and cancels. The variance is V_noise + V_real - V_both, never under
    V_noise or V_real alone. V_noise = (n-1)/n sum_i (D_(-i) - mean)^2, deleting noise index i from student and teacher
    (Arvesen 1969, U-statistics of several samples); V_real the same, deleting reference sample j (with `groups`: block
    g); V_both is the part of the cross term that hangs on both at once, which either jackknife has counted. Degrees of
    freedom: Welch & Satterthwaite.

    Why this one, by coverage measured with `bench/statistics_coverage.py`: where teacher = real the linear part
    vanishes. The jackknife without V_both is then 1.35 times as wide as the spread, with it 1.15 times, and covers 99
    %; elsewhere 95 to 97 %. Without the lower bound V_both, a product of few directions, can exceed the rest: 85 % at n
    = 500, m = 100. A naive bootstrap puts duplicates on the diagonal, which shifts every KID by (mean k(x, x) - mean
    k(x, y)) / n: it covers one model's KID in no trial, and the shifts cancel in a difference only while both models
    spread alike.
    """
    n, m = len(student.cross), len(student.columns)
    if n != len(teacher.cross):
        counts = f"{n} and {len(teacher.cross)}"
        raise StatisticsError(f"student, teacher: must have equal n (one noise index), got {counts}")
    if not np.array_equal(student.real, teacher.real):
        raise StatisticsError("student, teacher: their sums were made with different references")
    codes = group_codes(groups, m)
    rows, cross, columns = student.rows - teacher.rows, student.cross - teacher.cross, student.columns - teacher.columns
    value = float(_generated_part(rows.sum(), cross.sum(), n, m))
    noise = _jackknife_variance(_without_noise(rows, cross, m))
    real = _jackknife_variance(-2 * _mean_without(columns, codes) / n)
    return _interval(value, _Variance(noise, real, _both(student, teacher, codes), n, int(codes.max()) + 1), level)


def kid_interval(model: KernelSums, real: RealSums, *, level: float = LEVEL) -> Interval:
    """KID of one model with its interval, made the same way; the groups are those `real` was summed with.

    Conservative where the model is as good as real: there the pairs within the reference dominate, and are counted
    twice.
    """
    n, m = len(model.cross), len(real.rows)
    if len(model.columns) != m:
        raise StatisticsError(f"model, real: the model was summed over {len(model.columns)} real samples, not {m}")
    # Deleting a block takes each of its pairs with other blocks out twice: (i, j) and (j, i).
    rows, pairs = np.bincount(real.groups, real.rows), np.bincount(real.groups, real.pairs)
    left = real.pairs.sum() - 2 * pairs
    if np.any(left <= 0):
        raise StatisticsError("real: at least 3 groups (or samples) are needed for an interval of KID")
    without_real = (real.rows.sum() - 2 * rows) / left - 2 * _mean_without(model.columns, real.groups) / n
    noise = _jackknife_variance(_without_noise(model.rows, model.cross, m))
    variance = _Variance(noise, _jackknife_variance(without_real), _both(model, None, real.groups), n, len(rows))
    return _interval(kid_from_sums(model, real), variance, level)


def margin(kid_teacher4_minus_teacher50: float) -> float:
    """The margin of non-inferiority: 10 % of KID(teacher, 4 DDIM steps) - KID(teacher, 50 steps).

    Frozen before any student is trained.

    `StatisticsError` where it is not positive: then 50 steps are no better than 4 and there is nothing to preserve.
    """
    value = MARGIN_SHARE * kid_teacher4_minus_teacher50
    _check_margin(value)
    return value


def non_inferior(interval: Interval, margin: float) -> bool:
    """Whether the upper end of the interval of KID(student) - KID(teacher) lies under the margin (> 0)."""
    _check_margin(margin)
    return interval.high < margin


def samples_needed(same: Interval, n: int, margin: float, *, power: float = 0.8, level: float = LEVEL) -> int:
    """How many samples make an A/A pair (`same`, its interval at n; same teacher, independent noise) pass with `power`.

    It passes when D + z_level se < margin, D ~ N(0, se^2), so se must be margin / (z_level + z_power); se falls at
    least as n^-1/2. Never less than n: the margin is frozen, n is what may be raised.
    """
    _check_margin(margin)
    check_level(level)
    check_level(power)
    quantile = float(stats.norm.ppf(0.5 + level / 2))
    error = (same.high - same.low) / (2 * quantile)
    wanted = margin / (quantile + float(stats.norm.ppf(power)))
    return max(n, math.ceil(n * (error / wanted) ** 2))


def _check_margin(value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise StatisticsError(f"margin: must be positive, got {value}; the KID of few steps must exceed that of many")


def _generated_part(rows: AnyArray, cross: AnyArray, n: int, m: int) -> AnyArray:
    return rows / (n * (n - 1)) - 2 * cross / (n * m)


def _without_noise(rows: FloatArray, cross: FloatArray, m: int) -> FloatArray:
    """What generated samples add to KID, (n,), each noise index deleted in turn: its row and its column go."""
    n = len(rows)
    if n < MIN_NOISE:
        raise StatisticsError(f"generated: at least {MIN_NOISE} samples are needed for an interval, got {n}")
    return _generated_part(rows.sum() - 2 * rows, cross.sum() - cross, n - 1, m)


def _mean_without(values: FloatArray, codes: AnyArray) -> FloatArray:
    """Mean of values (m,) with each group deleted in turn, (G,)."""
    return (values.sum() - np.bincount(codes, values)) / (len(values) - np.bincount(codes))


def _jackknife_variance(without: FloatArray) -> float:
    """(n-1)/n sum_i (theta_(-i) - mean)^2  (Tukey 1958)."""
    return float((len(without) - 1) * without.var())


def _both(student: KernelSums, teacher: KernelSums | None, codes: AnyArray) -> float:
    """Variance of the part of -2 mean_ij g(i, j) that is left when the effects of i alone and of j alone are taken out.

    g = k(s_i, y_j) - k(t_i, y_j), centred over rows and columns: the interaction of a two-way analysis of variance with
    the blocks of the reference as columns: 4 / (n (n-1)) G / (G-1) sum_ig (sum_{j in g} g~_ij / m)^2.
    """
    n, m, count = len(student.cross), len(student.columns), int(codes.max()) + 1
    cross, columns = student.cross, student.columns
    if teacher is not None:
        cross, columns = cross - teacher.cross, columns - teacher.columns
    by_row, by_column = cross / m, (columns - columns.mean()) / n
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(count))
    total = 0.0
    for rows in blocks(n):
        gram = cubic_kernel(student.generated[rows], student.real)
        if teacher is not None:
            gram -= cubic_kernel(teacher.generated[rows], teacher.real)
        gram -= by_row[rows, None]
        gram -= by_column
        part = gram if count == m else np.add.reduceat(gram[:, order], starts, axis=1)
        total += float(np.vdot(part, part))
    return 4 * total / m**2 / (n * (n - 1)) * count / (count - 1)


@dataclass(frozen=True)
class _Variance:
    """Jackknife variances over noise and over the reference, what both counted, and how many were deleted in turn."""

    noise: float
    real: float
    both: float
    n: int
    groups: int


def _interval(value: float, variance: _Variance, level: float) -> Interval:
    check_level(level)
    total = max(variance.noise + variance.real - variance.both, variance.noise, variance.real)
    if total == 0.0:
        return Interval(value, value, value)
    freedom = total**2 / (variance.noise**2 / (variance.n - 1) + variance.real**2 / (variance.groups - 1))
    half = float(stats.t.ppf(0.5 + level / 2, freedom)) * math.sqrt(total)
    return Interval(value, value - half, value + half)
