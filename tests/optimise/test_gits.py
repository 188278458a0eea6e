"""GITS: equal to brute force, costs that are the errors they claim to be, and a gain on an exactly known problem."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from ado_tasks.backend import mx
from ado_tasks.diffusion.grids import uniform_time
from ado_tasks.diffusion.oracles import gaussian_denoiser, gaussian_solution, mixture_denoiser
from ado_tasks.diffusion.schedules import Cosine, Edm
from ado_tasks.diffusion.solvers import ddim, ipndm
from ado_tasks.errors import ConfigError
from ado_tasks.optimise.gits import (
    best_knots,
    best_multistep_knots,
    jump_costs,
    multistep_costs,
    teacher_path,
)

POINTS, GAMMA = 10, 1.15
MEANS = np.random.default_rng(0).uniform(-1, 1, (5, 2, 2, 1))


def random_costs(seed: int, dimensions: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 1.0, (POINTS,) * dimensions)


def discounted(costs: list[float]) -> float:
    return sum(cost * GAMMA**k for k, cost in enumerate(costs))


def paths(jumps: int):
    for middle in combinations(range(1, POINTS - 1), jumps - 1):
        yield (0, *middle, POINTS - 1)


@pytest.mark.parametrize("jumps", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("seed", range(5))
def test_knots_equal_brute_force(jumps, seed):
    costs = random_costs(seed, 2)

    def total(path):
        return discounted([costs[i, j] for i, j in pairwise(path)])

    expected = min(paths(jumps), key=total)
    assert tuple(best_knots(costs, jumps, GAMMA)) == expected


@pytest.mark.parametrize("jumps", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("seed", range(5))
def test_multistep_knots_equal_brute_force(jumps, seed):
    first, costs = random_costs(seed, 2), random_costs(seed + 50, 3)
    i, j = np.tril_indices(POINTS)
    first[i, j] = np.inf
    costs[:, i, j] = costs[i, j, :] = np.inf

    def total(path):
        later = [costs[h, i, j] for h, i, j in zip(path, path[1:], path[2:], strict=False)]
        return discounted([first[path[0], path[1]], *later])

    expected = min(paths(jumps), key=total)
    assert tuple(best_multistep_knots(first, costs, jumps, GAMMA)) == expected


@pytest.fixture(scope="module", params=[Cosine(), Edm()], ids=["Cosine", "Edm"])
def path(request):
    schedule = request.param
    denoise = mixture_denoiser(schedule, MEANS, 0.2)
    sigma = float(schedule.alpha_sigma(1.0)[1])
    z = sigma * mx.random.normal((16, 2, 2, 1), key=mx.random.key(0))
    return schedule, denoise, z, teacher_path(denoise, z, uniform_time(12), schedule)


def rms(difference) -> float:
    return float(np.sqrt(np.mean(np.square(np.array(difference)))))


def test_jump_costs_are_errors_of_ddim_jumps(path):
    schedule, denoise, z, fine = path
    costs, times = jump_costs(fine), fine.times
    _, states = ipndm(denoise, z, times, schedule, trajectory=True)
    scale = float(schedule.alpha_sigma(1.0)[1])
    for i, j in [(0, 1), (0, 7), (0, 12), (3, 4), (5, 9), (11, 12)]:
        jumped = ddim(denoise, states[i], times[[i, j]], schedule)
        assert costs[i, j] == pytest.approx(rms(jumped - states[j]), rel=1e-3, abs=2e-6 * scale)
    assert np.isinf(costs[np.tril_indices(13)]).all()
    assert np.isfinite(costs[np.triu_indices(13, 1)]).all()


def test_multistep_costs_are_errors_of_second_order_jumps(path):
    schedule, denoise, z, fine = path
    costs, times = multistep_costs(fine), fine.times
    _, states = ipndm(denoise, z, times, schedule, trajectory=True)
    alpha, sigma = schedule.alpha_sigma(times)

    def slope(i):
        x_hat = denoise(states[i], mx.full((16,), float(times[i])))
        return x_hat, (states[i] - float(alpha[i]) * x_hat) / float(sigma[i])

    for h, i, j in [(1, 2, 3), (2, 5, 9), (1, 7, 12), (9, 10, 11)]:
        (_, before), (_, here) = slope(h), slope(i)
        move = float(alpha[j]) * float(sigma[j] / alpha[j] - sigma[i] / alpha[i])
        landed = float(alpha[j] / alpha[i]) * states[i] + move * (3 * here - before) / 2
        assert costs[h, i, j] == pytest.approx(rms(landed - states[j]), rel=5e-3, abs=1e-5)
    assert np.isinf(costs[3, 3, 5])
    assert np.isinf(costs[3, 5, 5])
    assert np.isinf(costs[6, 5, 7])


@pytest.mark.parametrize("schedule", [Cosine(), Edm()], ids=["Cosine", "Edm"])
def test_knots_beat_uniform_time_against_the_exact_solution(schedule):
    denoise = gaussian_denoiser(schedule, 0.5)
    sigma = float(schedule.alpha_sigma(1.0)[1])
    z, held_out = (sigma * mx.random.normal((64, 4), key=mx.random.key(seed)) for seed in (0, 1))
    fine = teacher_path(denoise, z, uniform_time(60), schedule)
    exact = gaussian_solution(held_out, 1.0, 0.0, schedule, 0.5)
    for jumps in (4, 6, 8):
        learned = fine.times[best_knots(jump_costs(fine), jumps)]
        errors = [rms(ddim(denoise, held_out, grid, schedule) - exact) for grid in (learned, uniform_time(jumps))]
        assert errors[0] < 0.95 * errors[1]


def test_more_jumps_than_points_are_refused():
    with pytest.raises(ConfigError, match="jumps: 10"):
        best_knots(random_costs(0, 2), 10)
    with pytest.raises(ConfigError, match="jumps: 0"):
        best_multistep_knots(random_costs(0, 2), random_costs(0, 3), 0)


def test_a_path_that_does_not_end_clean_is_refused():
    with pytest.raises(ConfigError, match="t = 0"):
        teacher_path(gaussian_denoiser(Cosine(), 0.5), mx.ones((1, 1)), np.array([1.0, 0.5]), Cosine())
