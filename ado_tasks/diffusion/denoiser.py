"""From a network to a *denoiser*: a function of (z, t) that says x̂, whatever the network itself predicts."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from ado_tasks.backend import mx
from ado_tasks.diffusion.parameterisation import SIGMA_DATA, check_kind, expand, network_input, to_x
from ado_tasks.diffusion.schedules import NoiseSchedule


class Denoiser(Protocol):
    """(z, t) → x̂, all solvers need of a model."""

    def __call__(self, z: mx.array, t: mx.array) -> mx.array:
        """Estimate the clean sample of z, (B, …), at times t, (B,) in (0, 1]."""
        ...


def make_denoiser(
    apply: Callable[[mx.array, mx.array], mx.array], schedule: NoiseSchedule, kind: str, sigma_data: float = SIGMA_DATA
) -> Denoiser:
    """A denoiser from `apply(z, timestep) → network output`.

    Args:
        apply: the network: (B, …) and real timesteps (B,) → (B, …); bind class labels and weights into it.
        schedule: gives α, σ and the timestep of each t, in float32.
        kind: what the output means (see `parameterisation`).
        sigma_data: standard deviation of the data, for `edm`.

    Raises:
        ConfigError: `kind` does not exist.
    """
    check_kind(kind)

    def denoise(z: mx.array, t: mx.array) -> mx.array:
        alpha, sigma = (expand(c, z) for c in schedule.alpha_sigma(t))
        output = apply(network_input(z, alpha, sigma, kind, sigma_data), schedule.timestep(t))
        return to_x(output, z, alpha, sigma, kind, sigma_data)

    return denoise


def told(denoise: Denoiser, times: np.ndarray | Sequence[float]) -> Denoiser:
    """The denoiser told other times than the solver's: in its k-th call, times[k] (Tong et al. 2024, decoupled times).

    For one run of a solver; one call more than there are times is an error (StopIteration is not caught).
    """
    waiting = iter(np.asarray(times, np.float64).tolist())

    def denoise_as_told(z: mx.array, t: mx.array) -> mx.array:
        return denoise(z, mx.full(t.shape, next(waiting), dtype=t.dtype))

    return denoise_as_told
