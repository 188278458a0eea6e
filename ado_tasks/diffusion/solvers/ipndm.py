"""iPNDM (Zhang & Chen 2023, appendix; Liu et al. 2022): linear multistep on ε̂, one evaluation a step.

Adams–Bashforth weights, used unchanged on non-uniform steps, combine the last ε̂ into ε'. In EDM's variables a step
is Euler's with ε' as the slope, (z/α)_s = (z/α)_t + (σ_s/α_s − σ_t/α_t) ε'. Written in z,

    z_s = α_s x̂ + σ_s ε̂ + (σ_s − α_s σ_t/α_t)(ε' − ε̂),

so that the first step, where ε' = ε̂, never divides by an α that is nearly 0.

Start-up: orders 1, 2, … as evaluations become available. Measured order of convergence 2 with that start-up, whatever
the nominal order: the weights are exact on uniform steps only, and the first step is Euler's.
"""

from ado_tasks.backend import mx
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.diffusion.solvers.common import Times, coefficients, finish, times_of
from ado_tasks.diffusion.solvers.ddim import ddim_step
from ado_tasks.errors import ConfigError

# Adams–Bashforth, newest first (Zhang & Chen 2023, eq. 34–36).
WEIGHTS: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
MAX_ORDER = len(WEIGHTS)


def ipndm(
    denoise: Denoiser,
    z: mx.array,
    times: Times,
    schedule: NoiseSchedule,
    *,
    key: mx.array | None = None,
    trajectory: bool = False,
    order: int = MAX_ORDER,
) -> mx.array | tuple[mx.array, list[mx.array]]:
    """Sample from noise `z`, (B, …), at times[0] down to times[-1]. `key` is not used: the method is deterministic.

    Raises:
        ConfigError: `order` is not 1 (which is DDIM) to 4.
    """
    if not 1 <= order <= MAX_ORDER:
        raise ConfigError(f"order: {order} is not allowed: 1 to {MAX_ORDER}")
    levels = coefficients(schedule, times)
    states: list[mx.array] = [z]
    slopes: list[mx.array] = []  # ε̂, newest first
    for i in range(len(levels) - 1):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels[i], levels[i + 1]
        x_hat = denoise(z, times_of(times[i], z))
        slopes = [(z - alpha_t * x_hat) / sigma_t, *slopes][:order]
        z = ddim_step(x_hat, z, alpha_t, sigma_t, alpha_s, sigma_s)
        if len(slopes) > 1:
            z = z + (sigma_s - alpha_s * sigma_t / alpha_t) * _correction(slopes)
        mx.async_eval(z)
        states.append(z)
    return finish(states, trajectory)


def _correction(slopes: list[mx.array]) -> mx.array:
    """ε' − ε̂ = Σ_k w_k (ε̂_k − ε̂_0), since the weights sum to 1."""
    newest, *older = slopes
    weights = WEIGHTS[len(older)][1:]
    return sum((w * (slope - newest) for w, slope in zip(weights, older, strict=True)), start=mx.zeros_like(newest))
