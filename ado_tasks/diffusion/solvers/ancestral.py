"""Ancestral sampling (Ho et al. 2020, eq. 7; DDIM with η = 1): stochastic, one evaluation a step.

Each step draws from q(z_s | z_t, x = x̂). With e^(λ_t − λ_s) = r < 1 (Kingma et al. 2021, appendix A.4):

    mean = r (α_s/α_t) z_t + α_s (1 − r) x̂,     variance = σ_s² (1 − r).

r α_s/α_t is computed as (α_t/α_s)(σ_s/σ_t)², so nothing is divided by a small α.
"""

import math

from ado_tasks.backend import mx
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.diffusion.solvers.common import Times, coefficients, finish, keys_of_steps, noise_like, times_of
from ado_tasks.errors import ConfigError


def ancestral(
    denoise: Denoiser,
    z: mx.array,
    times: Times,
    schedule: NoiseSchedule,
    *,
    key: mx.array | None = None,
    trajectory: bool = False,
) -> mx.array | tuple[mx.array, list[mx.array]]:
    """Sample from noise `z`, (B, …), at times[0] down to times[-1].

    `key` is one random key, or a key a sample, (B, 2): then a sample does not depend on the batch it is drawn in.
    Weak order 1. The noise vanishes in a last step to t = 0.

    Raises:
        ConfigError: no key was given.
    """
    if key is None:
        raise ConfigError("key: the ancestral sampler draws noise and needs a random key; none was given")
    levels = coefficients(schedule, times)
    keys = keys_of_steps(key, len(levels) - 1)
    states = [z]
    for i in range(len(levels) - 1):
        of_z, of_x, std = posterior(*levels[i], *levels[i + 1])
        x_hat = denoise(z, times_of(times[i], z))
        z = of_z * z + of_x * x_hat
        if std > 0:
            z = z + std * noise_like(z, keys[i])
        mx.async_eval(z)
        states.append(z)
    return finish(states, trajectory)


def posterior(alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float) -> tuple[float, float, float]:
    """The factors of z_t and x̂ in the mean of q(z_s | z_t, x̂), and its standard deviation."""
    ratio = (alpha_t / alpha_s) * (sigma_s / sigma_t)  # √r
    remainder = (1 - ratio) * (1 + ratio)
    return ratio * sigma_s / sigma_t, alpha_s * remainder, sigma_s * math.sqrt(remainder)
