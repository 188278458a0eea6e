"""Steps chosen for each sample by its own estimated error: easy samples finish in fewer evaluations than hard ones.

A step from angle φ_t to φ_s (see `angle.py`) has an embedded pair: DDIM's, of order 1, and the same with the slope p
of x̂, of order 2. They differ by G(φ_t, φ_s) p, which estimates the error of the first; the second is kept (local
extrapolation; Hairer, Nørsett & Wanner 1993, §II.4). With ‖·‖ the root mean square over ONE sample's numbers, a step
has to keep

    G(φ_t, φ_s) ‖p‖ ≤ atol + rtol ‖z‖,    ‖·‖ of z/√(α² + σ²),

and since G is known in closed form the longest such step is solved for, not guessed from a power of the last error.

`multistep` takes p from the step before: the error is known before a step is taken, none is ever rejected, and a step
costs one evaluation. `heun` takes p from the step's own two ends: two evaluations; a step whose error turns out too
large is taken again from the x̂ that is known, for one more.

What a step may err at each angle can be learned from a fixed schedule (`error_profile`): a sample of mean difficulty
then steps as that schedule does, and others sooner or later.

The widely copied adaptive sampler (k-diffusion's `dpm_solver_adaptive`) takes ‖·‖ over the whole batch: all its samples
share a step, and what comes out depends on who else was asked for. Here nothing is shared: each lane of a batch of
fixed shape holds a sample of its own at a time of its own; one that is finished hands its lane to the next.
"""

from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from ado_tasks.backend import mx
from ado_tasks.diffusion.angle import Floats, angle, reach, slope_gain, time_of
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.parameterisation import SIGMA_DATA, expand
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.diffusion.solvers.angle_ab2 import angle_ab2
from ado_tasks.diffusion.solvers.common import Times
from ado_tasks.diffusion.solvers.ddim import ddim_step
from ado_tasks.errors import ConfigError, DivergenceError

Method = Literal["multistep", "heun"]
Profile = tuple[tuple[float, float], ...]
Images = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]

GROWTH = 2.5  # a step is at most this much longer than the one before: p is a step old (Hairer et al. §II.4: 1.5 to 5)
SAFETY = 0.9  # of the tolerance, where a step can be rejected (Hairer et al. §II.4: 0.8 to 0.9)


class RowDenoiser(Protocol):
    """A denoiser that is told whose samples it sees, to look up their labels."""

    def __call__(self, z: mx.array, t: mx.array, rows: Rows) -> mx.array:
        """Estimate the clean samples of z, (B, …), at times t, (B,); row b belongs to sample rows[b]."""
        ...


