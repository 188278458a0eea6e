"""Is a student as good as its teacher? The interval of a KID difference, the margin, and the verdict."""

import math

import numpy as np
from scipy import stats

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.checks import AnyArray, FloatArray
from ado_tasks.metrics.interval import LEVEL, Interval, check_level
from ado_tasks.metrics.kernel import KernelSums, RealSums, group_codes, kernel_sums, kid_from_sums, real_sums

MARGIN_SHARE = 0.10  # science.md section 7: 10 % of what 4 instead of 50 teacher steps lose
MIN_NOISE = 3  # a delete-one jackknife of a statistic over pairs needs two samples left


def kid_difference(
    student: AnyArray, teacher: AnyArray, real: AnyArray, *, groups: AnyArray | None = None, level: float = LEVEL
) -> Interval:
    """KID(student) - KID(teacher) with its interval, on features (n, d), (n, d) and (m, d).

    Row i of student and of teacher are resampled together (noise index i; where the noises are independent this costs nothing),
    and the reference jointly for both. See `difference_from_sums`.
    """
    student_sums, teacher_sums = kernel_sums(student, real), kernel_sums(teacher, real)
    return difference_from_sums(student_sums, teacher_sums, groups=groups, level=level)


def difference_from_sums(
    student: KernelSums, teacher: KernelSums, *, groups: AnyArray | None = None, level: float = LEVEL
) -> Interval:
    """KID(student) - KID(teacher) from Gram sums against one reference: a delete-one jackknife, Student's t.

    The within-reference term is common to both and cancels. The variance is the sum of two jackknife variances (Arvesen 1969, for
    U-statistics of several samples): (n-1)/n sum_i (D_(-i) - mean)^2 deleting noise index i from student and teacher, and the same deleting
    reference sample j (or, with `groups`, reference block g). Degrees of freedom: Welch & Satterthwaite.
    """
    n = len(student.cross)
    if n != len(teacher.cross):
        raise StatisticsError(f"student, teacher: must have equal n (same noise index), got {n} and {len(teacher.cross)}")
    if len(student.columns) != len(teacher.columns):
        raise StatisticsError("student, teacher: their sums belong to different references")
    rows, cross = student.rows - teacher.rows, student.cross - teacher.cross
    columns = student.columns - teacher.columns
    codes = group_codes(groups, len(columns))
    value = _generated_part(rows.sum(), cross.sum(), n, len(columns))
    without_noise = _without_noise(rows, cross, len(columns))
    without_real = -2 * _mean_without(columns, codes) / n
    return _jackknife_interval(float(value), without_noise, without_real, level)


def kid_interval(model: KernelSums, real: RealSums, *, level: float = LEVEL) -> Interval:
    """KID of one model with its interval: the same jackknife; the groups are those `real` was summed with."""
    n, m = len(model.cross), len(real.rows)
    if len(model.columns) != m:
        raise StatisticsError(f"model, real: the model was summed over {len(model.columns)} real samples, not {m}")
    within = real.rows.sum() / real.pairs.sum()
    without_noise = _without_noise(model.rows, model.cross, m) + within
    # Deleting a block takes each of its pairs with other blocks out twice: (i, j) and (j, i).
    rows, pairs = np.bincount(real.groups, real.rows), np.bincount(real.groups, real.pairs)
    left = real.pairs.sum() - 2 * pairs
    if np.any(left <= 0):
        raise StatisticsError("real: at least 3 groups (or samples) are needed for an interval of KID")
    without_real = (real.rows.sum() - 2 * rows) / left - 2 * _mean_without(model.columns, real.groups) / n
    own = model.rows.sum() / (n * (n - 1))
    return _jackknife_interval(kid_from_sums(model, real), without_noise, without_real + own, level)


def margin(kid_teacher4_minus_teacher50: float) -> float:
    """The margin of non-inferiority: 10 % of KID(teacher, 4 DDIM steps) - KID(teacher, 50 steps), frozen before any student is trained.

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

    It passes when D + z_level se < margin, D ~ N(0, se^2), so se must be margin / (z_level + z_power); se falls at least as n^-1/2.
    Never less than n: the margin is frozen, n is what may be raised.
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
        raise StatisticsError(f"margin: must be positive, got {value}: the teacher's few steps are no worse than its many")


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


def _jackknife_interval(value: float, without_noise: FloatArray, without_real: FloatArray, level: float) -> Interval:
    check_level(level)
    noise, real = _jackknife_variance(without_noise), _jackknife_variance(without_real)
    total = noise + real
    if total == 0.0:
        return Interval(value, value, value)
    freedom = total**2 / (noise**2 / (len(without_noise) - 1) + real**2 / (len(without_real) - 1))
    half = float(stats.t.ppf(0.5 + level / 2, freedom)) * math.sqrt(total)
    return Interval(value, value - half, value + half)


def _jackknife_variance(without: FloatArray) -> float:
    """(n-1)/n sum_i (theta_(-i) - mean)^2  (Tukey 1958)."""
    return float((len(without) - 1) * without.var())
