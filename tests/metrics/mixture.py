"""Gaussian mixtures for the statistics tests: draws, and the exact value of the cubic kernel's distance between two of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mixture:
    """weights (c,), means (c, d), roots (c, d, d) with root @ root.T the covariance."""

    weights: np.ndarray
    means: np.ndarray
    roots: np.ndarray

    @staticmethod
    def random(rng: np.random.Generator, components: int, d: int) -> "Mixture":
        """Overlapping components of random means and covariances."""
        weights = rng.dirichlet(np.full(components, 5.0))
        roots = rng.normal(size=(components, d, d)) / np.sqrt(d)
        return Mixture(weights, 0.5 * rng.normal(size=(components, d)), roots)

    def scaled(self, factor: float) -> "Mixture":
        """The same components with their spread multiplied: another distribution with the same means."""
        return Mixture(self.weights, self.means, factor * self.roots)

    def moved(self, shift: np.ndarray) -> "Mixture":
        """The whole distribution shifted."""
        return Mixture(self.weights, self.means + shift, self.roots)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """n independent samples, (n, d)."""
        counts = rng.multinomial(n, self.weights)
        parts = [
            mean + rng.normal(size=(count, len(mean))) @ root.T
            for count, mean, root in zip(counts, self.means, self.roots, strict=True)
        ]
        return np.concatenate(parts)[rng.permutation(n)]


def expected_kernel(p: Mixture, q: Mixture) -> float:
    """E (x.y/d + 1)^3 for x ~ p, y ~ q, exactly: 1 + 3 E u/d + 3 E u^2/d^2 + E u^3/d^3 with u = x.y.

    Given x, u is normal with mean m.x and variance x'Tx; its moments are polynomials of the normal x, in closed form.
    """
    d = p.means.shape[1]
    total = 0.0
    for v, a, ra in zip(p.weights, p.means, p.roots, strict=True):
        for w, b, rb in zip(q.weights, q.means, q.roots, strict=True):
            s, t, mean = ra @ ra.T, rb @ rb.T, float(a @ b)
            spread_s = float(b @ s @ b)
            square = mean**2 + spread_s + float(a @ t @ a) + float(np.trace(s @ t))
            cube = mean**3 + 3 * mean * spread_s
            cube += 3 * (mean * (float(a @ t @ a) + float(np.trace(s @ t))) + 2 * float(b @ s @ t @ a))
            total += v * w * (1 + 3 * mean / d + 3 * square / d**2 + cube / d**3)
    return total


def true_kid(p: Mixture, q: Mixture) -> float:
    """The squared distance that the unbiased estimate estimates."""
    return expected_kernel(p, p) + expected_kernel(q, q) - 2 * expected_kernel(p, q)
