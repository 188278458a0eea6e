"""Does the model copy its training images? Distances to the nearest of them, generated beside held-out."""

from dataclasses import dataclass

import numpy as np

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.checks import AnyArray, group_codes, same_width, samples
from ado_tasks.metrics.interval import LEVEL, check_level
from ado_tasks.metrics.neighbours import nearest

NO_COPYING = 0.9  # docs/science.md, Metrics: the lower end of the 95 % interval from which no copying is said
DRAWS = 1000  # bootstrap draws: the ends of a 95 % interval rest on 25 draws each


@dataclass(frozen=True)
class Memorisation:
    """Median distance to the nearest training image, generated over held-out, with its 95 % interval.

    About 1 for a model that draws anew, towards 0 for one that copies. `close` is the share of generated samples nearer
    to a training image than 2.5 % of held-out ones are: about 0.025 without copying, and what shows a model that copies
    now and then, which no median does.
    """

    value: float
    low: float
    high: float
    close: float

    @property
    def no_copying(self) -> bool:
        """Whether the lower end is at least 0.9."""
        return self.low >= NO_COPYING


def memorisation(
    generated: AnyArray,
    held_out: AnyArray,
    train: AnyArray,
    *,
    rng: np.random.Generator,
    groups: AnyArray | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Memorisation:
    """median_i min_k |g_i - t_k| / median_j min_k |h_j - t_k| for pixels or features of one shape.

    The interval is a percentile bootstrap over generated and held-out samples (Efron 1979), held-out ones by `groups`
    (labels of what belongs together) where given; the training images are what they are. `StatisticsError` where half
    of the held-out images lie in the training set: then the split leaks, and the ratio has no meaning.
    """
    x, h, t = samples(generated, "generated"), samples(held_out, "held_out"), samples(train, "train", minimum=1)
    same_width(x, t, "generated, train")
    same_width(h, t, "held_out, train")
    check_level(level)
    of_generated, of_held_out = nearest(x, t), nearest(h, t)
    typical = float(np.median(of_held_out))
    if typical == 0.0:
        raise StatisticsError("held_out: half of its samples or more are training images; the parts must be disjoint")
    above = np.array([_resampled_median(of_generated, rng) for _ in range(draws)])
    codes = group_codes(groups, len(h))
    whole = [of_held_out[codes == code] for code in range(codes.max() + 1)] if codes.max() + 1 < len(h) else None
    below = np.array([_resampled_median(of_held_out, rng, whole) for _ in range(draws)])
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample of many copies may have a median of 0
        low, high = np.nanquantile(above / below, [0.5 - level / 2, 0.5 + level / 2])
    return Memorisation(
        value=float(np.median(of_generated)) / typical,
        low=float(low),
        high=float(high),
        close=float(np.mean(of_generated < np.quantile(of_held_out, 0.025))),
    )


def _resampled_median(values: AnyArray, rng: np.random.Generator, groups: list[AnyArray] | None = None) -> float:
    """Median of as many samples, or groups, drawn with replacement."""
    if groups is None:
        return float(np.median(rng.choice(values, len(values))))
    return float(np.median(np.concatenate([groups[code] for code in rng.integers(len(groups), size=len(groups))])))
