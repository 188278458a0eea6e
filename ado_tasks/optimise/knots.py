"""Knots fitted to a frozen model: nonlinear least squares through the solver itself.

What is minimised is the distance between what the solver reaches in n steps and the fine solution, at the same noise.
It is a sum of squares over every pixel of a batch in a handful of unknowns, so Gauss–Newton steps with
Levenberg–Marquardt damping (Nocedal & Wright 2006, §10.3) need few runs of the solver. The Jacobian is taken by finite
differences and then kept up to date by Broyden's rank-one formula (ibid., eq. 11.13).

The distance d of a sample counts as 2 δ² (√(1 + d²/δ²) − 1), d² for small and 2 δ d for large d (pseudo-Huber;
Hartley & Zisserman 2004, §A6.8), with δ the median distance at the start. A few noises lie where trajectories part:
whether they end in this image or that one is chance, and under plain squares a small batch would be fitted to them.

Times are 1 − cumulative sums of softmax(ξ), ξ the logarithms of the gaps between knots (as the knots of Tong et al.
2024, LD3), so no step can leave the order or the ends of [0, 1]. ξ moves away from where it starts by a polynomial of
the position: four unknowns serve any number of steps, and a small batch cannot be overfitted by single knots.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.polynomial import legendre
from scipy.interpolate import PchipInterpolator

Floats = npt.NDArray[np.float64]
Solve = Callable[[Floats], npt.NDArray[np.floating]]  # times (n + 1,) to samples (B, …)

DEGREE = 3  # of the polynomial: gaps may grow, bend, and do so differently at the ends
DIFFERENCE = 0.1  # of an unknown; float32 samples leave about five digits of such a difference
FIRST_DAMPING = 1e-2  # relative to the diagonal of JᵀJ, Marquardt's scaling
EASE, TIGHTEN = 4.0, 8.0  # damping after a step that helped, and after one that did not
LONGEST_STEP = 0.7  # of an unknown: no gap grows more than about twofold at a time
FIRST_GAP = 0.02  # of t, before the first knot where that is free; from 0 a logarithm could not start
SMALLEST_GAP = 1e-3  # of t: one training timestep of a thousand
ENOUGH = 2e-3  # relative gain under which a step was not worth its run


@dataclass(frozen=True)
class Fit:
    """What a fit found."""

    times: Floats  # (n + 1,)
    mean_distance: float  # root mean square over pixels, mean over the batch: not led by a few samples
    mean_square: float  # plain squared distance to the fine solution on the batch it was fitted on
    solves: int  # how often the solver ran, at n evaluations each


def fit_knots(
    solve: Solve, fine: np.ndarray, start: Floats, max_solves: int, *, free_start: bool = True, degree: int = DEGREE
) -> Fit:
    """Move the interior knots, and the first if it is free, nearer to `fine`.

    Args:
        solve: runs the solver on the batch.
        fine: what it should reach, (B, …).
        start: times to begin with, from at most 1 down to 0.
        max_solves: budget, at least 1. The best times met within it are the result, by the robust distance; never
            worse than `start`.
        free_start: let times[0] fall below 1.
        degree: of the polynomial by which ξ changes; n − 1 or more moves every knot freely.
    """
    problem = _Problem(solve, np.asarray(fine, np.float64), np.asarray(start, np.float64), max_solves)
    if problem.left > 0:
        _descend(problem, _Family(problem.best_times, free_start, degree))
    squared = problem.squared_of_best
    return Fit(problem.best_times, float(np.sqrt(squared).mean()), float(squared.mean()), problem.made)


def _descend(problem: "_Problem", family: "_Family") -> None:
    """Levenberg–Marquardt with Broyden's updates, until the budget is used up or nothing is gained any more."""

    def residual_at(unknowns: Floats) -> Floats:
        return problem.residual(family.times(unknowns))

    def differences(unknowns: Floats, residual: Floats) -> Floats | None:
        if len(unknowns) == 0 or problem.left <= len(unknowns):  # not enough for them and one step
            return None
        shifts = DIFFERENCE * np.eye(len(unknowns))
        return np.stack([(residual_at(unknowns + shift) - residual) / DIFFERENCE for shift in shifts], axis=1)

    unknowns = np.zeros(family.unknowns)
    residual = residual_at(unknowns)
    jacobian, damping, fresh = differences(unknowns, residual), FIRST_DAMPING, True
    while jacobian is not None and problem.left > 0:
        step = _damped_step(jacobian, residual, damping)
        found = residual_at(unknowns + step)
        gain = 1 - (found @ found) / max(residual @ residual, np.finfo(float).tiny)
        if gain > 0:
            # Broyden: the least change of J that explains what this step did. Failed steps went too far to teach it.
            jacobian = jacobian + np.outer(found - residual - jacobian @ step, step) / (step @ step)
            unknowns, residual, damping, fresh = unknowns + step, found, damping / EASE, False
        else:
            damping *= TIGHTEN
        if gain < ENOUGH and np.abs(step).max() < DIFFERENCE:
            if fresh:
                return
            jacobian, damping, fresh = differences(unknowns, residual), FIRST_DAMPING, True


