"""What all solvers share: coefficients in float64 on the host, states in float32 on the device."""

from collections.abc import Sequence

import numpy as np

from ado_tasks.backend import mx
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.errors import ConfigError

Coefficient = mx.array | float
Times = np.ndarray | Sequence[float]


def coefficients(schedule: NoiseSchedule, times: Times) -> list[tuple[float, float]]:
    """(α, σ) at each time, computed in float64.

    Raises:
        ConfigError: the times do not fall strictly within [0, 1], or are fewer than two.
    """
    grid = np.asarray(times, dtype=np.float64)
    if grid.ndim != 1 or len(grid) < 2 or not (np.diff(grid) < 0).all() or grid[0] > 1 or grid[-1] < 0:
        raise ConfigError(f"times: {grid.tolist()} are not allowed: at least two, strictly falling, within [0, 1]")
    alpha, sigma = schedule.alpha_sigma(grid)
    return [(float(a), float(s)) for a, s in zip(alpha, sigma, strict=True)]


def times_of(t: float, z: mx.array) -> mx.array:
    """The time for each sample of a batch: (B,), float32 (float64 only if z is)."""
    return mx.full((z.shape[0],), float(t), dtype=mx.float64 if z.dtype == mx.float64 else mx.float32)


_BATCH_OF_KEYS = 2  # dimensions of a key a sample, (B, 2); one key has one


def noise_like(z: mx.array, key: mx.array) -> mx.array:
    """Standard normal noise shaped as z from one key, (2,), or a key a sample, (B, 2)."""
    if key.ndim < _BATCH_OF_KEYS:
        return mx.random.normal(z.shape, key=key).astype(z.dtype)
    return mx.stack([mx.random.normal(z.shape[1:], key=one) for one in key]).astype(z.dtype)


def keys_of_steps(key: mx.array, steps: int) -> list[mx.array]:
    """The keys of each step: of one key, or of a key a sample."""
    if key.ndim < _BATCH_OF_KEYS:
        return list(mx.random.split(key, steps))
    return list(mx.stack([mx.random.split(one, steps) for one in key], axis=1))


def finish(states: list[mx.array], trajectory: bool) -> mx.array | tuple[mx.array, list[mx.array]]:
    """The final state, with all states from the initial noise on if a trajectory is wanted."""
    return (states[-1], states) if trajectory else states[-1]
