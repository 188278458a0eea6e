"""Steps of each sample's own: independence in bytes, orders on closed forms, cost that follows difficulty, limits."""

from functools import cache

import numpy as np
import pytest

from ado_tasks.backend import mx
from ado_tasks.diffusion import adaptive as module
from ado_tasks.diffusion.adaptive import AdaptiveSamples, StepControl, adaptive, error_profile
from ado_tasks.diffusion.angle import time_of
from ado_tasks.diffusion.denoiser import make_denoiser
from ado_tasks.diffusion.grids import edm_rho, uniform_log_snr
from ado_tasks.diffusion.oracles import gaussian_denoiser, gaussian_solution, mixture_denoiser
from ado_tasks.diffusion.schedules import Cosine, Edm, LinearBeta
from ado_tasks.diffusion.solvers import angle_ab2, ddim, heun
from ado_tasks.errors import ConfigError, DivergenceError
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig

METHODS = ["multistep", "heun"]
MEANS, STD = np.array([[-1.0], [0.3], [1.2]]), 0.35
FINE = [Edm(), Cosine(), LinearBeta(beta_start=1e-6)]  # whose last step, from timestep 0 on, errs less than is measured
GREY = 1 / 127.5  # one level of 256 over [-1, 1]


def by_name(schedule) -> str:
    return type(schedule).__name__


def rowless(denoise):
    return lambda z, t, rows: denoise(z, t)


def noise(n: int, schedule, shape=(1,), seed: int = 0) -> np.ndarray:
    sigma = float(schedule.alpha_sigma(1.0)[1])
    return (np.random.default_rng(seed).standard_normal((n, *shape)) * sigma).astype(np.float32)


def rms(found, exact) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(found, np.float64) - np.asarray(exact, np.float64)))))


@cache
def mixture_truth(schedule, n: int) -> np.ndarray:
    with mx.stream(mx.cpu):
        z = mx.array(noise(n, schedule), dtype=mx.float64)
        grid = edm_rho(1500, schedule) if isinstance(schedule, Edm) else uniform_log_snr(1500, schedule)
        return np.array(heun(mixture_denoiser(schedule, MEANS, STD), z, grid, schedule))


@cache
def network():
    """A small U-Net with random weights, conditional, whose output moves the sample about as data would."""
    config = {
        "sample_size": 8, "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4,
        "num_class_embeds": 3, "in_channels": 1, "out_channels": 1,
    }  # fmt: skip
    unet = UNet2D(UNet2DConfig.from_dict(config))
    initialise(unet, mx.random.key(0))
    labels = np.array([0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 2, 0])
    apply = mx.compile(unet)

    def denoise(z, t, rows):
        y = mx.array(labels[rows])
        return make_denoiser(lambda z, t: apply(z, t, y), Cosine(), "sample")(z, t)

    return denoise


def some(result: AdaptiveSamples, index: int) -> tuple[bytes, int, bool]:
    return result.images[index].tobytes(), int(result.nfe[index]), bool(result.capped[index])


