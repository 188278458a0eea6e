"""Parameterisations: exact round trips for every kind, schedule and noise level."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ado_tasks.backend import mx
from ado_tasks.diffusion.denoiser import make_denoiser
from ado_tasks.diffusion.parameterisation import KINDS, expand, network_input, target, to_epsilon, to_x
from ado_tasks.diffusion.schedules import Cosine, Edm, LinearBeta
from ado_tasks.errors import ConfigError

SCHEDULES = [Cosine(), LinearBeta(), Edm()]
pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def on_the_cpu():
    """float64, in which these identities are checked, exists on MLX's CPU device only."""
    with mx.stream(mx.cpu):
        yield


def draw(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape), dtype=mx.float64)


@settings(deadline=None, max_examples=60)
@given(t=st.floats(1e-4, 1), seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS), which=st.sampled_from(SCHEDULES))
def test_target_converts_back_to_x_and_epsilon(t, seed, kind, which):
    alpha, sigma = (float(c) for c in which.alpha_sigma(t))
    x, epsilon = draw(seed, 2, 3), draw(seed + 1, 2, 3)
    z = alpha * x + sigma * epsilon
    output = target(x, epsilon, alpha, sigma, kind)
    # Dividing by a small α (or σ) costs that many digits, and no more.
    np.testing.assert_allclose(to_x(output, z, alpha, sigma, kind), x, atol=1e-13 * max(1, 1 / alpha) + 1e-12)
    np.testing.assert_allclose(to_epsilon(output, z, alpha, sigma, kind), epsilon, atol=1e-13 / sigma + 1e-12)


@settings(deadline=None, max_examples=40)
@given(t=st.floats(1e-3, 1), seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS), which=st.sampled_from(SCHEDULES))
def test_any_output_gives_an_x_and_epsilon_that_make_z(t, seed, kind, which):
    alpha, sigma = (float(c) for c in which.alpha_sigma(t))
    z, output = draw(seed, 2, 3), draw(seed + 1, 2, 3)
    x, epsilon = to_x(output, z, alpha, sigma, kind), to_epsilon(output, z, alpha, sigma, kind)
    np.testing.assert_allclose(alpha * x + sigma * epsilon, z, atol=1e-9)


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "edm"])
def test_x_stays_finite_and_small_in_float32_where_alpha_vanishes(kind):
    alpha, sigma = (c.astype(mx.float32) for c in Cosine().alpha_sigma(mx.array([1.0])))
    z, output = mx.ones((1, 4)), mx.full((1, 4), 0.5)
    assert np.abs(np.array(to_x(output, z, alpha, sigma, kind))).max() <= 1


def test_edm_with_unit_data_is_minus_v_prediction():
    alpha, sigma = (float(c) for c in Cosine().alpha_sigma(0.4))
    z, output = draw(0, 2, 3), draw(1, 2, 3)
    np.testing.assert_allclose(
        to_x(output, z, alpha, sigma, "edm", sigma_data=1.0), to_x(-output, z, alpha, sigma, "v_prediction"), atol=1e-12
    )


def test_edm_is_the_preconditioning_of_karras_table_1():
    sigma, sigma_data = 3.0, 0.5
    z, output = draw(0, 2, 3), draw(1, 2, 3)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / np.sqrt(sigma**2 + sigma_data**2)
    c_in = 1 / np.sqrt(sigma**2 + sigma_data**2)
    np.testing.assert_allclose(to_x(output, z, 1.0, sigma, "edm"), c_skip * z + c_out * output, atol=1e-12)
    np.testing.assert_allclose(network_input(z, 1.0, sigma, "edm"), c_in * z, atol=1e-12)
    # Unit variance of the target over data of that standard deviation, which is what c_out is for.
    x, epsilon = sigma_data * draw(2, 20_000), draw(3, 20_000)
    assert np.std(np.array(target(x, epsilon, 1.0, sigma, "edm"))) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_denoiser_recovers_x_from_a_network_that_is_right(kind, schedule):
    x, epsilon = draw(0, 3, 2, 2, 1).astype(mx.float32), draw(1, 3, 2, 2, 1).astype(mx.float32)
    t = mx.array([0.05, 0.4, 0.7])
    alpha, sigma = (expand(c, x) for c in schedule.alpha_sigma(t))
    seen = {}

    def network(z, timestep):
        seen.update(z=z, timestep=timestep)
        return target(x, epsilon, alpha, sigma, kind)

    x_hat = make_denoiser(network, schedule, kind)(alpha * x + sigma * epsilon, t)
    np.testing.assert_allclose(np.array(x_hat), np.array(x), atol=2e-4)
    np.testing.assert_allclose(np.array(seen["timestep"]), schedule.timestep(np.array(t)), rtol=1e-5)
    assert seen["timestep"].dtype == mx.float32


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ConfigError, match="prediction_type: 'score'"):
        make_denoiser(lambda z, _: z, Cosine(), "score")
    with pytest.raises(ConfigError, match="prediction_type"):
        to_x(mx.ones((1,)), mx.ones((1,)), 0.5, 0.5, "score")
