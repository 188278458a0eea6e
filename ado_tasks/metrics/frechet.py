"""Fréchet distance between two sets of features, its floor (real against real), and the excess over training images.

The features are the project's own, so the result is called "FD (own features)", never "FID".
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.checks import AnyArray, FloatArray, features, group_codes, same_count, same_width

MIN_DRAWS = 50  # the smallest number of draws a reported floor or excess may rest on
RANGE = (0.025, 0.975)  # docs/science.md, Metrics: the floor is given with its 95 % range


@dataclass(frozen=True)
class Floor:
    """FD of real against real: mean and 95 % range over random disjoint halves of n samples each."""

    mean: float
    low: float
    high: float
    n: int
    draws: int


@dataclass(frozen=True)
class Excess:
    """How far a model is from held-out images, beside what fresh training images reach; all at the same n.

    model: mean FD(model, report half). train: mean FD(training images, the same halves). excess = model - train, the
    mean of the differences draw by draw, and [low, high] their 95 % range over draws (the spread of the drawing, not a
    confidence interval: all draws share one report part). ratio = excess / floor.mean.
    """

    model: float
    train: float
    excess: float
    low: float
    high: float
    ratio: float
    over_floor: float
    below_floor: bool
    floor: Floor
    n: int
    draws: int


def frechet_distance(a: AnyArray, b: AnyArray) -> float:
    """Fréchet distance between the Gaussians of two feature sets of shape (n, d), n >= 2 and equal.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)  (Dowson & Landau 1982; as FID, Heusel et al. 2017),
    with the unbiased covariances. With S = R'R, R from a QR of the centred samples, the last trace is the sum of the
    singular values of R_a R_b': no matrix is squared, rooted or inverted, so covariances without full rank (n <= d,
    dead features) need no regularisation. The estimate falls as n grows, so sets of unequal n are refused:
    `StatisticsError`.
    """
    set_a, set_b = features(a, "a"), features(b, "b")
    same_width(set_a, set_b, "a, b")
    same_count(set_a, set_b, "a, b", "the estimate of FD depends on n")
    return _distance(_moments(set_a), _moments(set_b))


def floor(real: AnyArray, *, draws: int, rng: np.random.Generator, groups: AnyArray | None = None) -> Floor:
    """FD no model can be asked to beat: between random disjoint halves of `real` (m, d), n = m // 2, drawn many times.

    With `groups` (m,), labels of what belongs together (patches of one block), no group is in both halves, and n is
    smaller by half of the largest group. `draws` >= 50 (`StatisticsError` below). A model whose FD at the same n lies
    under `low` deserves a look: leakage or copying.
    """
    values = features(real, "real", minimum=4)
    _check_draws(draws)
    codes = group_codes(groups, len(values))
    distances = [_distance(_moments(first), _moments(second)) for first, second in _halves(values, codes, draws, rng)]
    return _floor(np.array(distances), n=half_size(codes))


def excess(
    model: AnyArray, train: AnyArray, real: AnyArray, *, draws: int, rng: np.random.Generator,
    groups: AnyArray | None = None,
) -> Excess:  # fmt: skip
    """FD of a model beyond that of training images, against the same halves of the report part `real` (m, d).

    In each of `draws` >= 50 draws the report part is split in two random halves of n = m // 2; n samples of the model
    and n training images are drawn without replacement, and all three distances (model, train, other half) are to the
    first half. Averaging over draws uses all of each set while n stays equal. `model` and `train` need at least n
    samples. `groups` (m,) as in `floor`.
    """
    return beyond(model, draw_halves(len(model), train, real, draws=draws, rng=rng, groups=groups))


@dataclass(frozen=True)
class Halves:
    """What `excess` draws and does not depend on the model: one set for models of as many samples."""

    samples: int  # of a model
    n: int
    width: int
    rows: list[AnyArray]  # of each draw, n of the model's samples
    targets: list["_Moments"]  # of each draw's first half
    train: FloatArray  # (draws,) FD of training images to it
    other: FloatArray  # (draws,) FD of the other half to it


def draw_halves(
    samples: int, train: AnyArray, real: AnyArray, *, draws: int, rng: np.random.Generator,
    groups: AnyArray | None = None,
) -> Halves:  # fmt: skip
    """Draw as `excess` does, for models of `samples` samples. Arguments and errors as there."""
    values = features(real, "real", minimum=4)
    codes = group_codes(groups, len(values))
    n = half_size(codes)
    if samples < n:
        raise StatisticsError(f"model: at least {n} samples are needed, got {samples}")
    training = features(train, "train", minimum=n)
    same_width(training, values, "train, real")
    _check_draws(draws)
    rows, targets, distances = [], [], np.empty((draws, 2))
    for row, (half, other) in zip(distances, _halves(values, codes, draws, rng), strict=True):
        targets.append(_moments(half))
        rows.append(rng.choice(samples, n, replace=False))
        row[:] = [
            _distance(_moments(rng.choice(training, n, replace=False)), targets[-1]),
            _distance(_moments(other), targets[-1]),
        ]
    return Halves(samples, n, values.shape[1], rows, targets, distances[:, 0], distances[:, 1])


def beyond(model: AnyArray, drawn: Halves) -> Excess:
    """`excess` of one model against halves that are drawn already: the same for every model of as many samples."""
    generated = features(model, "model", minimum=drawn.n)
    if generated.shape[1] != drawn.width:
        raise StatisticsError(
            f"model, real: must have the same number of features, got {generated.shape[1]} and {drawn.width}"
        )
    if len(generated) != drawn.samples:
        raise StatisticsError(f"model: the halves were drawn for {drawn.samples} samples, got {len(generated)}")
    to_target = zip(drawn.rows, drawn.targets, strict=True)
    found = np.array([_distance(_moments(generated[rows]), target) for rows, target in to_target])
    base = _floor(drawn.other, drawn.n)
    model_mean, train_mean = float(found.mean()), float(drawn.train.mean())
    low, high = np.quantile(found - drawn.train, RANGE)
    over = model_mean - train_mean
    return Excess(
        model=model_mean,
        train=train_mean,
        excess=over,
        low=float(low),
        high=float(high),
        ratio=over / base.mean,
        over_floor=model_mean - base.mean,
        below_floor=model_mean < base.low,
        floor=base,
        n=drawn.n,
        draws=len(found),
    )


_Moments = tuple[FloatArray, FloatArray]  # mean (d,), and R (min(n, d), d) with R'R the covariance


def _moments(values: FloatArray) -> _Moments:
    mean = values.mean(axis=0)
    return mean, np.asarray(np.linalg.qr((values - mean) / np.sqrt(len(values) - 1), mode="r"))


def _distance(a: _Moments, b: _Moments) -> float:
    (mean_a, root_a), (mean_b, root_b) = a, b
    shared = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    squared = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * shared
    return max(0.0, float(squared))  # a distance: what is below 0 is rounding, about 1e-15 of the traces


def half_size(codes: AnyArray) -> int:
    """Samples in each half of m where no group is in both: (m - (s - 1)) // 2, s the size of the largest group.

    Groups follow one another in random order, each whole: where s - 1 samples between the first n and the next n are
    left out, no group reaches from one half into the other. Without groups s = 1, and n = m // 2.
    """
    n = (len(codes) - _gap(codes)) // 2
    if n < 2:
        raise StatisticsError(f"groups: one holds so much of {len(codes)} samples that no two halves can be drawn")
    return n


def _gap(codes: AnyArray) -> int:
    return int(np.bincount(codes).max()) - 1


def _halves(
    values: FloatArray, codes: AnyArray, draws: int, rng: np.random.Generator
) -> Iterator[tuple[FloatArray, FloatArray]]:
    n, gap, count = half_size(codes), _gap(codes), int(codes.max()) + 1
    members = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes))
    starts = np.concatenate([[0], ends[:-1]])
    for _ in range(draws):
        order = np.concatenate([members[starts[code] : ends[code]] for code in rng.permutation(count)])
        yield values[order[:n]], values[order[n + gap : 2 * n + gap]]


def _floor(distances: FloatArray, n: int) -> Floor:
    mean = float(distances.mean())
    if mean == 0.0:
        raise StatisticsError("real: all samples are the same, so the floor of FD is 0 and no ratio to it exists")
    low, high = np.quantile(distances, RANGE)
    return Floor(mean=mean, low=float(low), high=float(high), n=n, draws=len(distances))


def _check_draws(draws: int) -> None:
    if draws < MIN_DRAWS:
        raise StatisticsError(f"draws: at least {MIN_DRAWS} are needed for a mean and a 95 % range, got {draws}")