def alone(denoise, z: np.ndarray, index: int, control: StepControl, lanes: int) -> tuple[bytes, int, bool]:
    own = adaptive(lambda x, t, rows: denoise(x, t, rows + index), z[[index]], Cosine(), control, lanes=lanes)
    return some(own, 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_has_the_same_bytes_alone_and_among_others(method):
    control, z = StepControl(0.02, method=method), noise(12, Cosine(), (8, 8, 1))
    together = adaptive(network(), z, Cosine(), control, lanes=4)  # waiting samples take over lanes half-way
    assert len(set(together.nfe.tolist())) > 1, "all alike: the test would prove nothing"
    for index in range(12):
        assert alone(network(), z, index, control, lanes=4) == some(together, index)
    # In another order, and so in other lanes and company.
    order = np.random.default_rng(1).permutation(12)
    shuffled = adaptive(lambda x, t, rows: network()(x, t, order[rows]), z[order], Cosine(), control, lanes=4)
    assert [some(shuffled, place) for place in range(12)] == [some(together, index) for index in order]


@pytest.mark.parametrize("method", METHODS)
def test_another_batch_size_moves_a_sample_by_less_than_a_grey_level(method):
    control, z = StepControl(0.02, method=method), noise(12, Cosine(), (8, 8, 1))
    first, second = (adaptive(network(), z, Cosine(), control, lanes=lanes).images for lanes in (4, 7))
    assert np.abs(first - second).max() < GREY


@pytest.mark.parametrize("method", METHODS)
def test_a_norm_over_the_batch_is_found_by_these_tests(method, monkeypatch):
    # The defect that is copied from sampler to sampler: one norm for all, so one step for all.
    monkeypatch.setattr(module, "norms", lambda values: np.full(len(values), float(mx.sqrt(mx.mean(values * values)))))
    control, z = StepControl(0.02, method=method), noise(12, Cosine(), (8, 8, 1))
    together = adaptive(network(), z, Cosine(), control, lanes=4)
    same = [alone(network(), z, index, control, lanes=4) == some(together, index) for index in range(12)]
    assert not any(same)


@pytest.mark.parametrize("schedule", FINE, ids=by_name)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", ["gaussian", "mixture"])
def test_the_error_falls_with_the_tolerance_as_a_second_order_pair_has_it(data, method, schedule):
    # The estimate is the first-order step's error, ∝ h²: so h ∝ tol^½, and the second-order result errs ∝ h² ∝ tol, but
    # for a logarithm at the clean end (see angle_ab2). First-order results would fall as tol^½.
    z, tolerances = noise(32, schedule), np.geomspace(1e-3, 3e-5, 4)
    if data == "gaussian":
        denoise, exact = gaussian_denoiser(schedule, 0.5), gaussian_solution(mx.array(z), 1.0, 0.0, schedule, 0.5)
    else:
        denoise, exact = mixture_denoiser(schedule, MEANS, STD), mixture_truth(schedule, 32)
    controls = [StepControl(tolerance, method=method, max_nfe=4000) for tolerance in tolerances]
    results = [adaptive(rowless(denoise), z, schedule, control, lanes=32) for control in controls]
    errors, nfe = [rms(result.images, exact) for result in results], [result.nfe.mean() for result in results]
    assert not any(result.capped.any() for result in results)
    assert np.polyfit(np.log(tolerances), np.log(errors), 1)[0] == pytest.approx(0.9, abs=0.25), errors
    assert np.polyfit(np.log(tolerances), np.log(nfe), 1)[0] == pytest.approx(-0.5, abs=0.1), nfe


@pytest.mark.parametrize("method", METHODS)
def test_hard_samples_of_a_mixture_take_more_evaluations(method):
    # A class of two sharp modes, between which x̂ turns late and sharply, beside one of a single narrow mode, where x̂
    # hardly moves; both in the same lanes.
    schedule, z = Cosine(), noise(64, Cosine())
    modes = mixture_denoiser(schedule, np.array([[-1.0], [1.0]]), 0.1)
    narrow = gaussian_denoiser(schedule, 0.1, 0.5)

    def by_class(x, t, rows):
        return mx.where(mx.array(rows % 2 == 0)[:, None], modes(x, t), narrow(x, t))

    nfe = adaptive(by_class, z, schedule, StepControl(0.003, method=method, max_nfe=400), lanes=16).nfe
    assert nfe[::2].mean() > 1.8 * nfe[1::2].mean(), nfe


def test_a_tight_cap_walks_equal_angles():
    # No step is short enough: the cap decides alone, and k evaluations are k equal steps of the same solver.
    schedule, z = Cosine(), noise(5, Cosine())
    denoise = mixture_denoiser(schedule, MEANS, STD)
    result = adaptive(rowless(denoise), z, schedule, StepControl(1e-12, max_nfe=6), lanes=5)
    start = float(np.arctan2(*reversed(schedule.alpha_sigma(1.0))))
    grid = time_of(schedule, start * np.arange(6, -1, -1) / 6)
    np.testing.assert_allclose(result.images, np.array(angle_ab2(denoise, mx.array(z), grid, schedule)), atol=2e-5)
    assert (result.nfe == 6).all() and result.capped.all()


@pytest.mark.parametrize("cap", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("method", METHODS)
def test_the_cap_is_never_exceeded_and_is_said(method, cap):
    denoise = rowless(mixture_denoiser(Cosine(), MEANS, STD))
    z = noise(20, Cosine())
    result = adaptive(denoise, z, Cosine(), StepControl(1e-3, method=method, max_nfe=cap), lanes=8)
    assert result.nfe.max() <= cap and result.capped.all()
    assert np.isfinite(result.images).all()
    free = adaptive(denoise, z, Cosine(), StepControl(1e-3, method=method, max_nfe=1000), lanes=8)
    assert free.nfe.min() > cap and not free.capped.any()


@pytest.mark.parametrize("method", METHODS)
def test_one_evaluation_is_one_step_of_ddim(method):
    denoise = gaussian_denoiser(Cosine(), 0.5, 0.2)
    z = noise(3, Cosine())
    result = adaptive(rowless(denoise), z, Cosine(), StepControl(10.0, method=method), lanes=3)
    np.testing.assert_allclose(result.images, np.array(ddim(denoise, mx.array(z), [1.0, 0.0], Cosine())), atol=1e-6)
    assert (result.nfe == 1).all() and not result.capped.any()


def test_heun_takes_a_step_again_that_was_too_long():
    # A first step chosen as if x̂ hardly moved is too long; it is noticed, and the result is as good as without.
    denoise, z = mixture_denoiser(Cosine(), MEANS, STD), noise(16, Cosine())
    rash, careful = (
        adaptive(rowless(denoise), z, Cosine(), StepControl(2e-3, method="heun", first_std=std), lanes=16)
        for std in (0.1, 0.5)
    )
    assert rash.nfe.mean() > careful.nfe.mean()
    truth = mixture_truth(Cosine(), 16)
    assert rms(rash.images, truth) < 2 * rms(careful.images, truth)


@pytest.mark.parametrize("method", METHODS)
def test_a_relative_tolerance_is_of_the_sample(method):
    # Of N(0, 1) every z_t is the noise itself, so rtol is an atol of rtol |noise|, for each sample its own.
    z, denoise = noise(6, Cosine()), rowless(gaussian_denoiser(Cosine(), 1.0))
    relative = adaptive(denoise, z, Cosine(), StepControl(0.001, rtol=0.003, method=method), lanes=4)
    assert len(set(relative.nfe.tolist())) > 1
    for index in range(6):
        control = StepControl(0.001 + 0.003 * abs(float(z[index, 0])), method=method)
        own = adaptive(denoise, z[[index]], Cosine(), control, lanes=4)
        assert own.nfe[0] == relative.nfe[index]
        np.testing.assert_allclose(own.images[0], relative.images[index], atol=1e-4)


def test_a_sample_of_mean_difficulty_takes_the_steps_its_profile_came_from():
    # ±1 through a symmetric denoiser are equally hard: each takes exactly the schedule's steps.
    denoise, z = mixture_denoiser(Cosine(), np.array([[-1.0], [1.0]]), 0.4), np.array([[1.0], [-1.0]], np.float32)
    times = np.array([0.95, 0.72, 0.51, 0.27, 0.06, 0.0])
    profile = error_profile(denoise, mx.array(z), times, Cosine())
    seen = []

    def watched(x, t, rows):
        seen.append(float(t[0]))
        return denoise(x, t)

    control = StepControl(1.0001, profile=profile, start=0.95)
    result = adaptive(watched, z, Cosine(), control, lanes=2)
    np.testing.assert_allclose(seen, times[:-1], atol=1e-3)
    assert (result.nfe == 5).all()
    np.testing.assert_allclose(result.images, np.array(angle_ab2(denoise, mx.array(z), times, Cosine())), atol=2e-3)
    # Twice as strict: more steps, and not evenly more.
    strict = adaptive(watched, z, Cosine(), StepControl(0.5, profile=profile, start=0.95), lanes=2)
    assert strict.nfe.min() > 5


def test_lanes_are_taken_over():
    denoise = rowless(mixture_denoiser(Cosine(), np.array([[-1.0], [1.0]]), 0.1))
    z = noise(64, Cosine())
    control = StepControl(0.003, max_nfe=400)
    result = adaptive(denoise, z, Cosine(), control, lanes=8)
    waiting = sum(result.nfe[first : first + 8].max() for first in range(0, 64, 8))
    assert result.calls < waiting  # a batch that waits for its slowest sample would take this many
    assert result.calls * 8 >= result.nfe.sum()


@pytest.mark.parametrize("method", METHODS)
def test_an_estimate_that_is_not_finite_is_an_error_that_names_the_sample(method):
    denoise, calls = gaussian_denoiser(Cosine(), 0.5), []

    def broken(z, t, rows):
        calls.append(1)
        x_hat = denoise(z, t)
        return mx.where(mx.array((rows == 5) & (len(calls) > 4))[:, None], float("nan"), x_hat)

    with pytest.raises(DivergenceError, match="sample 5 "):
        adaptive(broken, noise(9, Cosine()), Cosine(), StepControl(1e-3, method=method), lanes=3)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"atol": -1.0}, "atol"), ({"atol": 0.0}, "rtol"), ({"atol": 0.1, "max_nfe": 0}, "max_nfe"),
        ({"atol": 0.1, "method": "euler"}, "method"), ({"atol": 0.1, "start": 0.0}, "start"),
        ({"atol": 0.1, "first_std": 0.0}, "first_std"), ({"atol": 0.1, "profile": ((1.0, 1.0), (1.2, 1.0))}, "profile"),
        ({"atol": 0.1, "profile": ((1.0, 0.0),)}, "profile"), ({"atol": float("nan")}, "atol"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(values, named):
    with pytest.raises(ConfigError, match=named):
        StepControl(**values)


def test_no_lanes_and_no_samples_are_refused():
    denoise = rowless(gaussian_denoiser(Cosine(), 0.5))
    with pytest.raises(ConfigError, match="lanes"):
        adaptive(denoise, noise(2, Cosine()), Cosine(), StepControl(0.1), lanes=0)
    with pytest.raises(ConfigError, match="samples"):
        adaptive(denoise, noise(0, Cosine()), Cosine(), StepControl(0.1), lanes=2)
