"""DDIM (Song et al. 2021, eq. 12 with η = 0): order 1, one evaluation a step.

It moves along the straight line from ε̂ to x̂: z_s = α_s x̂ + σ_s ε̂. In EDM's variables (z/α, σ/α) it is Euler's method.
"""

from ado_tasks.backend import mx
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.diffusion.solvers.common import Coefficient, Times, coefficients, finish, times_of


def ddim_step(
    x_hat: mx.array, z: mx.array, alpha_t: Coefficient, sigma_t: Coefficient, alpha_s: Coefficient, sigma_s: Coefficient
) -> mx.array:
    """z_s = α_s x̂ + (σ_s/σ_t)(z_t − α_t x̂): one step from t to s < t. Never divides by α; exact x̂ at σ_s = 0."""
    return alpha_s * x_hat + (sigma_s / sigma_t) * (z - alpha_t * x_hat)


def ddim(
    denoise: Denoiser,
    z: mx.array,
    times: Times,
    schedule: NoiseSchedule,
    *,
    key: mx.array | None = None,
    trajectory: bool = False,
) -> mx.array | tuple[mx.array, list[mx.array]]:
    """Sample from noise `z`, (B, …), at times[0] down to times[-1]. `key` is not used: the method is deterministic."""
    levels = coefficients(schedule, times)
    states = [z]
    for i in range(len(levels) - 1):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels[i], levels[i + 1]
        x_hat = denoise(z, times_of(times[i], z))
        z = ddim_step(x_hat, z, alpha_t, sigma_t, alpha_s, sigma_s)
        mx.async_eval(z)
        states.append(z)
    return finish(states, trajectory)
