"""Solvers against closed-form solutions: orders, standard deviations, discrete products, variances, parity."""

from functools import partial

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from ado_tasks.backend import mx
from ado_tasks.diffusion.denoiser import make_denoiser
from ado_tasks.diffusion.grids import edm_rho, uniform_log_snr, uniform_time
from ado_tasks.diffusion.oracles import gaussian_consistency, gaussian_denoiser, gaussian_solution, mixture_denoiser
from ado_tasks.diffusion.schedules import Cosine, Edm, LinearBeta
from ado_tasks.diffusion.solvers import (
    SOLVERS,
    ancestral,
    angle_ab2,
    consistency,
    ddim,
    dpmpp_2m,
    heun,
    ipndm,
    solver,
)  # fmt: skip
from ado_tasks.diffusion.solvers.ancestral import posterior
from ado_tasks.errors import ConfigError

STD = 0.5
MEANS, MIXTURE_STD = np.array([[-1.0], [0.3], [1.2]]), 0.35
SCHEDULES = [Edm(), Cosine(), LinearBeta()]
DETERMINISTIC = {
    "ddim": (ddim, 1),
    "heun": (heun, 2),
    "dpmpp_2m": (dpmpp_2m, 2),
    "ipndm-2": (partial(ipndm, order=2), 2),
    "ipndm-3": (partial(ipndm, order=3), 2),
    "ipndm-4": (ipndm, 2),
    "angle_ab2": (angle_ab2, 2),
}


@pytest.fixture(autouse=True)
def on_the_cpu():
    """Orders are measured in float64, which MLX has on its CPU device only."""
    with mx.stream(mx.cpu):
        yield


def by_name(schedule) -> str:
    return type(schedule).__name__


def noise(n: int, schedule, seed: int = 0, dtype=mx.float32) -> mx.array:
    sigma = float(schedule.alpha_sigma(1.0)[1])
    return mx.array(np.random.default_rng(seed).standard_normal((n, 1)) * sigma, dtype=dtype)


def grid_between(n: int, schedule, high: float, low: float) -> np.ndarray:
    """n steps of EDM's spacing between two noise levels σ/α, both above 0."""
    ratios = np.linspace(high ** (1 / 7), low ** (1 / 7), n + 1) ** 7
    return np.asarray(schedule.time(-2 * np.log(ratios)))