@dataclass(frozen=True)
class StepControl:
    """What error a step may make, and how many evaluations a sample may cost."""

    atol: float  # root mean square a number of z/√(α² + σ²), each step
    rtol: float = 0.0  # the same, relative to that of z
    max_nfe: int = 100  # never exceeded: near it, steps become as long as they must
    method: Method = "multistep"
    start: float = 1.0  # the time of the first evaluation; below 1 the noise is taken as if it were z there
    profile: Profile = ()  # (angle, factor of atol) by falling angle, log-linear in between; none: 1 everywhere
    first_std: float = (
        SIGMA_DATA  # the first step is as long as for N(0, first_std²), whose slope at φ = π/2 is first_std²
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (self.atol >= 0 and self.rtol >= 0 and self.atol + self.rtol > 0):
            raise ConfigError(f"atol, rtol: {self.atol}, {self.rtol} are not allowed: neither negative nor both 0")
        if self.max_nfe < 1:
            raise ConfigError(f"max_nfe: {self.max_nfe} is not allowed: at least 1 is required")
        if self.method not in get_args(Method):
            raise ConfigError(f"method: {self.method!r} is not allowed; allowed: {', '.join(get_args(Method))}")
        if not 0 < self.start <= 1:
            raise ConfigError(f"start: {self.start} is not allowed: above 0, at most 1")
        angles, factors = zip(*self.profile, strict=True) if self.profile else ((), ())
        if (np.diff(angles) >= 0).any() or not all(factor > 0 for factor in factors):
            raise ConfigError(f"profile: {self.profile} is not allowed: falling angles with positive factors")
        if not self.first_std > 0:
            raise ConfigError(f"first_std: {self.first_std} is not allowed: it must be positive")


@dataclass(frozen=True)
class AdaptiveSamples:
    """What came out, and what it cost."""

    images: Images  # (n, …), not clipped
    nfe: npt.NDArray[np.int64]  # (n,): evaluations of each sample
    capped: npt.NDArray[np.bool_]  # (n,): where `max_nfe` allowed no step within the tolerance
    calls: int  # of the network, each of `lanes` samples: lanes · calls / Σ nfe is what padding costs


def adaptive(
    denoise: RowDenoiser, noise: Images, schedule: NoiseSchedule, control: StepControl, *, lanes: int
) -> AdaptiveSamples:
    """Sample from `noise`, (n, …) float32, each sample at its own pace.

    `denoise` always sees (lanes, …): one compiled shape serves all, and with a network whose rows do not depend on one
    another a sample has the same bytes alone and among others.

    Raises:
        ConfigError: there is no lane, or no sample.
        DivergenceError: an estimate is not finite; names the sample and the evaluation.
    """
    if lanes < 1 or not len(noise):
        raise ConfigError(f"lanes, noise: {lanes} lanes for {len(noise)} samples; at least 1 of each is required")
    work = _Work(noise, schedule, control, lanes)
    step = _multistep_tick if control.method == "multistep" else _heun_tick
    calls = 0
    while work.busy.any():
        x_hat = denoise(work.z, mx.array(work.time, dtype=mx.float32), work.rows)
        work.used += work.busy
        calls += 1
        step(work, x_hat)
        work.hand_over()
    return AdaptiveSamples(work.images, work.nfe, work.was_capped, calls)


def error_profile(
    denoise: Denoiser, z: mx.array, times: Times, schedule: NoiseSchedule, first_std: float = SIGMA_DATA
) -> Profile:
    """What `angle_ab2` errs in each step of a fixed schedule by its own estimate, mean over samples: a `profile`.

    With atol = 1 and start = times[0] a sample whose estimates are the mean ones takes the same steps.

    Args:
        denoise: the model.
        z: noise, (B, …).
        times: (n + 1,) down to 0.
        schedule: of the model.
        first_std: as in StepControl: there is no estimate for a first step.
    """
    estimates: list[mx.array] = []

    def recorded(z: mx.array, t: mx.array) -> mx.array:
        estimates.append(denoise(z, t))
        return estimates[-1]

    mx.eval(angle_ab2(recorded, z, times, schedule))
    angles = angle(schedule, times)
    moved = [norms(after - before).mean() for before, after in pairwise(estimates)]
    sizes = np.array([first_std**2, *(moved / -np.diff(angles[:-1]))])
    errors = slope_gain(angles[:-1], angles[1:]) * sizes
    return tuple((float(at), float(error)) for at, error in zip(angles[:-1], errors, strict=True))


class _Work:
    """The lanes: arrays of the samples in flight on the device, numbers of the lanes on the host in float64."""

    def __init__(self, noise: Images, schedule: NoiseSchedule, control: StepControl, lanes: int) -> None:
        self.schedule, self.control, self._noise = schedule, control, noise
        self._waiting = deque(range(len(noise)))
        self._first_angle = float(angle(schedule, control.start))
        # Below the least time that networks are trained at there is only the clean end.
        self._least_angle = float(angle(schedule, schedule.t_min))
        self.images = np.empty_like(noise, dtype=np.float32)
        self.nfe = np.zeros(len(noise), np.int64)
        self.was_capped = np.zeros(len(noise), bool)

        self.rows = np.zeros(lanes, np.intp)  # an idle lane is padding: it repeats sample 0 and is never read
        self.busy, self.finished, self.capped = (np.zeros(lanes, bool) for _ in range(3))
        self.angle = np.zeros(lanes)  # where `base` is
        self.before = np.zeros(lanes)  # length of the last step taken; 0 before the first
        self.size = np.zeros(lanes)  # ‖p‖
        self.goal = np.zeros(lanes)  # heun: where the step that is being tried ends
        self.at_goal = np.zeros(lanes, bool)  # heun: is `z` the prediction there?
        self.used = np.zeros(lanes, np.int64)
        self.time = np.zeros(lanes)  # where `z` is
        self.z = mx.array(np.repeat(noise[:1], lanes, axis=0).astype(np.float32))  # what is evaluated next
        self.base, self.x_hat, self.slope = (mx.zeros_like(self.z) for _ in range(3))
        self._seat(np.arange(lanes))

    def hand_over(self) -> None:
        """Take finished samples out, and seat those that wait."""
        lanes = np.flatnonzero(self.finished)
        if not len(lanes):
            return
        for lane, image in zip(lanes, np.array(self.z[mx.array(lanes)]), strict=True):
            row = self.rows[lane]
            if not np.isfinite(image).all():
                raise DivergenceError(f"sample {row} is not finite after {self.used[lane]} evaluations")
            self.images[row], self.nfe[row], self.was_capped[row] = image, self.used[lane], self.capped[lane]
        self.busy[lanes] = self.finished[lanes] = False
        self._seat(lanes)

    def _seat(self, lanes: Rows) -> None:
        seated = lanes[: len(self._waiting)]
        self.rows[lanes] = 0
        self.rows[seated] = [self._waiting.popleft() for _ in seated]
        self.busy[seated] = True
        # Idle lanes start anew as well: they go on being evaluated.
        self.angle[lanes], self.time[lanes] = self._first_angle, self.control.start
        self.size[lanes] = self.control.first_std**2
        self.before[lanes], self.used[lanes], self.capped[lanes], self.at_goal[lanes] = 0.0, 0, False, False
        at = mx.array(lanes)
        self.z[at] = self.base[at] = mx.array(self._noise[self.rows[lanes]].astype(np.float32))
        self.x_hat[at] = self.slope[at] = mx.zeros(self.z[at].shape)  # a lane's past is not its next sample's

    def checked_norms(self, values: mx.array) -> Floats:
        """‖values‖ of each lane, 0 where it is idle. Raises DivergenceError where a sample's is not finite."""
        sizes = norms(values)
        bad = np.flatnonzero(self.busy & ~np.isfinite(sizes))
        if len(bad):
            row, used = self.rows[bad[0]], self.used[bad[0]]
            raise DivergenceError(f"the estimate of sample {row} is not finite at evaluation {used}")
        return np.where(self.busy, sizes, 0.0)

    def tolerance(self) -> Floats:
        """What error a step from `base` may make, (lanes,)."""
        control, allowed = self.control, np.full(len(self.rows), self.control.atol)
        if control.profile:
            angles, factors = np.array(control.profile[::-1]).T
            allowed = control.atol * np.exp(np.interp(self.angle, angles, np.log(factors)))
        if control.rtol > 0:
            alpha, sigma = self.schedule.alpha_sigma(time_of(self.schedule, self.angle))
            allowed = allowed + control.rtol * norms(self.base) / np.hypot(alpha, sigma)
        return allowed

    def plan(self, tolerance: Floats, steps_left: npt.NDArray[np.int64]) -> tuple[Floats, Mask]:
        """Where the next step ends, and whether that is farther than the tolerance allows.

        As far as the tolerance reaches and steps may grow; but with k steps left at least a k-th of the way.
        """
        end = reach(self.angle, self.size, tolerance)
        end = np.where(self.before > 0, np.maximum(end, self.angle - GROWTH * self.before), end)
        latest = self.angle * (1 - 1 / steps_left)
        # An end that is nearer than the least angle is the clean one; an idle lane stays where it is.
        planned = np.minimum(end, latest)
        return np.where(self.busy, np.where(planned < self._least_angle, 0.0, planned), self.angle), latest < end

    def step(self, x_hat: mx.array, slope: mx.array, end: Floats) -> mx.array:
        """One step of each lane from `base` at `angle` to `end`."""
        here = self.schedule.alpha_sigma(time_of(self.schedule, self.angle))
        there = self.schedule.alpha_sigma(time_of(self.schedule, end))
        gain = np.hypot(*there) * slope_gain(self.angle, end)
        *levels, gain = (_per_lane(values, self.z) for values in (*here, *there, gain))
        return ddim_step(x_hat, self.base, *levels) + gain * slope

    def arrive(self, end: Floats, moved: Mask) -> None:
        """The lanes in `moved` have taken a step to `end`; those at the clean end are finished."""
        moved = moved & self.busy
        self.before = np.where(moved, self.angle - end, self.before)
        self.angle = np.where(moved, end, self.angle)
        self.finished |= moved & (end == 0)


def norms(values: mx.array) -> Floats:
    """Root mean square over each sample's own numbers, (B, …) → (B,) float64 on the host."""
    flat = values.reshape(values.shape[0], -1)
    return np.array(mx.sqrt(mx.mean(flat * flat, axis=1)), np.float64)


def _per_lane(values: npt.NDArray, like: mx.array) -> mx.array:
    """A number a lane, (lanes,), as a float32 (or logical) array that broadcasts against `like`."""
    return expand(mx.array(values if values.dtype == bool else values.astype(np.float32)), like)


def _multistep_tick(work: _Work, x_hat: mx.array) -> None:
    """One evaluation, one step: p from the last two evaluations, as far as the tolerance reaches."""
    first = work.before == 0
    slope = _per_lane(np.where(first, 0.0, 1 / np.where(first, 1.0, work.before)), x_hat) * (x_hat - work.x_hat)
    size = work.checked_norms(slope)  # NaN · 0 is NaN: a first estimate is checked too
    work.size = np.where(first, work.size, size)
    end, capped = work.plan(work.tolerance(), work.control.max_nfe - work.used + 1)
    work.z = work.base = work.step(x_hat, slope, end)
    work.x_hat = x_hat
    work.capped |= capped
    work.arrive(end, work.busy)
    work.time = time_of(work.schedule, work.angle)


def _heun_tick(work: _Work, x_hat: mx.array) -> None:
    """One evaluation: at the begin of a step, from which its end is predicted; or there, to take it or to retry."""
    tried, at_goal = work.at_goal, _per_lane(work.at_goal, x_hat)
    slope = _per_lane(1 / np.where(tried, work.angle - work.goal, 1.0), x_hat) * (x_hat - work.x_hat)
    size = work.checked_norms(slope)
    work.slope, work.size = mx.where(at_goal, slope, work.slope), np.where(tried, size, work.size)
    work.x_hat = mx.where(at_goal, work.x_hat, x_hat)

    tolerance, left = work.tolerance(), work.control.max_nfe - work.used
    too_large = tried & (slope_gain(work.angle, np.where(tried, work.goal, work.angle)) * work.size > tolerance)
    taken = tried & ~(too_large & (left > 1))  # another try costs one evaluation, and one is needed after it
    end, capped = work.plan(SAFETY * tolerance, left // 2 + 1)  # a step costs two, the last one none
    work.capped |= np.where(taken, too_large, capped)
    end = np.where(taken, work.goal, end)

    # A prediction is DDIM's; a step that is taken, or that ends clean, has its slope.
    predicted = ~taken & (end > 0) & work.busy
    work.z = work.step(work.x_hat, mx.where(_per_lane(predicted, x_hat), 0.0, work.slope), end)
    work.base = mx.where(_per_lane(taken, x_hat), work.z, work.base)
    work.goal, work.at_goal = end, predicted
    work.arrive(end, ~predicted)
    work.time = time_of(work.schedule, end)
