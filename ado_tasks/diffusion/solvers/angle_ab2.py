"""Adams–Bashforth of order 2 in the angle φ = arctan(σ/α): multistep, one evaluation a step (see `diffusion/angle.py`).

    z_s = α_s x̂_t + σ_s ε̂_t + √(α_s² + σ_s²) G(φ_t, φ_s) (x̂_t − x̂_prev)/(φ_prev − φ_t).

Start-up: the first step is DDIM's. A last step to t = 0 extrapolates as any other, since G is bounded there, where
DPM-Solver++(2M), whose λ is infinite, falls back to order 1. Near φ = 0, where x̂ moves as φ² and steps are no longer
short beside φ, equal steps of size h down to t = 0 err as h² ln(1/h).
"""

from ado_tasks.backend import mx
from ado_tasks.diffusion.angle import angle, slope_gain
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.diffusion.solvers.common import Times, coefficients, finish, times_of
from ado_tasks.diffusion.solvers.ddim import ddim_step


def angle_ab2(
    denoise: Denoiser,
    z: mx.array,
    times: Times,
    schedule: NoiseSchedule,
    *,
    key: mx.array | None = None,
    trajectory: bool = False,
) -> mx.array | tuple[mx.array, list[mx.array]]:
    """Sample from noise `z`, (B, …), at times[0] down to times[-1]. `key` is not used: the method is deterministic."""
    levels, angles = coefficients(schedule, times), angle(schedule, times)
    gains = slope_gain(angles[:-1], angles[1:])
    states, previous = [z], None
    for i in range(len(levels) - 1):
        x_hat = denoise(z, times_of(times[i], z))
        z = ddim_step(x_hat, z, *levels[i], *levels[i + 1])
        if previous is not None:
            scale = (levels[i + 1][0] ** 2 + levels[i + 1][1] ** 2) ** 0.5
            z = z + float(scale * gains[i] / (angles[i - 1] - angles[i])) * (x_hat - previous)
        previous = x_hat
        mx.async_eval(z)
        states.append(z)
    return finish(states, trajectory)
