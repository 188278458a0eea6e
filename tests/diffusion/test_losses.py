"""Loss weights: equal to the squared errors they stand for, and finite at every noise level."""

import numpy as np
import pytest

from ado_tasks.backend import mx
from ado_tasks.diffusion import losses
from ado_tasks.diffusion.parameterisation import expand, target
from ado_tasks.diffusion.schedules import Cosine, Edm
from ado_tasks.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "kind", "schedule"), [("snr", "epsilon", Cosine()), ("v", "v_prediction", Cosine()), ("edm", "edm", Edm())]
)
def test_weight_turns_x_error_into_the_error_of_the_network_output(name, kind, schedule):
    rng = np.random.default_rng(0)
    x, x_hat, noise = (mx.array(rng.standard_normal((6, 4, 4, 1)), dtype=mx.float32) for _ in range(3))
    t = mx.linspace(0.3, 0.9, 6)
    alpha, sigma = (expand(c, x) for c in schedule.alpha_sigma(t))
    z = alpha * x + sigma * noise
    epsilon_hat = (z - alpha * x_hat) / sigma
    outputs = target(x, noise, alpha, sigma, kind), target(x_hat, epsilon_hat, alpha, sigma, kind)
    expected = mx.mean(mx.square(outputs[0] - outputs[1]), axis=(1, 2, 3))
    ours = losses.weighted_squared_error(x_hat, x, losses.weight(name)(schedule.log_snr(t)))
    np.testing.assert_allclose(np.array(ours), np.array(expected), rtol=2e-4)


def test_truncated_and_min_snr_cut_at_their_bounds():
    log_snr = mx.array([-20.0, -1.0, 0.0, 1.0, 3.0])
    np.testing.assert_allclose(np.array(losses.truncated_snr(log_snr)), [1, 1, 1, np.e, np.exp(3)], rtol=1e-6)
    np.testing.assert_allclose(
        np.array(losses.min_snr(log_snr, gamma=5.0)), [np.exp(-20), np.exp(-1), 1, np.e, 5], rtol=1e-6
    )


@pytest.mark.parametrize("name", losses.WEIGHTS)
def test_weights_and_their_gradients_are_finite_over_the_whole_schedule(name):
    log_snr = Cosine().log_snr(mx.array([1e-6, 1e-3, 0.5, 0.9995, 1.0]))
    values, slopes = mx.vjp(losses.weight(name), [log_snr], [mx.ones_like(log_snr)])
    assert np.isfinite(np.array(values[0])).all()
    assert np.isfinite(np.array(slopes[0])).all()
    assert (np.array(values[0]) > 0).all()


def test_error_is_per_sample_and_per_pixel():
    x = mx.zeros((2, 3, 3, 1))
    x_hat = mx.concatenate([mx.ones((1, 3, 3, 1)), 2 * mx.ones((1, 3, 3, 1))])
    assert losses.weighted_squared_error(x_hat, x, mx.array([1.0, 3.0])).tolist() == [1, 12]


def test_charbonnier_is_squared_near_0_and_absolute_far_away():
    x, weights, c = mx.zeros((2, 3, 3, 1)), mx.array([1.0, 4.0]), 0.1
    small, large = (losses.weighted_charbonnier_error(x + error, x, weights, c) for error in (1e-3, 1e3))
    np.testing.assert_allclose(np.array(small), [1e-6 / (2 * c), 4e-6 / (2 * c)], rtol=1e-2)
    np.testing.assert_allclose(np.array(large), [1e3 - c, 2e3 - c], rtol=1e-5)


def test_charbonnier_has_a_finite_gradient_where_nothing_is_wrong():
    x = mx.ones((1, 2, 2, 1))
    slope = mx.grad(lambda y: mx.sum(losses.weighted_charbonnier_error(y, x, mx.array([2.0]), 0.03)))(x)
    np.testing.assert_array_equal(np.array(slope), 0)


def test_pseudo_huber_is_of_a_whole_images_norm():
    x, weights, c = mx.zeros((3, 2, 2, 1)), mx.array([1.0, 4.0, 1.0]), 0.1
    error = mx.array([1e-4, 1e3, 0.5]).reshape(3, 1, 1, 1)
    found = np.array(losses.weighted_norm_error(x + error, x, weights, c))  # norms of four equal pixels: twice one's
    np.testing.assert_allclose(found, [4e-8 / (2 * c), 4 * (2e3 - c), np.sqrt(1 + c * c) - c], rtol=1e-4)
    slope = mx.grad(lambda y: mx.sum(losses.weighted_norm_error(y, x, weights, c)))(x)
    np.testing.assert_array_equal(np.array(slope), 0)


def test_unknown_weight_is_refused_by_name():
    with pytest.raises(ConfigError, match="loss: 'huber'"):
        losses.weight("huber")
