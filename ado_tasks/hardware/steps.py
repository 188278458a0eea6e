"""What one network evaluation costs: from the times of whole samplings of few and of many evaluations, in turn.

Time grows as fixed + step · n. Both are taken from the same round, so that a machine that slows down between rounds
slows both ends of the line.
"""

from collections.abc import Sequence

import numpy as np

from ado_tasks.hardware.latency import Spread

FEW, MANY = 2, 8  # evaluations at the ends of the line: most uses lie between them


def line(few_s: Sequence[float], many_s: Sequence[float], few: int = FEW, many: int = MANY) -> tuple[Spread, Spread]:
    """(fixed, step) in ms, of seconds at `few` and at `many` evaluations in each round.

    No batch has a fixed part below 0: a round that says so is noise, and its line goes through 0 instead, by least
    squares (what non-negative least squares makes of two points).
    """
    first, last = 1e3 * np.asarray(few_s, np.float64), 1e3 * np.asarray(many_s, np.float64)
    step = (last - first) / (many - few)
    fixed = first - few * step
    through_zero = (few * first + many * last) / (few**2 + many**2)
    return Spread.of(np.maximum(fixed, 0.0).tolist()), Spread.of(np.where(fixed < 0, through_zero, step).tolist())