def _damped_step(jacobian: Floats, residual: Floats, damping: float) -> Floats:
    normal = jacobian.T @ jacobian
    scale = np.diag(normal) + 1e-9 * np.trace(normal) + np.finfo(float).tiny
    step = -np.linalg.solve(normal + damping * np.diag(scale), jacobian.T @ residual)
    step = np.asarray(step, np.float64)
    return step * min(1.0, LONGEST_STEP / max(np.abs(step).max(), np.finfo(float).tiny))


class _Problem:
    """Robust residuals of times, counted, with the best times met so far."""

    def __init__(self, solve: Solve, fine: Floats, start: Floats, max_solves: int) -> None:
        self._solve, self._fine, self._max_solves = solve, fine.reshape(len(fine), -1), max_solves
        self.made, self._least, self._delta = 0, np.inf, None
        self.best_times, self.squared_of_best = start, np.zeros(0)
        self.residual(start)

    @property
    def left(self) -> int:
        return self._max_solves - self.made

    def residual(self, times: Floats) -> Floats:
        """Differences (B · pixels,), each sample's scaled so that the sum of squares is the robust one."""
        self.made += 1
        found = np.asarray(self._solve(times), np.float64).reshape(self._fine.shape) - self._fine
        squared = np.square(found).mean(axis=1, keepdims=True)
        if self._delta is None:
            self._delta = max(float(np.sqrt(np.median(squared))), float(np.finfo(np.float32).tiny))
        relative = squared / self._delta**2
        # 2 (√(1 + r) − 1)/r without cancellation: 1 for a small r, falling as 1/√r.
        robust = found * np.sqrt(2 / (1 + np.sqrt(1 + relative)))
        total = float(np.square(robust).sum())
        if total < self._least:
            self._least, self.best_times, self.squared_of_best = total, times, squared
        return robust.ravel()


class _Family:
    """Times around some start: ξ = ξ₀ + a polynomial of the position without constant, and the first gap by itself."""

    def __init__(self, start: Floats, free_start: bool, degree: int) -> None:
        whole = np.append(1.0, start) if free_start else start
        gaps = np.maximum(-np.diff(whole), SMALLEST_GAP)
        if free_start:
            gaps[0] = max(gaps[0], min(FIRST_GAP, gaps[1] / 2))
        steps = len(gaps) - int(free_start)
        positions = (2 * np.arange(steps) + 1) / steps - 1
        polynomials = legendre.legvander(positions, min(degree, steps - 1))[:, 1:]
        if free_start:
            polynomials = np.block([[1.0, np.zeros(polynomials.shape[1])], [np.zeros((steps, 1)), polynomials]])
        self._basis, self._log_gaps, self._free_start = polynomials, np.log(gaps), free_start

    @property
    def unknowns(self) -> int:
        return self._basis.shape[1]

    def times(self, unknowns: Floats) -> Floats:
        xi = self._log_gaps + self._basis @ unknowns
        gaps = np.exp(xi - xi.max())
        times = np.append(1 - np.cumsum(gaps / gaps.sum())[:-1], 0.0)
        return times if self._free_start else np.append(1.0, times)


def resampled(times: Floats, steps: int) -> Floats:
    """Times of another number of steps along the same curve: a fit for n steps is a good start for n + 1."""
    curve = PchipInterpolator(np.linspace(0, 1, len(times)), times)  # keeps the order
    return np.append(curve(np.linspace(0, 1, steps + 1)[:-1]), 0.0)


def on_timesteps(times: Floats, num_train_timesteps: int) -> Floats:
    """The nearest times at which the network was trained, t = (i + 1)/N, all different; the end at 0 stays.

    These are Diffusers' integer timesteps i = t N − 1, so that the knots serve there as custom timesteps.
    """
    steps = np.clip(np.rint(times[:-1] * num_train_timesteps), 1, num_train_timesteps).astype(int)
    for k in range(1, len(steps)):  # pushed down where two fall together …
        steps[k] = min(steps[k], steps[k - 1] - 1)
    for k in range(len(steps) - 1, -1, -1):  # … and up again where that left the range
        steps[k] = max(steps[k], len(steps) - k)
    return np.append(steps / num_train_timesteps, 0.0)
