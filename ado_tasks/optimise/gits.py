"""GITS: where a frozen model should step, by dynamic programming on its own trajectories (Chen et al. 2024).

One batch of fine trajectories z_0 … z_m, ending clean, is made once with the frozen model. cost[i, j] is the error of
one jump of a DDIM step (Euler's, in EDM's variables) from z_i straight to time j, against z_j. Of all ways to go from
0 to m in k jumps the one with the least discounted sum of costs is taken (their Alg. 1):

    V[j][k] = min_i cost[j, i] + γ V[i][k − 1],    V[j][1] = cost[j, m],    γ = 1.15,

with the arg-mins stored. Errors made late weigh more (γ > 1), since the model corrects early ones in part.

The error used here is the root mean square over the batch of the difference in z; their `l2` metric is the mean norm
in z/α. On a variance-exploding schedule z is z/α. On a variance-preserving one z is the better scale: a difference δ
in z/α changes the sample that comes of it by about s/√(s² + (σ/α)²) δ, which for data of unit variance is α δ.

Multistep solvers are added, where the slope of a jump depends on the jump before it: it is priced with the second-order
Adams–Bashforth slope (3 ε̂_i − ε̂_h)/2, and the programme runs over pairs of knots.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ado_tasks.backend import mx
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.diffusion.solvers import ipndm
from ado_tasks.errors import ConfigError

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

GAMMA = 1.15  # Chen et al. 2024, §3.3
TEACHER_POINTS = 61  # Chen et al. 2024, §4.1


@dataclass(frozen=True)
class TeacherPath:
    """Fine trajectories of a batch, reduced to the products that costs are made of."""

    times: Floats  # (m + 1,), falling, the last one 0
    alpha: Floats  # (m + 1,)
    sigma: Floats  # (m + 1,)
    gram: Floats  # (2m + 2, 2m + 2): mean products a pixel of x̂_0 … x̂_m, ε̂_0 … ε̂_m; x̂_m is the sample itself
    sample: npt.NDArray[np.float32]  # (B, …): the fine solution

    @property
    def last(self) -> int:
        """The index m of the clean end."""
        return len(self.times) - 1


def teacher_path(denoise: Denoiser, z: mx.array, times: Floats, schedule: NoiseSchedule) -> TeacherPath:
    """Run the frozen model finely from noise `z`, (B, …), with iPNDM: one evaluation a step.

    Raises:
        ConfigError: the times do not end at 0.
    """
    if times[-1] != 0:
        raise ConfigError(f"times: a teacher's path has to end at t = 0, not at {times[-1]}")
    estimates: list[mx.array] = []

    def recorded(z: mx.array, t: mx.array) -> mx.array:
        estimates.append(denoise(z, t))
        return estimates[-1]

    sample, states = ipndm(recorded, z, times, schedule, trajectory=True)
    alpha, sigma = schedule.alpha_sigma(times)
    x_hats, zs = (
        np.stack([np.array(a, np.float64).ravel() for a in arrays]) for arrays in ([*estimates, sample], states)
    )
    epsilons = np.zeros_like(zs)  # ε̂ at the clean end is never used: σ_m = 0
    epsilons[:-1] = (zs[:-1] - alpha[:-1, None] * x_hats[:-1]) / sigma[:-1, None]
    vectors = np.concatenate([x_hats, epsilons])
    return TeacherPath(times, alpha, sigma, vectors @ vectors.T / vectors.shape[1], np.array(sample))


def jump_costs(path: TeacherPath) -> Floats:
    """cost[i, j]: error of one DDIM jump from z_i to time j, which lands on α_j x̂_i + σ_j ε̂_i.

    (m + 1, m + 1); infinite unless i < j.
    """
    size = path.last + 1
    i, j = np.triu_indices(size, k=1)
    costs = np.full((size, size), np.inf)
    costs[i, j] = _root_mean_square(path, _combination(path, i, j) - _combination(path, j, j))
    return costs


def multistep_costs(path: TeacherPath) -> Floats:
    """cost[h, i, j]: error of a jump i → j whose slope is (3 ε̂_i − ε̂_h)/2.

    It lands (σ_j − α_j σ_i/α_i)(ε̂_i − ε̂_h)/2 away from the DDIM jump.
    (m + 1, m + 1, m + 1); infinite unless h < i < j.
    """
    size = path.last + 1
    costs = np.full((size, size, size), np.inf)
    for h in range(size - 2):
        i, j = (index + h + 1 for index in np.triu_indices(size - h - 1, k=1))
        error = _combination(path, i, j) - _combination(path, j, j)
        stretch = (path.sigma[j] - path.alpha[j] * path.sigma[i] / path.alpha[i]) / 2
        rows = np.arange(len(i))
        error[rows, size + i] += stretch
        error[rows, size + h] -= stretch
        costs[h, i, j] = _root_mean_square(path, error)
    return costs


def best_knots(costs: Floats, jumps: int, gamma: float = GAMMA) -> Indices:
    """Indices of the knots of the least discounted cost from 0 to m, (jumps + 1,).

    Args:
        costs: cost[i, j] of each jump; only i < j counts.
        jumps: how many, 1 to m.
        gamma: discount.

    Raises:
        ConfigError: there are not as many points as jumps.
    """
    last = _check_jumps(len(costs), jumps)
    costs = np.where(np.triu(np.ones_like(costs), k=1) > 0, costs, np.inf)
    value, choices = costs[:, last].copy(), []
    for _ in range(jumps - 1):
        through = costs + gamma * value[None, :]
        choices.append(through.argmin(axis=1))
        value = through.min(axis=1)
    knots = [0]
    for choice in reversed(choices):
        knots.append(int(choice[knots[-1]]))
    return np.array([*knots, last])


def best_multistep_knots(first: Floats, costs: Floats, jumps: int, gamma: float = GAMMA) -> Indices:
    """As `best_knots`, where every jump but the first is priced with its predecessor.

    V[h, j][k] = min_i cost[h, j, i] + γ V[j, i][k − 1]: the state is a pair of knots.

    Args:
        first: cost[i, j] of the first jump.
        costs: cost[h, i, j] of a jump i → j after h → i.
        jumps: how many, 1 to m.
        gamma: discount.

    Raises:
        ConfigError: there are not as many points as jumps.
    """
    last = _check_jumps(len(first), jumps)
    if jumps == 1:
        return np.array([0, last])
    value, choices = costs[:, :, last].copy(), []  # value[h, i]: what is still to pay, being at i and coming from h
    for _ in range(jumps - 2):
        through = costs + gamma * value[None, :, :]
        choices.append(through.argmin(axis=2))
        value = through.min(axis=2)
    knots = [0, int((first[0] + gamma * value[0]).argmin())]
    for choice in reversed(choices):
        knots.append(int(choice[knots[-2], knots[-1]]))
    return np.array([*knots, last])


def _check_jumps(points: int, jumps: int) -> int:
    if not 1 <= jumps < points:
        raise ConfigError(f"jumps: {jumps} is not allowed between {points} points: 1 to {points - 1}")
    return points - 1


def _combination(path: TeacherPath, i: Indices, j: Indices) -> Floats:
    """Coefficients, over the vectors of the Gram matrix, of α_j x̂_i + σ_j ε̂_i: (n, 2m + 2)."""
    size = path.last + 1
    rows, found = np.arange(len(i)), np.zeros((len(i), 2 * size))
    found[rows, i] = path.alpha[j]
    found[rows, size + i] = path.sigma[j]
    return found


def _root_mean_square(path: TeacherPath, combinations: Floats) -> Floats:
    """Root mean square of each combination of vectors: √(c G cᵀ)."""
    return np.sqrt(np.maximum(((combinations @ path.gram) * combinations).sum(axis=1), 0.0))
