"""Data distributions whose best denoiser is known in closed form: exact tests for solvers, schedules and distillers.

For z = α x + σ ε the best denoiser is E[x | z]. With x ~ N(m, s²) it is m + α s²/(α² s² + σ²) (z − α m), and the
probability-flow ODE has the solution z_s = α_s m + (S_s/S_t)(z_t − α_t m) with S² = α² s² + σ².
"""

import numpy as np

from ado_tasks.backend import mx
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.parameterisation import expand
from ado_tasks.diffusion.schedules import NoiseSchedule


def gaussian_denoiser(schedule: NoiseSchedule, std: float, mean: float = 0.0) -> Denoiser:
    """The best denoiser of N(mean, std²), independent pixels."""

    def denoise(z: mx.array, t: mx.array) -> mx.array:
        alpha, sigma = (expand(c, z) for c in schedule.alpha_sigma(t))
        gain = alpha * std**2 / ((alpha * std) ** 2 + sigma**2)
        return mean + gain * (z - alpha * mean)

    return denoise


def gaussian_solution(
    z: mx.array, t: float, s: float, schedule: NoiseSchedule, std: float, mean: float = 0.0
) -> mx.array:
    """The exact solution at time s of the ODE that starts from `z` at time t."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([float(c) for c in schedule.alpha_sigma(time)] for time in (t, s))
    scale = np.hypot(alpha_s * std, sigma_s) / np.hypot(alpha_t * std, sigma_t)
    return alpha_s * mean + float(scale) * (z - alpha_t * mean)


def gaussian_consistency(schedule: NoiseSchedule, std: float | mx.array, mean: float = 0.0) -> Denoiser:
    """The exact consistency function of N(mean, std²): where the solution through z at time t ends, at t = 0.

    m + s/√(α² s² + σ²) (z − α m); in EDM's variables, with u = σ/α, m + s/√(s² + u²) (z/α − m).
    """

    def denoise(z: mx.array, t: mx.array) -> mx.array:
        alpha, sigma = (expand(c, z) for c in schedule.alpha_sigma(t))
        return mean + std / mx.sqrt((alpha * std) ** 2 + sigma**2) * (z - alpha * mean)

    return denoise


def mixture_denoiser(
    schedule: NoiseSchedule, means: np.ndarray, std: float, weights: np.ndarray | None = None
) -> Denoiser:
    """The best denoiser of Σ_k w_k N(m_k, std² I).

    Args:
        schedule: gives α, σ at each time.
        means: (K, …), one centre an image.
        std: standard deviation around each centre; > 0.
        weights: (K,), positive; equal if not given.
    """
    centres = means.reshape(len(means), -1)
    log_weights = np.zeros(len(means)) if weights is None else np.log(weights)

    def denoise(z: mx.array, t: mx.array) -> mx.array:
        flat = z.reshape(z.shape[0], -1)
        alpha, sigma = (expand(c, flat) for c in schedule.alpha_sigma(t))
        m = mx.array(centres, dtype=z.dtype)
        variance = (alpha * std) ** 2 + sigma**2
        # ‖z − α m‖² less ‖z‖², which is the same for all k.
        squared = alpha**2 * mx.sum(m * m, axis=1) - 2 * alpha * (flat @ m.T)
        responsibility = mx.softmax(mx.array(log_weights, dtype=z.dtype) - squared / (2 * variance), axis=1)
        centre = responsibility @ m
        return (centre + alpha * std**2 / variance * (flat - alpha * centre)).reshape(z.shape)

    return denoise
