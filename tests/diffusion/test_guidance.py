"""Guidance on classes that are Gaussians: scores in closed form, exact solutions, two evaluations folded into one."""

import numpy as np
import pytest

from ado_tasks.backend import mx
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.grids import uniform_time
from ado_tasks.diffusion.guidance import combine, draw_weights, drop_labels, guided, guided_in_one_batch
from ado_tasks.diffusion.oracles import gaussian_denoiser, gaussian_solution, mixture_denoiser
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.diffusion.solvers import ddim, heun
from ado_tasks.errors import ConfigError

MEANS, STD = np.array([[-1.0], [0.2], [1.1]]), 0.4
SCHEDULE = Cosine()


@pytest.fixture(autouse=True)
def on_the_cpu():
    """Scores are compared in float64, which MLX has on its CPU device only."""
    with mx.stream(mx.cpu):
        yield


def of_class(c: int) -> Denoiser:
    return gaussian_denoiser(SCHEDULE, STD, float(MEANS[c, 0]))


def of_all() -> Denoiser:
    return mixture_denoiser(SCHEDULE, MEANS, STD)


def by_label(z, t, labels):
    """One conditional "network": label 3 stands for no class."""
    options = mx.stack([*(of_class(c)(z, t) for c in range(3)), of_all()(z, t)])
    return options[labels, mx.arange(len(z))]


def noise(n: int, dtype=mx.float64) -> mx.array:
    return mx.array(np.random.default_rng(0).standard_normal((n, 1)), dtype=dtype)


def log_densities(z: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """log p(z, c) up to a constant, (n, 3), at one noise level."""
    return -((z - alpha * MEANS[:, 0]) ** 2) / (2 * ((alpha * STD) ** 2 + sigma**2))


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5, 4.0])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_score_asks_for_the_class_w_times(w, t):
    # α x̂ = z + σ² score (Tweedie): score_w must be ∇ log p(z) + w ∇ log p(c | z), by differences of closed forms.
    alpha, sigma = (float(c) for c in SCHEDULE.alpha_sigma(t))
    z = np.linspace(-2, 2, 41)[:, None]
    x_hat = np.array(
        guided(of_class(2), of_all(), w)(mx.array(z, dtype=mx.float64), mx.full((41,), t, dtype=mx.float64))
    )

    def wanted(z):
        joint = log_densities(z, alpha, sigma)
        marginal = np.logaddexp.reduce(joint, axis=1)
        return marginal + w * (joint[:, 2] - marginal)

    score = (wanted(z + 1e-5) - wanted(z - 1e-5)) / 2e-5
    np.testing.assert_allclose((alpha * x_hat[:, 0] - z[:, 0]) / sigma**2, score, rtol=1e-4, atol=1e-6)


def test_weight_one_is_the_class_and_zero_is_none():
    z, t = noise(7), mx.full((7,), 0.6, dtype=mx.float64)
    np.testing.assert_allclose(guided(of_class(1), of_all(), 1.0)(z, t), of_class(1)(z, t), rtol=1e-12)
    np.testing.assert_array_equal(np.array(guided(of_class(1), of_all(), 0.0)(z, t)), np.array(of_all()(z, t)))
    x = heun(guided(of_class(0), of_all(), 1.0), z, uniform_time(200), SCHEDULE)
    np.testing.assert_allclose(x, gaussian_solution(z, 1.0, 0.0, SCHEDULE, STD, -1.0), atol=2e-3)


def test_samples_move_away_from_the_other_classes():
    z = noise(400)
    at = [np.array(ddim(guided(of_class(1), of_all(), w), z, uniform_time(100), SCHEDULE))[:, 0] for w in (1, 2, 4)]
    wrong = [np.mean(np.abs(x[:, None] - MEANS[:, 0]).argmin(axis=1) != 1) for x in at]
    assert wrong[0] > 0.1 and wrong[2] < 0.5 * wrong[0]
    assert at[0].std() > at[1].std() > at[2].std()  # at the price of variety


