"""What every metric asks of its inputs, said once: finite numbers, enough samples, shapes that belong together."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ado_tasks.errors import StatisticsError

FloatArray = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]


def features(array: AnyArray, name: str, minimum: int = 2) -> FloatArray:
    """Features as float64 of shape (n, d), or a `StatisticsError` naming `name` and what is wrong with it.

    Refuses other ranks than two, d = 0, fewer than `minimum` samples, and any value that is not finite.
    """
    values = np.asarray(array)
    if values.ndim != 2 or values.shape[1] == 0:
        raise StatisticsError(f"{name}: features must have shape (n, d) with d >= 1, got {values.shape}")
    return samples(values, name, minimum)


def samples(array: AnyArray, name: str, minimum: int = 2) -> FloatArray:
    """Samples of any rank, (n, ...), flattened to float64 (n, d); same refusals as `features` but for the rank."""
    values = np.asarray(array)
    if values.dtype.kind not in "fiu":
        raise StatisticsError(f"{name}: values must be real numbers, got dtype {values.dtype}")
    if values.ndim == 0 or values.shape[0] < minimum:
        have = values.shape[0] if values.ndim else 0
        raise StatisticsError(f"{name}: at least {minimum} samples are needed, got {have}")
    flat = values.reshape(values.shape[0], -1).astype(np.float64)
    bad = int(np.count_nonzero(~np.isfinite(flat)))
    if bad:
        raise StatisticsError(f"{name}: {bad} of {flat.size} values are not finite")
    return flat


def same_width(a: FloatArray, b: FloatArray, names: str) -> None:
    """Raise unless both sets describe a sample by the same number of values."""
    if a.shape[1] != b.shape[1]:
        raise StatisticsError(f"{names}: must have the same number of features, got {a.shape[1]} and {b.shape[1]}")


def same_count(a: FloatArray, b: FloatArray, names: str, why: str) -> None:
    """Raise unless both sets hold the same number of samples; `why` tells the caller what would go wrong."""
    if len(a) != len(b):
        raise StatisticsError(f"{names}: must have equal n ({why}), got {len(a)} and {len(b)}")


def group_codes(groups: AnyArray | None, count: int) -> AnyArray:
    """Groups as integers 0..G-1, shape (count,); without groups every sample is its own. One group is refused."""
    if groups is None:
        return np.arange(count)
    labels = np.asarray(groups)
    if labels.shape != (count,):
        raise StatisticsError(f"groups: one label a real sample is needed, shape ({count},), got {labels.shape}")
    codes = np.unique(labels, return_inverse=True)[1]
    if codes.max() == 0:
        raise StatisticsError("groups: at least 2 different groups are needed, got 1")
    return codes
