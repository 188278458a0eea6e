"""Where a sampler steps: grids of times from 1 (noise) to 0 (clean), float64, (n + 1,).

Every grid is pinned at both ends: the first evaluation is at t = 1 and the last interval ends at t = 0, so n steps
are n intervals. `uniform_time` is Diffusers' "trailing" spacing. The two others place n points over a range of noise
levels, ending with a point above 0, as their papers do, and then step to 0.

That range is EDM's, σ/α from 80 to 0.002, as Karras et al. use it for variance-preserving models too: a schedule's
own extreme (σ/α = 20,000 for `Cosine`) would spend the few steps there are where nothing happens. It stops at
timestep 0, if that comes before 0.002, since no network is trained between timestep 0 and clean. The first point is
then moved to t = 1.
"""

import numpy as np

from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.errors import ConfigError

RATIO_MIN, RATIO_MAX = 0.002, 80.0  # σ/α; Karras et al. 2022, Table 1
RHO = 7.0  # Karras et al. 2022, Table 1


def uniform_time(n: int) -> np.ndarray:
    """Times t_i = 1 − i/n: Diffusers' trailing grid when n divides the number of training timesteps."""
    _check(n)
    return np.arange(n, -1, -1) / n


def uniform_log_snr(
    n: int, schedule: NoiseSchedule, ratios: tuple[float, float] = (RATIO_MIN, RATIO_MAX)
) -> np.ndarray:
    """Place n points equally spaced in λ from the noisy to the clean end of `ratios` = (min, max) of σ/α, then 0."""
    _check(n)
    low, high = (np.log(ratio) for ratio in _reachable(ratios, schedule))
    return _times(np.linspace(high, low, n), schedule)


def edm_rho(
    n: int, schedule: NoiseSchedule, rho: float = RHO, ratios: tuple[float, float] = (RATIO_MIN, RATIO_MAX)
) -> np.ndarray:
    """Place n points equally spaced in (σ/α)^(1/ρ), then 0 (Karras et al. 2022, eq. 5)."""
    _check(n)
    low, high = (ratio ** (1 / rho) for ratio in _reachable(ratios, schedule))
    return _times(rho * np.log(np.linspace(high, low, n)), schedule)


def _reachable(ratios: tuple[float, float], schedule: NoiseSchedule) -> tuple[float, float]:
    """The range of σ/α, within what networks on this schedule are trained at."""
    cleanest, noisiest = (float(np.exp(-schedule.log_snr(t) / 2)) for t in (schedule.t_min, 1.0))
    return max(ratios[0], cleanest), min(ratios[1], noisiest)


def _times(log_ratios: np.ndarray, schedule: NoiseSchedule) -> np.ndarray:
    times = np.asarray(schedule.time(-2 * log_ratios))
    times[0] = 1.0
    return np.append(times, 0.0)


def _check(n: int) -> None:
    if n < 1:
        raise ConfigError(f"steps: {n} is not allowed: at least 1 is required")
