"""DPM-Solver++(2M) (Lu et al. 2022b, Alg. 2): multistep, order 2, one evaluation a step.

    z_s = (σ_s/σ_t) z_t + α_s (1 − e^(−h)) D,    D = x̂_t + (x̂_t − x̂_prev)/(2r),    r = h_prev/h,    h = λ_s − λ_t.

Start-up: the first step is DDIM's. A last step to t = 0 has h = ∞ and takes D = x̂_t (Diffusers' `lower_order_final`).
"""

import math

from ado_tasks.backend import mx
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.diffusion.solvers.common import Times, coefficients, finish, times_of
from ado_tasks.diffusion.solvers.ddim import ddim_step


def dpmpp_2m(
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
    # λ/2; the factor cancels in r.
    half_log_snr = [math.log(alpha / sigma) if sigma > 0 else math.inf for alpha, sigma in levels]
    states, previous = [z], None
    for i in range(len(levels) - 1):
        x_hat = denoise(z, times_of(times[i], z))
        step = half_log_snr[i + 1] - half_log_snr[i]
        extrapolated = x_hat
        if previous is not None and math.isfinite(step):
            ratio = (half_log_snr[i] - half_log_snr[i - 1]) / step
            extrapolated = x_hat + (x_hat - previous) / (2 * ratio)
        z = ddim_step(extrapolated, z, *levels[i], *levels[i + 1])
        previous = x_hat
        mx.async_eval(z)
        states.append(z)
    return finish(states, trajectory)
