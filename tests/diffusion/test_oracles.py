"""The closed-form denoisers themselves, against direct numerical integration of Bayes' rule."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from ado_tasks.backend import mx
from ado_tasks.diffusion.oracles import gaussian_consistency, gaussian_denoiser, gaussian_solution, mixture_denoiser
from ado_tasks.diffusion.schedules import Cosine, Edm, LinearBeta

SCHEDULES = [Edm(), Cosine(), LinearBeta()]


def posterior_mean(z: float, alpha: float, sigma: float, density) -> float:
    """E[x | z] by summation over a fine grid of x."""
    x = np.linspace(-6, 6, 40_001)
    likelihood = density(x) * np.exp(-((z - alpha * x) ** 2) / (2 * sigma**2))
    return float((x * likelihood).sum() / likelihood.sum())


def normal(x, mean, std):
    return np.exp(-((x - mean) ** 2) / (2 * std**2))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_denoisers_are_posterior_means(schedule):
    means, weights, std = np.array([[-1.0], [0.4], [2.0]]), np.array([0.2, 0.5, 0.3]), 0.3
    mixture = mixture_denoiser(schedule, means, std, weights)
    gaussian = gaussian_denoiser(schedule, 0.5, mean=0.7)
    for t, z in [(0.5, 0.3), (0.75, -1.1), (0.6, 2.0)]:
        alpha, sigma = (float(c) for c in schedule.alpha_sigma(t))
        with mx.stream(mx.cpu):
            z_array, times = mx.array([[z]], dtype=mx.float64), mx.array([t], dtype=mx.float64)
            ours = mixture(z_array, times).item(), gaussian(z_array, times).item()

        def density(x):
            return sum(w * normal(x, m[0], std) for w, m in zip(weights, means, strict=True))

        assert ours[0] == pytest.approx(posterior_mean(z, alpha, sigma, density), abs=1e-6)
        assert ours[1] == pytest.approx(posterior_mean(z, alpha, sigma, lambda x: normal(x, 0.7, 0.5)), abs=1e-6)


def test_mixture_treats_an_image_as_one_point():
    means = np.stack([np.zeros((2, 2, 1)), np.ones((2, 2, 1))])
    denoise = mixture_denoiser(Edm(), means, 0.05)
    # Three pixels say "ones", one says "zeros": the image as a whole is a one.
    z = mx.array(np.array([1.0, 1.0, 1.0, 0.0]).reshape(1, 2, 2, 1), dtype=mx.float32)
    x = np.array(denoise(z, mx.array(Edm().time(-2 * np.log([0.2])), dtype=mx.float32))).ravel()
    assert x[3] > 0.9


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_gaussian_solution_is_the_solution_of_the_ode(schedule):
    std, mean, start, end = 0.5, 0.7, 0.8, 0.2
    alpha = float(schedule.alpha_sigma(start)[0])
    ratios = [float(np.exp(-schedule.log_snr(t) / 2)) for t in (start, end)]

    def slope(ratio, y):  # d(z/α)/d(σ/α) = (z/α − x̂)/(σ/α)
        return (y - (mean * ratio**2 + y * std**2) / (std**2 + ratio**2)) / ratio

    exact = solve_ivp(slope, ratios, [1.3 / alpha], rtol=1e-10, atol=1e-12).y[0, -1]
    exact *= float(schedule.alpha_sigma(end)[0])
    with mx.stream(mx.cpu):
        ours = gaussian_solution(mx.array([[1.3]], dtype=mx.float64), start, end, schedule, std, mean).item()
    assert ours == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_consistency_function_is_where_the_exact_solution_ends(schedule):
    z, f = mx.array([[-1.3], [0.2], [2.0]]), gaussian_consistency(schedule, 0.5, mean=0.7)
    for t in (0.05, 0.5, 0.99):
        wanted = gaussian_solution(z, t, 0.0, schedule, 0.5, mean=0.7)
        np.testing.assert_allclose(np.array(f(z, mx.full((3,), t))), np.array(wanted), rtol=2e-4, atol=1e-5)
        # On the way of one solution it says the same everywhere: what makes it a consistency function.
        half = gaussian_solution(z, t, t / 2, schedule, 0.5, mean=0.7)
        np.testing.assert_allclose(np.array(f(half, mx.full((3,), t / 2))), np.array(wanted), rtol=2e-4, atol=1e-5)