def mixture_solution(z: np.ndarray, schedule, start: float, end: float) -> np.ndarray:
    """Runge–Kutta of order 8 on the ODE of the mixture, with its own NumPy denoiser."""
    m = MEANS[:, 0]

    def slope(ratio, y):
        variance = MIXTURE_STD**2 + ratio**2
        logits = -((y[:, None] - m) ** 2) / (2 * variance)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        centre = (weights * m).sum(1) / weights.sum(1)
        return (y - centre - MIXTURE_STD**2 / variance * (y - centre)) / ratio

    ratios = [float(np.exp(-schedule.log_snr(t) / 2)) for t in (start, end)]
    y = z[:, 0] / float(schedule.alpha_sigma(start)[0])
    y = solve_ivp(slope, ratios, y, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    return y[:, None] * float(schedule.alpha_sigma(end)[0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_name)
@pytest.mark.parametrize("data", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_empirical_order_of_convergence(name, data, schedule):
    sample, order = DETERMINISTIC[name]
    steps = np.array([48, 96, 192])
    ends = grid_between(1, schedule, 20.0, 0.05)
    z = noise(8, schedule, dtype=mx.float64)
    if data == "gaussian":
        denoise = gaussian_denoiser(schedule, STD)
        exact = np.array(gaussian_solution(z, *ends, schedule, STD))
    else:
        denoise = mixture_denoiser(schedule, MEANS, MIXTURE_STD)
        exact = mixture_solution(np.array(z), schedule, *ends)
    errors = [
        np.abs(np.array(sample(denoise, z, grid_between(n, schedule, 20.0, 0.05), schedule)) - exact).mean()
        for n in steps
    ]
    slope = np.polyfit(np.log(1 / steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.2), errors


@pytest.mark.parametrize("schedule", [Edm(), Cosine()], ids=by_name)
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "ipndm-2", "ipndm-4", "angle_ab2"])
def test_second_order_solvers_reach_the_true_standard_deviation_in_50_steps(name, schedule):
    grids = [edm_rho(50, schedule)]
    if isinstance(schedule, Cosine):
        grids += [uniform_time(50), uniform_log_snr(50, schedule)]
    z = noise(64, schedule)
    for grid in grids:
        x = DETERMINISTIC[name][0](gaussian_denoiser(schedule, STD), z, grid, schedule)
        # The map is linear in z: its factor is the ratio of the standard deviations, free of sampling error.
        start = float(schedule.alpha_sigma(1.0)[1])
        assert start * float(mx.sum(x * z) / mx.sum(z * z)) == pytest.approx(STD, rel=0.01)


def discrete_product(schedule, grid: np.ndarray) -> float:
    """What DDIM multiplies a sample of N(0, s²) by: Π (σ_s/σ_t + (α_s − α_t σ_s/σ_t) α_t s²/(α_t² s² + σ_t²))."""
    alpha, sigma = schedule.alpha_sigma(grid)
    gain = alpha[:-1] * STD**2 / (alpha[:-1] ** 2 * STD**2 + sigma[:-1] ** 2)
    ratio = sigma[1:] / sigma[:-1]
    return float(np.prod(ratio + (alpha[1:] - alpha[:-1] * ratio) * gain))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_name)
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_ddim_is_the_analytic_discrete_product(steps, schedule):
    for grid in (uniform_time(steps), edm_rho(steps, schedule)):
        z = noise(16, schedule, dtype=mx.float64)
        x = ddim(gaussian_denoiser(schedule, STD), z, grid, schedule)
        np.testing.assert_allclose(np.array(x), discrete_product(schedule, grid) * np.array(z), rtol=1e-6, atol=1e-12)
        single = ddim(gaussian_denoiser(schedule, STD), z.astype(mx.float32), grid, schedule)
        np.testing.assert_allclose(np.array(single), np.array(x), rtol=1e-4, atol=1e-6)


def test_ddim_is_low_by_theory_on_the_edm_grid():
    # Standard deviation 0.472 where the truth is 0.5: EDM ρ = 7, σ from 80 to 0.002 in 50 points, then 0.
    x = ddim(gaussian_denoiser(Edm(), STD), noise(4, Edm()), edm_rho(50, Edm()), Edm())
    assert 80 * float(mx.mean(x / noise(4, Edm()))) == pytest.approx(0.472, abs=5e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_name)
def test_ddim_is_euler_in_edm_variables(schedule):
    denoise = mixture_denoiser(schedule, MEANS, MIXTURE_STD)
    grid = grid_between(12, schedule, 20.0, 0.05)
    z = noise(8, schedule, dtype=mx.float64)
    alpha, sigma = schedule.alpha_sigma(grid)
    y, ratio = np.array(z) / alpha[0], sigma / alpha
    for i in range(12):
        at = mx.full((8,), float(grid[i]), dtype=mx.float64)
        x_hat = np.array(denoise(mx.array(alpha[i] * y, dtype=mx.float64), at))
        y = y + (ratio[i + 1] - ratio[i]) * (y - x_hat) / ratio[i]
    np.testing.assert_allclose(np.array(ddim(denoise, z, grid, schedule)), alpha[-1] * y, rtol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_name)
def test_ipndm_is_adams_bashforth_in_edm_variables(schedule):
    denoise = mixture_denoiser(schedule, MEANS, MIXTURE_STD)
    grid = grid_between(7, schedule, 20.0, 0.05)
    z = noise(8, schedule, dtype=mx.float64)
    alpha, sigma = schedule.alpha_sigma(grid)
    y, ratio, slopes = np.array(z) / alpha[0], sigma / alpha, []
    weights = [[1], [1.5, -0.5], [23 / 12, -4 / 3, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    for i in range(7):
        at = mx.full((8,), float(grid[i]), dtype=mx.float64)
        x_hat = np.array(denoise(mx.array(alpha[i] * y, dtype=mx.float64), at))
        slopes = [(y - x_hat) / ratio[i], *slopes][:4]
        y = y + (ratio[i + 1] - ratio[i]) * sum(w * d for w, d in zip(weights[len(slopes) - 1], slopes, strict=True))
    np.testing.assert_allclose(np.array(ipndm(denoise, z, grid, schedule)), alpha[-1] * y, rtol=1e-10)
    np.testing.assert_allclose(ipndm(denoise, z, grid, schedule, order=1), ddim(denoise, z, grid, schedule), rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_name)
def test_dpmpp_2m_extrapolates_to_the_middle_of_an_uneven_step(schedule):
    # If x̂ is a straight line in λ, the extrapolation is its value half-way, whatever the steps before.
    def line(log_snr):
        return 0.3 + 0.1 * log_snr

    def denoise(z, t):
        return mx.ones_like(z) * line(mx.array(schedule.log_snr(np.array(t)), dtype=z.dtype)).reshape(-1, 1)

    grid = np.asarray(schedule.time(np.array([-3.0, -2.0, 1.5, 2.0])))
    (alpha, sigma), z = schedule.alpha_sigma(grid), noise(3, schedule, dtype=mx.float64)
    _, states = dpmpp_2m(denoise, z, grid, schedule, trajectory=True)
    for i, middle in [(1, -0.25), (2, 1.75)]:
        ratio = sigma[i + 1] / sigma[i]
        expected = ratio * np.array(states[i]) + (alpha[i + 1] - alpha[i] * ratio) * line(middle)
        np.testing.assert_allclose(np.array(states[i + 1]), expected, rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_name)
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_ancestral_variance_follows_its_recursion(steps, schedule):
    grid = uniform_time(steps)
    alpha, sigma = schedule.alpha_sigma(grid)
    variance = sigma[0] ** 2
    for i in range(steps):  # Ho et al. 2020, eq. 6–7, with the variance of the best denoiser's estimate
        kept = (alpha[i] / alpha[i + 1]) ** 2 * (sigma[i + 1] / sigma[i]) ** 2
        gain = alpha[i] * STD**2 / (alpha[i] ** 2 * STD**2 + sigma[i] ** 2)
        of_z = alpha[i] / alpha[i + 1] * (sigma[i + 1] / sigma[i]) ** 2 + alpha[i + 1] * (1 - kept) * gain
        variance = of_z**2 * variance + sigma[i + 1] ** 2 * (1 - kept)
    x = ancestral(gaussian_denoiser(schedule, STD), noise(200_000, schedule), grid, schedule, key=mx.random.key(7))
    assert float(mx.var(x)) == pytest.approx(variance, rel=0.02)  # six standard errors at this n


def test_ancestral_step_is_the_true_posterior():
    # With the true x known, a step must land on N(α_s x, σ_s²), jointly with z_t as the forward process has it.
    schedule, x, n = Cosine(), 0.8, 200_000
    (a_t, s_t), (a_s, s_s) = ([float(c) for c in schedule.alpha_sigma(t)] for t in (0.7, 0.4))
    z_t = a_t * x + s_t * mx.random.normal((n, 1), key=mx.random.key(0))
    z_s = ancestral(lambda z, t: mx.full(z.shape, x), z_t, [0.7, 0.4], schedule, key=mx.random.key(1))
    assert float(mx.mean(z_s)) == pytest.approx(a_s * x, abs=0.01)
    assert float(mx.std(z_s)) == pytest.approx(s_s, rel=0.01)
    covariance = float(mx.mean((z_s - a_s * x) * (z_t - a_t * x)))
    assert covariance == pytest.approx(a_t / a_s * s_s**2, rel=0.02)


def test_ancestral_with_a_key_a_sample_does_not_depend_on_the_batch():
    schedule, keys = Cosine(), mx.random.split(mx.random.key(3), 6)
    denoise, z = gaussian_denoiser(schedule, STD), noise(6, schedule)
    whole = ancestral(denoise, z, uniform_time(5), schedule, key=keys)
    part = ancestral(denoise, z[2:4], uniform_time(5), schedule, key=keys[2:4])
    np.testing.assert_array_equal(np.array(whole)[2:4], np.array(part))
    assert len(np.unique(np.array(whole))) == 6
    again = ancestral(denoise, z, uniform_time(5), schedule, key=mx.random.key(3))
    other = ancestral(denoise, z, uniform_time(5), schedule, key=mx.random.key(4))
    assert not np.array_equal(np.array(again), np.array(other))
    with pytest.raises(ConfigError, match="key"):
        ancestral(denoise, z, uniform_time(5), schedule)


def test_ancestral_noise_is_fresh_at_every_step_and_seed():
    schedule, grid, draws = Cosine(), uniform_time(4), []
    alpha, sigma = schedule.alpha_sigma(grid)
    for seed in (7, 8):
        start, key = mx.zeros((20_000, 1)), mx.random.key(seed)
        _, states = ancestral(lambda z, t: mx.zeros_like(z), start, grid, schedule, key=key, trajectory=True)
        for i in range(3):
            of_z, _, std = posterior(alpha[i], sigma[i], alpha[i + 1], sigma[i + 1])
            draws.append(np.array(states[i + 1] - of_z * states[i])[:, 0] / std)
    correlations = np.corrcoef(draws) - np.eye(6)
    assert np.abs(correlations).max() < 0.04  # 5.6 standard errors


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_name)
@pytest.mark.parametrize("middle", [(), (0.6,), (0.8, 0.5, 0.2)], ids=len)
def test_consistency_sampling_is_exact_on_every_grid_for_the_exact_function(middle, schedule):
    # The standard deviation of the first evaluation follows from that of the noise; noised anew, all is exact.
    f = gaussian_consistency(schedule, STD, mean=0.3)
    x = consistency(f, noise(200_000, schedule), [1.0, *middle, 0.0], schedule, key=mx.random.key(5))
    assert float(mx.std(x)) == pytest.approx(STD, rel=0.01)  # six standard errors
    assert float(mx.mean(x)) == pytest.approx(0.3, abs=0.012)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_name)
def test_consistency_sampling_of_a_denoiser_is_too_narrow_by_its_recursion(schedule):
    grid = [1.0, 0.7, 0.4, 0.0]
    alpha, sigma = schedule.alpha_sigma(np.array(grid))
    variance = sigma[0] ** 2
    for i in range(3):
        gain = alpha[i] * STD**2 / (alpha[i] ** 2 * STD**2 + sigma[i] ** 2)
        variance = alpha[i + 1] ** 2 * gain**2 * variance + sigma[i + 1] ** 2
    x = consistency(gaussian_denoiser(schedule, STD), noise(200_000, schedule), grid, schedule, key=mx.random.key(7))
    assert float(mx.var(x)) == pytest.approx(variance, rel=0.02)
    assert variance < 0.97 * STD**2


def test_consistency_sampling_noises_anew_in_every_step_and_not_in_the_last():
    schedule, grid = Cosine(), [1.0, 0.6, 0.3, 0.0]
    alpha, sigma = schedule.alpha_sigma(np.array(grid))
    start = noise(20_000, schedule)
    _, states = consistency(
        lambda z, t: mx.full(z.shape, 0.8), start, grid, schedule, key=mx.random.key(1), trajectory=True
    )
    drawn = [np.array(states[i] - alpha[i] * 0.8)[:, 0] / sigma[i] for i in (1, 2)]
    assert [float(each.std()) for each in drawn] == pytest.approx([1, 1], abs=0.03)
    correlations = np.corrcoef([np.array(start)[:, 0], *drawn]) - np.eye(3)
    assert np.abs(correlations).max() < 0.04  # 5.6 standard errors
    np.testing.assert_array_equal(np.array(states[-1]), np.float32(0.8))


def test_consistency_sampling_in_one_step_is_the_function_and_needs_no_key():
    schedule, z = Cosine(), noise(6, Cosine())
    f, keys = gaussian_consistency(schedule, STD), mx.random.split(mx.random.key(3), 6)
    np.testing.assert_array_equal(consistency(f, z, [0.9, 0.0], schedule), f(z, mx.full((6,), 0.9)))
    whole = consistency(f, z, [0.9, 0.4, 0.0], schedule, key=keys)
    part = consistency(f, z[2:4], [0.9, 0.4, 0.0], schedule, key=keys[2:4])
    np.testing.assert_array_equal(np.array(whole)[2:4], np.array(part))
    for grid in ([0.9, 0.4, 0.0], [0.9, 0.4]):
        with pytest.raises(ConfigError, match="key"):
            consistency(f, z, grid, schedule)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_name)
