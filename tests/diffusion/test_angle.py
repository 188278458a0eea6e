"""Steps in the angle: the closed form against quadrature, steps that are exact for a straight x̂, and their reach."""

import numpy as np
import pytest
from scipy.integrate import quad

from ado_tasks.backend import mx
from ado_tasks.diffusion.angle import angle, reach, slope_gain, time_of
from ado_tasks.diffusion.schedules import Cosine, Edm, LinearBeta
from ado_tasks.diffusion.solvers import angle_ab2, dpmpp_2m

SCHEDULES = [Edm(), Cosine(), LinearBeta()]


def by_name(schedule) -> str:
    return type(schedule).__name__


@pytest.mark.parametrize(("start", "end"), [(1.5, 1.2), (1.5, 0.01), (0.6, 0.5), (0.05, 0.002)])
def test_gain_is_the_integral_of_a_unit_slope(start, end):
    integral, _ = quad(lambda phi: (start - phi) / np.sin(phi) ** 2, end, start, epsabs=1e-13, epsrel=1e-12)
    assert slope_gain(start, end) == pytest.approx(np.sin(end) * integral, rel=1e-9)


def test_gain_at_the_clean_end_and_of_small_steps():
    assert slope_gain(0.7, 0.0) == 0.7
    assert slope_gain(0.7, 1e-9) == pytest.approx(0.7, abs=1e-7)  # no jump on the way there
    assert slope_gain(0.7, 0.7) == 0
    assert slope_gain(0.9, 0.9 - 1e-4) == pytest.approx(1e-8 / 2 / np.sin(0.9), rel=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_name)
def test_angles_and_times_are_inverses(schedule):
    times = np.concatenate([[1.0, 0.0], np.linspace(schedule.t_min, 0.999, 50)])
    np.testing.assert_allclose(time_of(schedule, angle(schedule, times)), times, rtol=1e-7, atol=1e-9)
    assert time_of(schedule, 0.0) == 0 and angle(schedule, 0.0) == 0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_name)
def test_a_straight_estimate_is_integrated_exactly_to_the_clean_end(schedule):
    # x̂ = 0.4 − 0.3 φ wherever z is. Three uneven steps of this solver after one of DDIM; the truth by fine steps.
    def denoise(z, t):
        value = 0.4 - 0.3 * angle(schedule, np.array(t, np.float64))
        return mx.ones_like(z) * mx.array(value, dtype=z.dtype).reshape(-1, 1)

    with mx.stream(mx.cpu):
        z = mx.array([[0.8], [-0.2]], dtype=mx.float64)
        times = time_of(schedule, np.array([1.2, 1.19999, 0.9, 0.2, 0.0]))
        fine = time_of(schedule, np.array([*np.linspace(1.2, 0.2, 4001), *np.geomspace(0.2, 1e-4, 2001)[1:], 0.0]))
        found = angle_ab2(denoise, z, times, schedule)
        np.testing.assert_allclose(np.array(found), np.array(dpmpp_2m(denoise, z, fine, schedule)), atol=4e-5)
        # The clean end in closed form: z_0 = x̂(0) whatever came before.
        np.testing.assert_allclose(np.array(found), 0.4, atol=1e-9)


@pytest.mark.parametrize("schedule", [Cosine(), LinearBeta()], ids=by_name)
def test_a_step_with_the_true_slope_is_exact(schedule):
    start, end, slope = 1.3, 0.5, 0.3

    def by_quadrature(z):  # z_s = (sin φ_s/sin φ_t) z_t + sin φ_s ∫ x̂/sin² φ dφ
        integral, _ = quad(lambda phi: (0.4 - slope * phi) / np.sin(phi) ** 2, end, start)
        return np.sin(end) / np.sin(start) * z + np.sin(end) * integral

    x_hat = 0.4 - slope * start
    ddim = np.cos(end) * x_hat + np.sin(end) / np.sin(start) * (0.8 - np.cos(start) * x_hat)
    assert ddim + slope_gain(start, end) * slope == pytest.approx(by_quadrature(0.8), rel=1e-9)


def test_reach_is_where_the_gain_meets_the_tolerance():
    rng = np.random.default_rng(0)
    start, slope = rng.uniform(0.1, 1.57, 200), rng.uniform(0.01, 3, 200)
    tolerance = 10 ** rng.uniform(-4, -1, 200)
    end = reach(start, slope, tolerance)
    assert ((end >= 0) & (end < start)).all()
    inside = end > 0
    np.testing.assert_allclose((slope_gain(start, end) * slope)[inside], tolerance[inside], rtol=1e-6)
    assert (start * slope <= tolerance)[~inside].all() and 0 < inside.sum() < 200


def test_reach_of_each_element_is_its_own():
    start, slope, tolerance = np.array([1.5, 0.3, 1.0]), np.array([1.0, 0.0, 2.0]), np.full(3, 0.01)
    together = reach(start, slope, tolerance)
    alone = [reach(*(values[i : i + 1] for values in (start, slope, tolerance)))[0] for i in range(3)]
    assert together.tolist() == alone
    assert together[1] == 0
