"""The moving average against its closed form."""

import numpy as np
import pytest

from ado_tasks.backend import mx
from ado_tasks.models.ema import edm_decay, ema_update, warmed_decay


def _tree(value: float) -> dict:
    return {"a": mx.full((2,), value), "blocks": [{"w": mx.full((3,), 2 * value)}]}


def test_against_the_closed_form():
    """avg_n = d^n avg_0 + (1 − d) Σ d^(n−1−k) p_k."""
    decay, values = 0.9, [1.0, -2.0, 0.5, 4.0, 3.0]
    average = _tree(10.0)
    for value in values:
        average = ema_update(average, _tree(value), decay)
    n = len(values)
    expected = decay**n * 10 + (1 - decay) * sum(decay ** (n - 1 - k) * value for k, value in enumerate(values))
    np.testing.assert_allclose(average["a"], expected, rtol=1e-6)
    np.testing.assert_allclose(average["blocks"][0]["w"], 2 * expected, rtol=1e-6)


def test_it_is_pure_and_keeps_a_fixed_point_exactly():
    average, params = _tree(1.0), _tree(3.0)
    ema_update(average, params, 0.5)
    assert float(average["a"][0]) == 1.0 and float(params["a"][0]) == 3.0
    same = ema_update(_tree(0.1), _tree(0.1), 0.999)
    np.testing.assert_array_equal(same["a"], _tree(0.1)["a"])


def test_trees_of_different_shapes_are_refused():
    with pytest.raises((KeyError, ValueError, IndexError)):
        ema_update(_tree(1.0), {"a": mx.zeros((2,))}, 0.5)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (1, 2 / 11), (90, 0.91), (10**6, 0.999)])
def test_warm_up(step, expected):
    assert float(warmed_decay(step, 0.999)) == pytest.approx(expected, rel=1e-6)


def test_edm_decay():
    assert float(edm_decay(0, 64, 500_000)) == 0  # the first weights are taken as they are
    # 100 steps of 64: 6,400 images seen, a halflife of 320 of them, a fifth of it passing in a step
    assert float(edm_decay(100, 64, 500_000)) == pytest.approx(0.5 ** (64 / 320), rel=1e-6)
    assert float(edm_decay(10**7, 64, 500_000)) == pytest.approx(0.5 ** (64 / 500_000), rel=1e-6)


def test_a_halflife_halves():
    """After `halflife` images of zeros an average of ones is one half."""
    average = {"w": mx.array([1.0])}
    decay = edm_decay(10**9, 10, 1000)
    for _ in range(100):
        average = ema_update(average, {"w": mx.array([0.0])}, decay)
    assert float(average["w"][0]) == pytest.approx(0.5, rel=1e-4)


def test_it_compiles_with_the_step_as_an_array():
    @mx.compile
    def update(average, params, step):
        return ema_update(average, params, warmed_decay(step, 0.9))

    for step in (0, 5, 1000):
        got = update(_tree(1.0), _tree(2.0), mx.array(step))
        decay = min((1 + step) / (10 + step), 0.9)
        np.testing.assert_allclose(got["a"], decay * 1 + (1 - decay) * 2, rtol=1e-6)