def test_all_solvers_are_finite_from_pure_noise_at_any_number_of_steps(name, schedule):
    denoise, z = mixture_denoiser(schedule, MEANS, MIXTURE_STD), noise(32, schedule)
    for steps in (1, 2, 3, 7):
        for grid in (uniform_time(steps), uniform_log_snr(steps, schedule), edm_rho(steps, schedule)):
            x = SOLVERS[name].sample(denoise, z, grid, schedule, key=mx.random.key(0))
            assert x.dtype == mx.float32
            assert np.abs(np.array(x)).max() < 6  # the data lie within ±2.5


@pytest.mark.parametrize("name", SOLVERS)
def test_nfe_is_the_number_of_evaluations_made(name):
    schedule, calls = Cosine(), []

    def denoise(z, t):
        calls.append(np.array(t))
        return mx.zeros_like(z)

    for grid in (uniform_time(5), np.linspace(1, 0.1, 6)):
        calls.clear()
        x, states = SOLVERS[name].sample(
            denoise, noise(3, schedule), grid, schedule, key=mx.random.key(0), trajectory=True
        )
        assert len(calls) == SOLVERS[name].nfe(grid)
        assert len(states) == len(grid)
        np.testing.assert_array_equal(np.array(states[0]), np.array(noise(3, schedule)))
        np.testing.assert_array_equal(np.array(states[-1]), np.array(x))
        assert all(t.shape == (3,) and t.dtype == np.float32 and t.min() > 0 for t in calls)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", [Cosine(), LinearBeta()], ids=by_name)
