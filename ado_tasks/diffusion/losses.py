"""Denoising losses: weights on ‖x̂ − x‖² as functions of λ = log SNR.

Every usual loss is the squared error of x̂ under some weight (Kingma et al. 2021, §5; Salimans & Ho 2022, §4).
Written in λ none of them divides by a small α or σ.
"""

from collections.abc import Callable

from ado_tasks.backend import mx
from ado_tasks.diffusion.parameterisation import SIGMA_DATA
from ado_tasks.errors import ConfigError

Weight = Callable[[mx.array], mx.array]

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, §3.4


def snr(log_snr: mx.array) -> mx.array:
    """SNR = e^λ: the weight under which ‖x̂ − x‖² is ‖ε̂ − ε‖² (Ho et al. 2020, eq. 14)."""
    return mx.exp(log_snr)


def v(log_snr: mx.array) -> mx.array:
    """1 + SNR: the weight under which ‖x̂ − x‖² is ‖v̂ − v‖² (variance-preserving; Salimans & Ho 2022, §4)."""
    return 1 + mx.exp(log_snr)


def truncated_snr(log_snr: mx.array) -> mx.array:
    """max(1, SNR) (Salimans & Ho 2022, eq. 9)."""
    return mx.exp(mx.maximum(log_snr, 0.0))


def min_snr(log_snr: mx.array, gamma: float = MIN_SNR_GAMMA) -> mx.array:
    """min(SNR, γ) (Hang et al. 2023, eq. 8, for x-prediction)."""
    return mx.minimum(mx.exp(mx.minimum(log_snr, 80.0)), gamma)  # e^80 is finite in float32, and far above any γ


def edm(log_snr: mx.array, sigma_data: float = SIGMA_DATA) -> mx.array:
    """1/c_out² = (σ̃² + σ_d²)/(σ̃ σ_d)² = SNR + 1/σ_d² with σ̃² = 1/SNR (Karras et al. 2022, Table 1)."""
    return mx.exp(log_snr) + 1 / sigma_data**2


WEIGHTS: dict[str, Weight] = {"snr": snr, "v": v, "truncated_snr": truncated_snr, "min_snr": min_snr, "edm": edm}


def weight(name: str) -> Weight:
    """A weight by name. Raises ConfigError for a name that does not exist."""
    if name not in WEIGHTS:
        raise ConfigError(f"loss: {name!r} is not allowed; allowed: {', '.join(WEIGHTS)}")
    return WEIGHTS[name]


def weighted_squared_error(x_hat: mx.array, x: mx.array, weights: mx.array) -> mx.array:
    """The weighted mean over an image of (x̂ − x)²: (B, …), (B, …), (B,) → (B,)."""
    return weights * mx.mean(mx.square(x_hat - x).reshape(x.shape[0], -1), axis=1)


def weighted_charbonnier_error(x_hat: mx.array, x: mx.array, weights: mx.array, c: float) -> mx.array:
    """The mean over an image of √(w (x̂ − x)² + c²) − c: (B, …), (B, …), (B,) → (B,).

    Charbonnier et al. 1994: squared near 0, absolute beyond c, so that the few images which a student cannot place do
    not decide for all (as Song & Dhariwal 2024, §3.3, for consistency models; there of a whole image's norm).
    """
    scaled = weights.reshape(-1, *[1] * (x.ndim - 1)) * mx.square(x_hat - x)
    return mx.mean((mx.sqrt(scaled + c * c) - c).reshape(x.shape[0], -1), axis=1)


def weighted_norm_error(x_hat: mx.array, x: mx.array, weights: mx.array, c: float) -> mx.array:
    """The distance w (√(‖x̂ − x‖² + c²) − c) of whole images, c > 0: (B, …), (B, …), (B,) → (B,).

    Pseudo-Huber (Song & Dhariwal 2024, §3.3), computed as ‖·‖²/(√(‖·‖² + c²) + c): nothing cancels near 0.
    """
    squared = mx.sum(mx.square(x_hat - x).reshape(x.shape[0], -1), axis=1)
    return weights * squared / (mx.sqrt(squared + c * c) + c)
