"""Simulated trials that measure what the intervals are worth: fresh draws from Gaussian mixtures fitted to features.

A resample of a finite pool would be centred on the pool and flatter the interval; a fitted mixture has a known truth,
from which every trial draws anew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.mixture import GaussianMixture

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.checks import AnyArray, FloatArray, features
from ado_tasks.metrics.interval import Interval
from ado_tasks.metrics.kernel import cubic_kernel, kid
from ado_tasks.metrics.noninferiority import kid_difference


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians: weights (c,), means (c, d), roots (c, d, d) with root @ root' the covariance."""

    weights: FloatArray
    means: FloatArray
    roots: FloatArray

    @staticmethod
    def fitted(values: AnyArray, components: int, seed: int) -> "Mixture":
        """The mixture of full covariances that EM finds for features (n, d)."""
        flat = features(values, "features", minimum=components + 1)
        # 0.01 of the variance of a standardised feature: keeps components of few samples from collapsing.
        fit: Any = GaussianMixture(components, covariance_type="full", reg_covar=0.01, random_state=seed).fit(flat)
        return Mixture(fit.weights_, fit.means_, np.linalg.cholesky(fit.covariances_))

    def narrowed(self, factor: float) -> "Mixture":
        """The same components, each with its spread multiplied by `factor`."""
        return Mixture(self.weights, self.means, factor * self.roots)

    def moved(self, shift: FloatArray) -> "Mixture":
        """The whole distribution shifted by (d,)."""
        return Mixture(self.weights, self.means + shift, self.roots)

    def mean(self) -> FloatArray:
        """Mean (d,) of the whole distribution."""
        return self.weights @ self.means

    def draw(self, n: int, rng: np.random.Generator) -> FloatArray:
        """Independent samples (n, d)."""
        return self.push(*self.noise(n, rng))

    def draw_blocks(self, count: int, size: int, share: float, rng: np.random.Generator) -> FloatArray:
        """`count` blocks of `size` samples, (count * size, d), each sample distributed as this mixture.

        The samples of a block have one component, and normal numbers correlated by `share`: as the patches of one
        photograph.
        """
        component, common = self.noise(count, rng)
        own = rng.normal(size=(count * size, self.means.shape[1]))
        normal = np.sqrt(share) * np.repeat(common, size, axis=0) + np.sqrt(1 - share) * own
        return self.push(np.repeat(component, size), normal)

    def noise(self, n: int, rng: np.random.Generator) -> tuple[AnyArray, FloatArray]:
        """The noise of n samples: which component (n,), and normal numbers (n, d)."""
        return rng.choice(len(self.weights), n, p=self.weights), rng.normal(size=(n, self.means.shape[1]))

    def push(self, component: AnyArray, normal: FloatArray) -> FloatArray:
        """Samples of given noise: two mixtures of the same components pushed with the same noise are paired."""
        out = np.empty_like(normal)
        for index in np.unique(component):
            chosen = component == index
            out[chosen] = self.means[index] + normal[chosen] @ self.roots[index].T
        return out


def expected_kernel(p: Mixture, q: Mixture) -> float:
    """E (x.y/d + 1)^3 for x ~ p and y ~ q, exactly: 1 + 3 E u/d + 3 E u^2/d^2 + E u^3/d^3 with u = x.y.

    Given x ~ N(a, S), u is N(b.x, x'Tx) for y ~ N(b, T); its moments are polynomials of the normal x, with known means.
    """
    d = p.means.shape[1]
    total = 0.0
    for v, a, root_s in zip(p.weights, p.means, p.roots, strict=True):
        for w, b, root_t in zip(q.weights, q.means, q.roots, strict=True):
            s, t, mean = root_s @ root_s.T, root_t @ root_t.T, float(a @ b)
            from_s, from_t = float(b @ s @ b), float(a @ t @ a) + float(np.sum(s * t))
            square = mean**2 + from_s + from_t
            cube = mean**3 + 3 * mean * (from_s + from_t) + 6 * float(b @ s @ t @ a)
            total += v * w * (1 + 3 * mean / d + 3 * square / d**2 + cube / d**3)
    return total