def test_ddim_steps_equal_diffusers(prediction_type, schedule):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler.from_config(schedule.to_diffusers(prediction_type))
    theirs.set_timesteps(10)
    start = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    # Where α is 5e-5, ε-prediction is an error of x̂ times 20,000 in anyone's float32: start below t = 1 there.
    skip = 1 if prediction_type == "epsilon" else 0

    sample = torch.tensor(start)
    for t in theirs.timesteps[skip:]:
        sample = theirs.step(torch.tanh(0.7 * sample + t / 1000), t, sample).prev_sample

    def network(z, timestep):
        return mx.tanh(0.7 * z + timestep[:, None, None, None] / 1000)

    ours = ddim(make_denoiser(network, schedule, prediction_type), mx.array(start), uniform_time(10)[skip:], schedule)
    np.testing.assert_allclose(np.array(ours), sample.numpy(), atol=2e-5)


@pytest.mark.parametrize("grid", [[1.0], [0.5, 0.7], [1.0, 1.0, 0.0], [1.2, 0.0], [0.5, -0.1]])
def test_grids_that_do_not_fall_are_refused(grid):
    with pytest.raises(ConfigError, match="times"):
        ddim(lambda z, t: z, mx.ones((1, 1)), grid, Cosine())


def test_unknown_solver_and_order_are_refused_by_name():
    with pytest.raises(ConfigError, match="solver: 'euler'"):
        solver("euler")
    with pytest.raises(ConfigError, match="order: 5"):
        ipndm(lambda z, t: z, mx.ones((1, 1)), [1.0, 0.0], Cosine(), order=5)
