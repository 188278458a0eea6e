"""Noise schedules: Diffusers' grids at integer timesteps, exact ends, inverses, precision."""

import numpy as np
import pytest

from ado_tasks.backend import mx
from ado_tasks.diffusion.schedules import Cosine, Edm, LinearBeta, NoiseSchedule, schedule_from_diffusers
from ado_tasks.errors import ConfigError

LATENT = LinearBeta("scaled_linear", 0.00085, 0.012)
SCHEDULES = [Cosine(), LinearBeta(), LATENT, Edm()]
VP = SCHEDULES[:3]
# diffusers.DDIMScheduler(beta_schedule=…).alphas_cumprod of diffusers 0.37.1, float32, at these timesteps.
GOLDEN_TIMESTEPS = [0, 1, 250, 500, 750, 998, 999]
GOLDEN = {
    Cosine(): [0.99995869, 0.99991256, 0.84588802, 0.49228504, 0.14317866, 2.4287663e-06, 2.428735e-09],
    LinearBeta(): [0.99989998, 0.99978006, 0.52142298, 0.077796653, 0.0033001585, 4.1181942e-05, 4.0358304e-05],
    LATENT: [0.99914998, 0.99829602, 0.6737923, 0.27633247, 0.056169804, 0.0047166958, 0.0046600951],
}


def name(schedule: NoiseSchedule) -> str:
    return f"{type(schedule).__name__}-{getattr(schedule, 'kind', '')}"


@pytest.mark.parametrize("schedule", VP, ids=name)
def test_alpha_bar_is_diffusers_at_integer_timesteps(schedule):
    alpha, sigma = schedule.alpha_sigma((np.array(GOLDEN_TIMESTEPS) + 1) / 1000)
    np.testing.assert_allclose(alpha**2, GOLDEN[schedule], atol=1e-6, rtol=2e-5)  # Diffusers' product is float32
    np.testing.assert_allclose(sigma**2, 1 - alpha**2, atol=1e-14)


@pytest.mark.parametrize("schedule", [*VP, Cosine(50), LinearBeta(num_train_timesteps=100)], ids=name)
def test_every_timestep_equals_live_diffusers(schedule):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    theirs = diffusers.DDIMScheduler.from_config(schedule.to_diffusers("v_prediction"))
    steps = schedule.num_train_timesteps
    alpha, _ = schedule.alpha_sigma(np.arange(1, steps + 1) / steps)
    np.testing.assert_allclose(alpha**2, theirs.alphas_cumprod.numpy(), atol=1e-6, rtol=2e-5)
    assert schedule_from_diffusers(theirs.config) == schedule
    # What the config promises: the trailing grid is t = (i + 1)/N, and the last step ends at ᾱ = 1.
    theirs.set_timesteps(5)
    assert theirs.timesteps.tolist() == [round(float(schedule.timestep(t))) for t in np.linspace(1, 0, 6)[:-1]]
    assert float(theirs.final_alpha_cumprod) == 1
    assert not theirs.config["clip_sample"]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_clean_end_is_exact_for_both_kinds_of_input(schedule):
    for zero in (0.0, np.zeros(2), mx.zeros(2)):
        alpha, sigma = schedule.alpha_sigma(zero)
        assert np.all(np.array(alpha) == 1)
        assert np.all(np.array(sigma) == 0)
    assert schedule.log_snr(0.0) == np.inf
    assert float(schedule.time(np.inf)) == 0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_time_inverts_log_snr_which_falls(schedule):
    t = np.sort(np.concatenate([np.random.default_rng(0).uniform(0, 1, 500), np.geomspace(1e-6, 1, 50), [0.9995]]))
    log_snr = schedule.log_snr(t)
    assert (np.diff(log_snr) < 0).all()
    np.testing.assert_allclose(schedule.time(log_snr), t, atol=1e-12)
    np.testing.assert_allclose(np.array(schedule.time(schedule.log_snr(mx.array(t)))), t, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_float32_on_the_device_agrees_with_float64_on_the_host(schedule):
    t = np.concatenate([np.linspace(0.001, 1, 400), np.geomspace(1e-5, 1e-3, 20)])
    alpha, sigma = schedule.alpha_sigma(t)
    alpha32, sigma32 = schedule.alpha_sigma(mx.array(t, dtype=mx.float32))
    assert alpha32.dtype == sigma32.dtype == mx.float32
    np.testing.assert_allclose(np.array(alpha32), alpha, atol=2e-7, rtol=1e-4)
    np.testing.assert_allclose(np.array(sigma32), sigma, rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_bfloat16_times_are_not_computed_in_bfloat16(schedule):
    alpha, _ = schedule.alpha_sigma(mx.array([0.5], dtype=mx.bfloat16))
    assert alpha.dtype == mx.float32
    assert schedule.timestep(mx.array([0.5], dtype=mx.bfloat16)).dtype == mx.float32


@pytest.mark.parametrize("schedule", VP, ids=name)
def test_schedules_are_continuous_between_timesteps(schedule):
    t = np.linspace(0, 1, 100_001)
    alpha, sigma = schedule.alpha_sigma(t)
    assert np.abs(np.diff(alpha)).max() < 1e-4
    assert np.abs(np.diff(sigma)).max() < 0.005  # √t near t = 0
    assert (np.diff(alpha) < 0).all()


def test_cosine_cap_acts_on_the_last_step_only():
    alpha, _ = Cosine().alpha_sigma(np.array([0.998, 0.999, 1.0]))
    uncapped = np.cos(np.pi / 2 * (np.array([0.998, 0.999]) + 0.008) / 1.008) / np.cos(np.pi / 2 * 0.008 / 1.008)
    np.testing.assert_allclose(alpha[:2], uncapped, rtol=1e-10)
    np.testing.assert_allclose((alpha[2] / alpha[1]) ** 2, 1 - 0.999, rtol=1e-9)


def test_timestep_is_what_the_network_is_told():
    assert Cosine().timestep(1.0) == 999
    assert Cosine().timestep(0.001) == pytest.approx(0, abs=1e-12)
    assert Edm().timestep(1.0) == pytest.approx(np.log(80) / 4)
    assert np.array(Edm().timestep(mx.array([1.0])))[0] == pytest.approx(np.log(80) / 4)


def test_edm_time_is_equal_steps_of_sigma_to_one_over_rho():
    sigma = Edm().alpha_sigma(np.linspace(0, 1, 11))[1]
    np.testing.assert_allclose(np.diff(sigma ** (1 / 7)), 80 ** (1 / 7) / 10)
    assert schedule_from_diffusers(Edm(sigma_max=40.0).to_diffusers("edm")) == Edm(sigma_max=40.0)
    assert Edm().alpha_sigma(Edm().t_min)[1] == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"beta_schedule": "linear", "trained_betas": [0.1]}, "trained_betas"),
        ({"beta_schedule": "linear", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"_class_name": "EDMEulerScheduler", "sigma_schedule": "exponential"}, "sigma_schedule"),
        ({"beta_schedule": "linear", "beta_start": -1.0}, "beta_start"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(config, key):
    with pytest.raises(ConfigError, match=key):
        schedule_from_diffusers(config)