def true_kid(p: Mixture, q: Mixture) -> float:
    """The squared distance between two mixtures that KID estimates without bias."""
    return expected_kernel(p, p) + expected_kernel(q, q) - 2 * expected_kernel(p, q)


@dataclass(frozen=True)
class Trials:
    """Intervals of many simulated trials beside the truth they should cover."""

    truth: float
    intervals: tuple[Interval, ...]

    def covered(self) -> int:
        """In how many trials the interval covers the truth."""
        return sum(interval.covers(self.truth) for interval in self.intervals)

    def passed(self, margin: float) -> int:
        """In how many trials the pair is judged non-inferior."""
        return sum(interval.high < margin for interval in self.intervals)

    def spread(self) -> float:
        """Standard deviation of the figure over trials."""
        return float(np.std([interval.value for interval in self.intervals], ddof=1))


Pair = tuple[FloatArray, FloatArray]
Method = Callable[[FloatArray, FloatArray, FloatArray], Interval]  # student, teacher, real


def independent(student: Mixture, teacher: Mixture, n: int, rng: np.random.Generator) -> Pair:
    """Samples (n, d) of each, of independent noises: with student = teacher an A/A pair."""
    return student.draw(n, rng), teacher.draw(n, rng)


def same_noise(student: Mixture, teacher: Mixture, n: int, rng: np.random.Generator) -> Pair:
    """Samples (n, d) of each, of the same noise, as students and teachers are compared; of the same components."""
    if student.weights.shape != teacher.weights.shape or not np.array_equal(student.weights, teacher.weights):
        raise StatisticsError("student, teacher: the same noise needs mixtures of the same components and weights")
    noise = teacher.noise(n, rng)
    return student.push(*noise), teacher.push(*noise)


def run_trials(
    truth: float,
    trials: int,
    pair: Callable[[], Pair],
    reference: Callable[[], FloatArray],
    method: Method = kid_difference,
) -> Trials:
    """Makes one interval a trial by `method`, from a fresh `pair` (student, teacher) and a fresh `reference`."""
    return Trials(truth, tuple(method(*pair(), reference()) for _ in range(trials)))


def naive_bootstrap(
    student: FloatArray, teacher: FloatArray | None, real: FloatArray, *, draws: int, rng: np.random.Generator
) -> Interval:
    """The interval *not* to use, kept as the control that every coverage test must reject.

    Percentiles of KID(student) - KID(teacher), or of KID(student) without a teacher, over resamples with replacement:
    by noise index, and of the reference jointly for both. A sample drawn twice meets itself, which adds (mean k(x, x) -
    mean k(x, y)) / n to each mean.
    """
    n, m = len(student), len(real)
    noise = rng.multinomial(n, np.full(n, 1 / n), size=draws).T.astype(np.float64)
    reference = rng.multinomial(m, np.full(m, 1 / m), size=draws).T.astype(np.float64)

    def within(x: FloatArray, weights: FloatArray) -> FloatArray:
        gram = cubic_kernel(x, x)
        own = np.sum(weights * np.diag(gram)[:, None], axis=0)
        return (np.sum(weights * (gram @ weights), axis=0) - own) / (len(x) * (len(x) - 1))

    def distances(x: FloatArray) -> FloatArray:
        return within(x, noise) - 2 * np.sum(noise * (cubic_kernel(x, real) @ reference), axis=0) / (n * m)

    other = within(real, reference) if teacher is None else -distances(teacher)
    low, high = np.quantile(distances(student) + other, [0.025, 0.975])
    value = kid(student, real) - (0.0 if teacher is None else kid(teacher, real))
    return Interval(value, float(low), float(high))
