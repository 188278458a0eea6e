"""Progressive distillation (Salimans & Ho 2022, arXiv:2202.00512, algorithm 2): a student learns to take several of its
teacher's DDIM steps in one.

Notation as there: a student of N steps goes from t = (i+1)/N to s = i/N; its teacher goes the same way in K steps.
K = 2 is the paper's halving. A larger K in the first stage skips a student that nobody wants, at the same arithmetic.
"""

from dataclasses import dataclass

from ado_tasks.backend import mx
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.parameterisation import expand
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.diffusion.solvers.ddim import ddim_step


@dataclass(frozen=True)
class Interval:
    """Where one student step begins and ends, and in how many steps the teacher walks it."""

    student_steps: int  # N
    teacher_substeps: int  # K; 2 is the paper's halving

    def start(self, index: mx.array) -> mx.array:
        """t = (i+1)/N for i in 0..N−1, float32."""
        return (index.astype(mx.float32) + 1.0) / self.student_steps

    def substep(self, index: mx.array, k: int) -> mx.array:
        """The teacher's time after k of its K steps: (i + 1 − k/K)/N. Exactly 0 at the end of the last interval.

        Computed from whole numbers, (K(i+1) − k)/(KN): t − k/(KN) in float32 would miss 0 and with it alpha = 1.
        """
        whole = self.teacher_substeps * (index.astype(mx.float32) + 1.0) - k
        return whole / (self.teacher_substeps * self.student_steps)


def teacher_walk(teacher: Denoiser, z_t: mx.array, index: mx.array, interval: Interval, schedule: NoiseSchedule) -> mx.array:
    """z'': where K DDIM steps of the teacher lead from z_t, t = (i+1)/N, to s = i/N. Nothing is clipped."""
    z = z_t
    for k in range(interval.teacher_substeps):
        t, s = interval.substep(index, k), interval.substep(index, k + 1)
        alpha_t, sigma_t = (expand(c, z) for c in schedule.alpha_sigma(t))
        alpha_s, sigma_s = (expand(c, z) for c in schedule.alpha_sigma(s))
        z = ddim_step(teacher(z, t), z, alpha_t, sigma_t, alpha_s, sigma_s)
    return z


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
    teacher: Denoiser, z_t: mx.array, index: mx.array, interval: Interval, schedule: NoiseSchedule
) -> mx.array:
    """x̃ for noisy images z_t (B, H, W, C) that stand at the start of interval `index` (B,)."""
    z_end = teacher_walk(teacher, z_t, index, interval, schedule)
    alpha_t, sigma_t = (expand(c, z_t) for c in schedule.alpha_sigma(interval.start(index)))
    end = interval.substep(index, interval.teacher_substeps)
    alpha_s, sigma_s = (expand(c, z_t) for c in schedule.alpha_sigma(end))
    return mx.stop_gradient(target(z_end, z_t, alpha_t, sigma_t, alpha_s, sigma_s))


def step_with(x: mx.array, z_t: mx.array, index: mx.array, interval: Interval, schedule: NoiseSchedule) -> mx.array:
    """One student DDIM step with x as its x̂: with the exact target it lands on z''."""
    end = interval.substep(index, interval.teacher_substeps)
    alpha_t, sigma_t = (expand(c, z_t) for c in schedule.alpha_sigma(interval.start(index)))
    alpha_s, sigma_s = (expand(c, z_t) for c in schedule.alpha_sigma(end))
    return ddim_step(x, z_t, alpha_t, sigma_t, alpha_s, sigma_s)
