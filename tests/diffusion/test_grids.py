"""Sampling grids: ends, spacing, and what happens where a schedule does not reach a noise level."""

import numpy as np
import pytest

from ado_tasks.diffusion.grids import edm_rho, uniform_log_snr, uniform_time
from ado_tasks.diffusion.schedules import Cosine, Edm, LinearBeta
from ado_tasks.errors import ConfigError

SCHEDULES = [Cosine(), LinearBeta(), Edm()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 50])
def test_grids_fall_strictly_from_one_to_zero(n, schedule):
    for grid in (uniform_time(n), uniform_log_snr(n, schedule), edm_rho(n, schedule)):
        assert grid.shape == (n + 1,)
        assert grid.dtype == np.float64
        assert grid[0] == 1
        assert grid[-1] == 0
        assert (np.diff(grid) < 0).all()


def test_uniform_time_is_the_trailing_grid():
    np.testing.assert_array_equal(np.round(Cosine().timestep(uniform_time(4)), 9), [999, 749, 499, 249, -1])


def test_edm_grid_on_edm_schedule_is_equation_5():
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    sigma = Edm().alpha_sigma(edm_rho(18, Edm()))[1]
    np.testing.assert_allclose(sigma, [*expected, 0], rtol=1e-12)


def test_log_snr_grid_is_uniform_inside_its_range():
    log_snr = Cosine().log_snr(uniform_log_snr(10, Cosine(), ratios=(0.01, 50.0))[1:-1])
    np.testing.assert_allclose(np.diff(log_snr), 2 * np.log(50 / 0.01) / 9, rtol=1e-9)


def test_grids_stop_at_timestep_zero_where_the_schedule_does():
    # σ/α at Cosine's timestep 0 is 0.0064 > 0.002: no network is trained between there and clean.
    for grid in (uniform_log_snr(6, Cosine()), edm_rho(6, Cosine())):
        assert grid[-2] == pytest.approx(1 / 1000)


def test_no_steps_are_refused():
    with pytest.raises(ConfigError, match="steps: 0"):
        uniform_time(0)
