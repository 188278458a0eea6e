"""Class accuracy of conditional samples, by a different network than the one that makes the features."""

import numpy as np

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.checks import AnyArray
from ado_tasks.metrics.interval import LEVEL, Interval, proportion_interval


def class_accuracy(predicted: AnyArray, wanted: AnyArray, *, level: float = LEVEL) -> Interval:
    """Share of samples (n,) whose predicted class is the wanted one, with the exact interval of Clopper & Pearson.

    Both are integer classes, or (n, a) of several attributes, which all have to be right. `StatisticsError` for other
    kinds or shapes, or n = 0.
    """
    found, asked = np.asarray(predicted), np.asarray(wanted)
    if found.shape != asked.shape or found.ndim not in (1, 2) or found.size == 0:
        shapes = f"{found.shape} and {asked.shape}"
        raise StatisticsError(f"predicted, wanted: must be classes of one shape, (n,) or (n, a), got {shapes}")
    for name, values in (("predicted", found), ("wanted", asked)):
        if values.dtype.kind not in "iub":
            raise StatisticsError(f"{name}: must be integer classes, not {values.dtype}; take the argmax of scores")
    right = found == asked if found.ndim == 1 else np.all(found == asked, axis=1)
    return proportion_interval(int(np.count_nonzero(right)), len(right), level)
