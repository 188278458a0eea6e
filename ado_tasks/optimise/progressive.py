"""Progressive distillation: a student learns to take several of its teacher's DDIM steps in one.

Salimans & Ho 2022 (arXiv:2202.00512), algorithm 2.

Notation as there: a student of N steps goes from t = (i+1)/N to s = i/N; its teacher goes the same way in K steps.
K = 2 is the paper's halving. A larger K in the first stage skips a student that nobody wants, at the same arithmetic.

The paper's times are uniform. With `knots` time runs at another pace: u takes t's place above, and t is where the line
through the knots is at u. A teacher may decide most of a picture in a short time, as where a shape lies near t = 0.9;
uniform steps leave all of it to one of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from ado_tasks.backend import mx
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.parameterisation import expand
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.diffusion.solvers.ddim import ddim_step

WalkSolver = Literal["ddim", "dpmpp_2m"]

THINNING = 2  # p of `steps_asked`: of 1.5, 1.75 and 2 the nearest, at 16 evaluations for 50 steps (shapes 32x32)


@dataclass(frozen=True)
class Interval:
    """Where one student step begins and ends, and in how many steps the teacher walks it."""

    student_steps: int  # N
    teacher_substeps: int  # K; 2 is the paper's halving
    knots: tuple[float, ...] | None = None  # times from 1 to 0 that a multiple of N steps lie between; None: uniform

    def times(self, index: np.ndarray) -> np.ndarray:
        """The teacher's times in interval i, (B,) in 0..N−1: (B, K + 1) float64, from t = (i+1)/N down to s = i/N.

        (K(i+1) − k)/(KN), from whole numbers: subtracting k/(KN) from t would miss 0, and with it alpha = 1. With knots
        the times at which these fractions of the way lie.
        """
        k = np.arange(self.teacher_substeps + 1)
        whole = self.teacher_substeps * (index[:, None].astype(np.int64) + 1) - k
        fraction = whole / (self.teacher_substeps * self.student_steps)
        if self.knots is None:
            return fraction
        return np.interp(fraction, np.arange(len(self.knots)) / (len(self.knots) - 1), self.knots[::-1])

    def grid(self) -> np.ndarray:
        """Where the student steps: (N + 1,) float64, from 1 to 0."""
        starts = self.times(np.arange(self.student_steps)[::-1])[:, 0]
        return np.append(starts, 0.0)


def teacher_walk(
    teacher: Denoiser, z_t: mx.array, times: mx.array, schedule: NoiseSchedule, solver: WalkSolver = "ddim"
) -> mx.array:
    """z'': where the teacher's steps along `times` (B, K + 1) lead from z_t (B, H, W, C). Nothing is clipped.

    "ddim" is the paper's. "dpmpp_2m" starts as DDIM does and then puts x̂ + (x̂ − x̂_prev) h/2h_prev in the place of x̂
    (Lu et al. 2022b, algorithm 2; h in log-SNR), but for a step to t = 0: as near to the teacher's exact solution in
    half the evaluations and fewer.
    """
    z = z_t
    for k, (start, estimate) in enumerate(_legs(teacher, z_t, times, schedule, solver)):
        z = ddim_step(estimate, start, *levels(times[:, k], z_t, schedule), *levels(times[:, k + 1], z_t, schedule))
    return z


def states_on_the_way(
    teacher: Denoiser,
    z_t: mx.array,
    times: np.ndarray,
    stops: Sequence[float],
    schedule: NoiseSchedule,
    solver: WalkSolver = "ddim",
    evaluations: int | None = None,
) -> list[mx.array]:
    """Where such a walk from z_t (B, H, W, C) along `times` (K + 1,), the same for all, passes each time of `stops`.

    A step of either solver is a line of constant estimate, and so is a part of it: a stop between two times is on the
    walk, which does not change for it and costs nothing more. A state (B, H, W, C) for each stop, in order.

    With fewer `evaluations` than steps the teacher is asked at some (`steps_asked`), and at those between x̂ goes on in
    a straight line in t through its last two answers (where there is but one, as that): a Taylor forecast of order 1
    (Liu et al. 2025, arXiv:2503.06923, who forecast a network's features). How nearly the walk stays that of K steps,
    and whether that is nearer than as many steps as evaluations, depends on the teacher: bench/walk_evaluations.py.

    Raises:
        ValueError: stops do not fall, one does not lie below times[0] and at or above times[-1], or evaluations are not
            in 1..K, or of another solver than DDIM, which extrapolates itself.
    """
    if evaluations is not None and solver != "ddim":
        raise ValueError(f"evaluations: a walk of {solver} is asked at each of its steps; allowed: None, or with ddim")
    if not all(above > below for above, below in pairwise((times[0], *stops))) or stops[-1] < times[-1]:
        raise ValueError(f"stops must fall from below {times[0]:.6g} to {times[-1]:.6g} at least, got {list(stops)}")
    rows = mx.broadcast_to(mx.array(times.astype(np.float32)), (len(z_t), len(times)))
    found, waiting = [], list(stops)
    for k, (z, estimate) in enumerate(_legs(teacher, z_t, rows, schedule, solver, evaluations)):
        while waiting and waiting[0] >= times[k + 1]:
            stop = mx.full((len(z_t),), waiting.pop(0), dtype=mx.float32)
            found.append(ddim_step(estimate, z, *levels(rows[:, k], z, schedule), *levels(stop, z, schedule)))
    return found


def _legs(
    teacher: Denoiser,
    z: mx.array,
    times: mx.array,
    schedule: NoiseSchedule,
    solver: WalkSolver,
    evaluations: int | None = None,
) -> Iterator[tuple[mx.array, mx.array]]:
    """Where each step of a walk begins, and the estimate of the image that it keeps to until the next."""
    steps = times.shape[1] - 1
    where = set(range(steps)) if evaluations is None else set(steps_asked(steps, evaluations))
    asked: list[tuple[mx.array, mx.array]] = []  # the last two times at which the teacher was asked, and its answers
    for k in range(steps):
        t, s = times[:, k], times[:, k + 1]
        if k in where:
            asked = [*asked[-1:], (t, teacher(z, t))]
        estimate = asked[-1][1] if k in where else _forecast(asked, t)
        if solver == "dpmpp_2m" and len(asked) == 2:
            (before, x_before), (_, x_hat) = asked
            estimate = x_hat + _extrapolation(before, t, s, z, schedule) * (x_hat - x_before)
        yield z, estimate
        z = ddim_step(estimate, z, *levels(t, z, schedule), *levels(s, z, schedule))


def steps_asked(steps: int, evaluations: int) -> list[int]:
    """At which of so many steps of a walk the teacher is asked: ⌊K (i/n)^p⌋, or the next that is not taken.

    They thin out towards t = 0, where a picture is mostly decided.

    Raises:
        ValueError: evaluations are not in 1..steps.
    """
    if not 1 <= evaluations <= steps:
        raise ValueError(f"evaluations of a walk of {steps} steps must lie in 1..{steps}, got {evaluations}")
    found: list[int] = []
    for i in range(evaluations):
        found.append(max(found[-1] + 1 if found else 0, steps * i**THINNING // evaluations**THINNING))
    return found


def _forecast(asked: Sequence[tuple[mx.array, mx.array]], t: mx.array) -> mx.array:
    """x̂ at t (B,), on the line through the last two answers; the only one where there is one."""
    (first, x_first), (last, x_last) = asked[0], asked[-1]
    if len(asked) == 1:
        return x_last
    return x_last + expand((t - last) / (last - first), x_last) * (x_last - x_first)


def _extrapolation(before: mx.array, t: mx.array, s: mx.array, like: mx.array, schedule: NoiseSchedule) -> mx.array:
    """h/2h_prev for the step from t to s after one from `before` to t; 0 where s = 0, and h infinite."""
    clean = schedule.alpha_sigma(s)[1] == 0
    first, second, third = (schedule.log_snr(mx.where(clean, 1.0, each)) for each in (before, t, s))
    previous = mx.where(clean, 1.0, second - first)
    return expand(mx.where(clean, 0.0, (third - second) / (2 * previous)), like)


def target(
    z_end: mx.array, z_t: mx.array, alpha_t: mx.array, sigma_t: mx.array, alpha_s: mx.array, sigma_s: mx.array
) -> mx.array:
    """The x̃ with which one DDIM step from z_t lands on z'' (paper, eq. in algorithm 2).

    x̃ = (z'' − (σ_s/σ_t) z_t) / (α_s − (σ_s/σ_t) α_t). At s = 0, α_s = 1 and σ_s = 0, so it is z'' itself: the x̂ of
    the teacher's last step.
    """
    ratio = sigma_s / sigma_t
    return (z_end - ratio * z_t) / (alpha_s - ratio * alpha_t)


def distillation_target(
    teacher: Denoiser, z_t: mx.array, times: mx.array, schedule: NoiseSchedule, solver: WalkSolver = "ddim"
) -> mx.array:
    """x̃ for noisy images z_t (B, H, W, C) that stand at times[:, 0], the start of their intervals. No gradient."""
    z_end = teacher_walk(teacher, z_t, times, schedule, solver)
    t, s = levels(times[:, 0], z_t, schedule), levels(times[:, -1], z_t, schedule)
    return mx.stop_gradient(target(z_end, z_t, *t, *s))


def student_step(x: mx.array, z_t: mx.array, times: mx.array, schedule: NoiseSchedule) -> mx.array:
    """One student DDIM step over the whole interval with x as its x̂: with the exact target it lands on z''."""
    return ddim_step(x, z_t, *levels(times[:, 0], z_t, schedule), *levels(times[:, -1], z_t, schedule))


def levels(t: mx.array, like: mx.array, schedule: NoiseSchedule) -> tuple[mx.array, mx.array]:
    """(alpha, sigma) at times (B,), to multiply images like `like` (B, …) with."""
    alpha, sigma = schedule.alpha_sigma(t)
    return expand(alpha, like), expand(sigma, like)