def test_weights_and_labels_of_each_sample_in_one_batch():
    z, labels, weights = noise(6), mx.array([0, 1, 2, 2, 1, 0]), mx.array([1.0, 2.0, 3.0, 4.0, 0.0, 1.5])
    calls = []

    def counted(z, t, labels):
        calls.append(len(z))
        return by_label(z, t, labels)

    t = mx.full((6,), 0.4, dtype=mx.float64)
    together = np.array(guided_in_one_batch(counted, labels, 3, weights)(z, t))
    assert calls == [12]
    for i in range(6):
        alone = guided(of_class(int(labels[i])), of_all(), float(weights[i]))(z[i : i + 1], t[i : i + 1])
        np.testing.assert_allclose(together[i], np.array(alone)[0], rtol=1e-6)


def test_one_network_told_the_weight_takes_one_evaluation_for_two():
    # x̂_w is affine in w. With two Gaussians, so in z too: least squares on drawn weights is the whole distillation, and
    # the folded denoiser then samples what the guided teacher samples, at weights that it never saw.
    teacher_of = lambda w: guided(of_class(2), gaussian_denoiser(SCHEDULE, 1.0), w)  # noqa: E731
    grid, calls = uniform_time(8), []
    students = {}
    weights = draw_weights(64, 1.0, 4.0, mx.random.key(1)).astype(mx.float64)
    z = noise(64)

    def inputs(z, w):
        z, w = np.asarray(z)[:, 0], np.broadcast_to(np.asarray(w), (len(z),))
        return np.stack([np.ones_like(z), z, w, w * z], axis=1)

    for t in grid[:-1]:
        target = np.array(teacher_of(weights)(z, mx.full((64,), float(t), dtype=mx.float64)))
        students[float(t)] = np.linalg.lstsq(inputs(z, weights), target, rcond=None)[0]

    def folded(w):
        def denoise(z, t):
            calls.append(1)
            return mx.array(inputs(z, w) @ students[float(t[0])], dtype=mx.float64)

        return denoise

    fresh = mx.array([[0.3], [-1.2], [2.0]], dtype=mx.float64)
    for w in (1.0, 1.7, 4.0):
        found = ddim(folded(w), fresh, grid, SCHEDULE)
        np.testing.assert_allclose(found, ddim(teacher_of(w), fresh, grid, SCHEDULE), rtol=1e-6, atol=1e-8)
    assert len(calls) == 3 * 8


def test_labels_are_dropped_as_often_as_asked_and_the_same_each_time():
    labels = mx.arange(20_000) % 3
    found = np.array(drop_labels(labels, 3, mx.random.key(0), 0.1))
    assert np.mean(found == 3) == pytest.approx(0.1, abs=0.01)
    kept = found != 3
    np.testing.assert_array_equal(found[kept], np.array(labels)[kept])
    np.testing.assert_array_equal(found, np.array(drop_labels(labels, 3, mx.random.key(0), 0.1)))
    assert (np.array(drop_labels(labels, 3, mx.random.key(0), 0.0)) == np.array(labels)).all()


def test_what_makes_no_sense_is_named():
    with pytest.raises(ConfigError, match="probability"):
        drop_labels(mx.array([0]), 3, mx.random.key(0), 1.1)
    with pytest.raises(ConfigError, match="low, high"):
        draw_weights(3, 4.0, 1.0, mx.random.key(0))
    with pytest.raises(ConfigError, match="weights"):
        guided_in_one_batch(by_label, mx.array([0, 1]), 3, mx.array([1.0, 2.0, 3.0]))


def test_images_are_combined_one_by_one():
    conditional, unconditional = mx.ones((2, 4, 4, 3)), mx.zeros((2, 4, 4, 3))
    np.testing.assert_array_equal(
        np.array(combine(conditional, unconditional, mx.array([2.0, 3.0])))[:, 0, 0, 0], [2, 3]
    )
