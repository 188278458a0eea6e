"""Integration in the angle φ = arctan(σ/α): x̂ taken as a straight line in φ between (or beyond) two evaluations.

In z/√(α² + σ²) a state is cos φ x + sin φ ε (Salimans & Ho 2022, appendix D), whatever the schedule, and φ runs from
near π/2 (noise) to 0 (clean): unlike λ and σ/α it is bounded at both ends. The exact solution of the ODE from φ_t to
φ_s for an x̂ that moves along z's path as x̂_t + (φ_t − φ) p is DDIM's step and one more term,

    z_s = α_s x̂_t + σ_s ε̂_t + √(α_s² + σ_s²) G(φ_t, φ_s) p,
    G(φ_t, φ_s) = (φ_t − φ_s) cos φ_s − sin φ_s ln(sin φ_t/sin φ_s),

from ∫ (φ_t − φ)/sin² φ dφ by parts (the exponential integral of Lu et al. 2022b, eq. 9, with dλ/2 = −dφ/(sin φ cos φ)).
G is h²/(2 sin φ) for small h, grows as φ_s falls, and is φ_t at the clean end: a last step to t = 0 extrapolates too.

With p from this step's two ends it is Heun's method (one more evaluation); with p from the step before it is
Adams-Bashforth's of order 2 (none): DEIS of Zhang & Chen 2023 with x̂ in the place of ε̂ and φ in that of t.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ado_tasks.diffusion.schedules import NoiseSchedule

Floats = npt.NDArray[np.float64]

HALVINGS = 48  # of an interval of at most π/2: below 1e-14


def angle(schedule: NoiseSchedule, times: Any) -> Floats:
    """φ = arctan(σ/α) in [0, π/2] at these times, float64; exactly 0 at t = 0."""
    alpha, sigma = schedule.alpha_sigma(np.asarray(times, np.float64))
    return np.arctan2(sigma, alpha)


def time_of(schedule: NoiseSchedule, angles: Any) -> Floats:
    """The times of these angles, float64; exactly 0 at angle 0."""
    angles = np.asarray(angles, np.float64)
    clean = angles <= 0
    safe = np.where(clean, 1.0, angles)
    return np.where(clean, 0.0, schedule.time(2 * np.log(np.cos(safe) / np.sin(safe))))


def slope_gain(start: Any, end: Any) -> Floats:
    """G(φ_t, φ_s) for φ_t = `start` ≥ φ_s = `end` ≥ 0, float64: what a unit slope of x̂ adds to z/√(α² + σ²)."""
    start, end = np.asarray(start, np.float64), np.asarray(end, np.float64)
    sine = np.sin(end)
    # x ln x → 0: at the clean end the second term vanishes.
    ratio = np.sin(start) / np.where(sine > 0, sine, 1.0)
    return (start - end) * np.cos(end) - np.where(sine > 0, sine * np.log(ratio), 0.0)


def reach(start: Any, slope: Any, tolerance: Any) -> Floats:
    """The least angle φ_s ≥ 0 with G(φ_t, φ_s) · slope ≤ tolerance: how far one may step from φ_t = `start`.

    Element by element, by bisection. Slopes ≥ 0 and tolerances > 0 of equal shape; 0 where the clean end is in reach.
    """
    start, slope, tolerance = (np.asarray(values, np.float64) for values in (start, slope, tolerance))
    low, high = np.zeros_like(start), start.copy()  # `high` is always in reach, `low` only where it is the answer
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        within = slope_gain(start, middle) * slope <= tolerance
        low, high = np.where(within, low, middle), np.where(within, middle, high)
    return np.where(start * slope <= tolerance, 0.0, high)
