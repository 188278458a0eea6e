"""Fitted knots: least squares finds known optima, keeps its budget, and lands on the training timesteps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from ado_tasks.backend import mx
from ado_tasks.diffusion.grids import uniform_time
from ado_tasks.diffusion.oracles import gaussian_denoiser, gaussian_solution, mixture_denoiser
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.diffusion.solvers import SOLVERS, ddim
from ado_tasks.optimise.knots import fit_knots, on_timesteps, resampled

SCHEDULE = Cosine()


def test_known_knots_are_recovered():
    wanted = np.array([0.95, 0.8, 0.55, 0.2, 0.0])
    features = np.random.default_rng(0).standard_normal((5, 40))

    def solve(times):
        return np.exp(2 * times) @ features

    fit = fit_knots(solve, solve(wanted), uniform_time(4), max_solves=16, degree=3)
    np.testing.assert_allclose(fit.times, wanted, atol=1e-6)  # superlinear: 10 runs after the differences
    assert fit.solves <= 16


def test_one_free_knot_is_where_a_search_finds_it():
    denoise = gaussian_denoiser(SCHEDULE, 0.5)
    z = mx.random.normal((32, 4), key=mx.random.key(0))
    exact = np.array(gaussian_solution(z, 1.0, 0.0, SCHEDULE, 0.5))

    def solve(times):
        return np.array(ddim(denoise, z, times, SCHEDULE))

    def error(knot):
        return float(np.mean((solve(np.array([1.0, knot, 0.0])) - exact) ** 2))

    fit = fit_knots(solve, exact, uniform_time(2), max_solves=20, free_start=False)
    best = minimize_scalar(error, bounds=(0.05, 0.95), method="bounded")
    assert fit.mean_square == pytest.approx(best.fun, rel=0.02)
    assert fit.times[0] == 1


@pytest.mark.parametrize("solver", ["ddim", "ipndm", "angle_ab2"])
@pytest.mark.parametrize("free_start", [False, True])
def test_a_fit_improves_on_held_out_noise(solver, free_start):
    means = np.random.default_rng(0).uniform(-1, 1, (20, 3, 3, 1))
    denoise = mixture_denoiser(SCHEDULE, means, 0.3)
    z = mx.random.normal((128, 3, 3, 1), key=mx.random.key(0))
    fine = np.array(SOLVERS["ipndm"].sample(denoise, z, uniform_time(100), SCHEDULE))

    def distance(times, rows):
        x = np.array(SOLVERS[solver].sample(denoise, z[rows], times, SCHEDULE))
        return float(np.mean((x - fine[rows]) ** 2))

    def solve(times):
        return np.array(SOLVERS[solver].sample(denoise, z[:64], times, SCHEDULE))

    fit = fit_knots(solve, fine[:64], uniform_time(5), max_solves=16, free_start=free_start)
    assert fit.mean_square == pytest.approx(distance(fit.times, slice(0, 64)), rel=1e-5)
    each = np.sqrt(np.mean((solve(fit.times) - fine[:64]) ** 2, axis=(1, 2, 3)))
    assert fit.mean_distance == pytest.approx(each.mean(), rel=1e-5)
    assert distance(fit.times, slice(64, 128)) < 0.9 * distance(uniform_time(5), slice(64, 128))
    assert (fit.times[0] == 1) is not free_start


@pytest.mark.parametrize("budget", [1, 2, 6, 7, 30])
def test_the_budget_is_kept_and_the_result_is_never_worse_than_the_start(budget):
    calls = []

    def solve(times):
        calls.append(times)
        return np.outer(np.cos(5 * times), np.arange(1.0, 4.0)).reshape(1, -1)

    start = np.array([1.0, 0.7, 0.6, 0.3, 0.0])
    target = solve(np.array([1.0, 0.4, 0.3, 0.1, 0.0]))
    calls.clear()
    fit = fit_knots(solve, target, start, max_solves=budget, free_start=False)
    assert fit.solves == len(calls) <= budget
    met = [float(np.mean((solve(times) - target) ** 2)) for times in calls[: fit.solves]]
    assert fit.mean_square == pytest.approx(min(met))
    assert np.mean((solve(fit.times) - target) ** 2) == pytest.approx(min(met))


def test_a_single_step_without_a_free_start_has_nothing_to_fit():
    fit = fit_knots(lambda times: times * 2, np.zeros(2), np.array([1.0, 0.0]), max_solves=5, free_start=False)
    assert fit.times.tolist() == [1, 0]


def test_resampled_times_keep_the_curve_and_its_ends():
    curve = np.linspace(1, 0, 41) ** 1.7 * 0.95
    times = resampled(curve, 8)
    np.testing.assert_allclose(times, curve[::5], atol=1e-12)
    assert times[-1] == 0
    np.testing.assert_allclose(resampled(np.array([1.0, 0.8, 0.3, 0.0]), 3), [1.0, 0.8, 0.3, 0.0])
    assert (np.diff(resampled(np.array([0.9, 0.89, 0.1, 0.001, 0.0]), 9)) < 0).all()


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20))
def test_knots_on_timesteps_are_whole_distinct_and_near(interior):
    times = np.append(np.sort(interior)[::-1], 0.0)
    found = on_timesteps(times, 1000)
    steps = found * 1000 - 1
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-9)
    assert (np.diff(found) < 0).all()
    assert found[0] <= 1
    assert found[-1] == 0
    assert found[-2] >= 0.001 - 1e-12
    assert np.abs(found - times).max() <= (0.5 + len(interior)) / 1000 + 1e-9


def test_knots_that_are_timesteps_already_stay():
    times = np.array([1.0, 0.75, 0.02, 0.001, 0.0])
    np.testing.assert_array_equal(on_timesteps(times, 1000), times)


def test_a_few_samples_that_go_elsewhere_do_not_lead_the_fit():
    rng = np.random.default_rng(1)
    features = rng.standard_normal((40, 4, 6))
    wanted, elsewhere = np.array([1.0, 0.6, 0.25, 0.0]), np.array([1.0, 0.9, 0.8, 0.0])

    def solve(times):
        return np.einsum("k,bkd->bd", np.exp(2 * times), features)

    target = solve(wanted)
    target[:5] = solve(elsewhere)[:5] + 5 * rng.standard_normal((5, 6))
    fit = fit_knots(solve, target, uniform_time(3), max_solves=40, free_start=False)
    np.testing.assert_allclose(fit.times, wanted, atol=0.03)  # plain least squares ends 0.1 away


def test_the_best_times_met_are_returned_however_rough_the_function():
    met = []

    def solve(times):
        met.append((float(np.random.default_rng(len(met)).uniform(1, 2)), times))
        return np.full((1, 3), met[-1][0])

    fit = fit_knots(solve, np.zeros((1, 3)), uniform_time(4), max_solves=15)
    least = min(met, key=lambda one: one[0])
    assert fit.mean_square == pytest.approx(least[0] ** 2)
    np.testing.assert_array_equal(fit.times, least[1])
    assert least is not met[-1]
