"""Consistency sampling (Song et al. 2023, Algorithm 1): one evaluation a step, stochastic from the second on.

A consistency function leads from any noise level straight to clean. Each further step noises that result anew, to a
level that is lower than the one before, and maps it again:

    z_s = α_s f(z_t, t) + σ_s ε,    ε ~ N(0, I) anew in each step;    f itself in a last step to t = 0.

With the exact consistency function every grid gives the data's distribution exactly: there is no order of convergence.
With any other denoiser x̂ is a mean, and the samples are too narrow.
"""

from ado_tasks.backend import mx
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.diffusion.solvers.common import Times, coefficients, finish, keys_of_steps, noise_like, times_of
from ado_tasks.errors import ConfigError


def consistency(
    denoise: Denoiser,
    z: mx.array,
    times: Times,
    schedule: NoiseSchedule,
    *,
    key: mx.array | None = None,
    trajectory: bool = False,
) -> mx.array | tuple[mx.array, list[mx.array]]:
    """Sample from noise `z`, (B, …), at times[0]; times between it and the last are those that are noised to.

    `key` is one random key, or a key a sample, (B, 2). One step to t = 0 draws nothing and needs none.

    Raises:
        ConfigError: no key was given, and noise has to be drawn.
    """
    levels = coefficients(schedule, times)
    if key is None and (len(levels) > 2 or levels[-1][1] > 0):
        raise ConfigError("key: consistency sampling draws noise between its steps and needs a random key; none given")
    keys = [] if key is None else keys_of_steps(key, len(levels) - 1)
    states = [z]
    for i in range(len(levels) - 1):
        alpha, sigma = levels[i + 1]
        z = alpha * denoise(z, times_of(times[i], z))
        if sigma > 0:
            z = z + sigma * noise_like(z, keys[i])
        mx.async_eval(z)
        states.append(z)
    return finish(states, trajectory)
