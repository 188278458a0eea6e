"""The adversarial term against closed forms: of its gradient, and of where it brings a generator."""

import numpy as np
import pytest
from scipy import special

from ado_tasks.backend import mx
from ado_tasks.config import parse
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.oracles import gaussian_denoiser
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.errors import ConfigError
from ado_tasks.optimise.adversarial import AdversarialConfig, head_loss, logits, student_slope
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.optimise.matching import Matching, MatchingConfig, matching_target
from ado_tasks.optimise.progressive import Interval

SCHEDULE = Cosine()
STEPS = 80
Judged = tuple[mx.array, mx.array]


def matching(weight: float) -> Matching:
    config = MatchingConfig(steps=(1,), adversarial=AdversarialConfig(weight=weight))
    return Matching(config, Interval(1, 2), 1, 1e-3, SCHEDULE, "v_prediction", 0, 0.0, weight)


def test_logits_are_linear_in_the_middle_features() -> None:
    rng = np.random.default_rng(0)
    middle, weight = rng.standard_normal((5, 2, 2, 3)), rng.standard_normal((2, 2, 3))
    found = logits({"weight": mx.array(weight), "bias": mx.array([0.5])}, mx.array(middle))
    np.testing.assert_allclose(found, np.einsum("bhwc,hwc->b", middle, weight) / np.sqrt(12) + 0.5, atol=1e-5)


def test_the_heads_loss_is_twice_ln_2_at_a_coin_toss_and_finite_far_away() -> None:
    zero, far = mx.zeros(1), mx.array([200.0])
    np.testing.assert_allclose(head_loss(zero, zero), 2 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(head_loss(-far, far), 400.0, rtol=1e-6)
    np.testing.assert_allclose(head_loss(far, -far), 0.0, atol=1e-6)


def test_for_a_fixed_linear_head_the_gradient_is_a_closed_form() -> None:
    """With D = ⟨w, z⟩ + b and z = α x + σ ε: weight · ∂ softplus(−D)/∂x = −weight · sigmoid(−D) α w."""
    rng = np.random.default_rng(0)
    w, b, weight = rng.standard_normal((3, 3, 1)).astype(np.float32), 0.3, 0.7
    z, t = mx.array(rng.standard_normal((4, 3, 3, 1)).astype(np.float32)), mx.array([0.1, 0.4, 0.6, 0.9])
    judge = lambda z: (2 * z, mx.sum((z * w).reshape(4, -1), axis=1) + b)  # noqa: E731
    x_hat, slope = student_slope(judge, z)
    np.testing.assert_array_equal(x_hat, 2 * z)
    d = (np.array(z) * w).reshape(4, -1).sum(axis=1) + b
    alpha = np.array(SCHEDULE.alpha_sigma(t)[0])
    gradient = -weight * (alpha / (1 + np.exp(d)))[:, None, None, None] * w
    # The student's loss is a mean over nine pixels of half a square: its gradient is (x − target)/9.
    np.testing.assert_allclose(np.array(matching(weight).adversarial_pull(slope, t)) / 9, gradient, atol=1e-6)


def log_density(z: mx.array, t: mx.array, mean: float, std: float) -> mx.array:
    """Of N(mean, std²) noised to z = α x + σ ε, but for a constant."""
    alpha, sigma = (c[:, None] for c in SCHEDULE.alpha_sigma(t))
    variance = (alpha * std) ** 2 + sigma**2
    return mx.sum(-((z - alpha * mean) ** 2) / (2 * variance) - mx.log(variance) / 2, axis=1)


def generator_ends_at(weight: float, data: tuple[float, float], told: tuple[float, float]) -> tuple[float, float]:
    """x = a + b z under matching with a teacher of N(*told), the best critic, and the best D against N(*data)."""
    teacher, term, a, b = gaussian_denoiser(SCHEDULE, told[1], told[0]), matching(weight), 0.0, 1.0
    rng = np.random.default_rng(0)
    strata = special.ndtri((np.arange(1024) + 0.5) / 1024).astype(np.float32)  # the same in every step: no noise in it
    noise, other = (rng.permutation(strata)[:, None] for _ in range(2))
    t = mx.array(rng.uniform(0.02, 0.98, 1024).astype(np.float32))
    alpha, sigma = (c[:, None] for c in SCHEDULE.alpha_sigma(t))
    for step in range(STEPS):
        x, critic = mx.array(a + b * noise), gaussian_denoiser(SCHEDULE, b, a)

        def judge(z: mx.array, critic: Denoiser = critic, at: tuple[float, float] = (a, b)) -> Judged:
            return critic(z, t), log_density(z, t, *data) - log_density(z, t, *at)

        noisy = alpha * x + sigma * mx.array(other)
        x_hat, slope = student_slope(judge, noisy)
        together = (each.reshape(1, -1) for each in (x, teacher(noisy, t), x_hat))
        target = matching_target(*together).reshape(-1, 1) - term.adversarial_pull(slope, t)
        rate, gap = (1 - step / STEPS) / (4 + weight), np.array(x - target)
        a -= rate * float(gap.mean())
        b -= rate * float((gap * noise).mean())
    return a, b


@pytest.mark.parametrize(("data", "told"), [((0.7, 0.5), (0.2, 0.8)), ((-0.4, 1.3), (0.1, 1.0))])
def test_where_the_teacher_is_wrong_real_images_bring_the_generator_to_the_data(
    data: tuple[float, float], told: tuple[float, float]
) -> None:
    np.testing.assert_allclose(generator_ends_at(0.0, data, told), told, atol=0.005)
    np.testing.assert_allclose(generator_ends_at(300.0, data, told), data, atol=0.02)
    between = np.array(generator_ends_at(1.0, data, told))
    share = (between - told) / (np.array(data) - told)
    assert (share > 0.05).all()
    assert (share < 0.95).all()


def test_as_many_weights_as_students_are_wanted() -> None:
    section = {"matching": {"steps": [0, 0, 5, 5], "adversarial": {"weight": [0.0, 0.1]}}}
    with pytest.raises(ConfigError, match=r"matching\.adversarial\.weight: 2 given for 4 stages"):
        parse(DistillConfig, section, "distill.progressive")
    section["matching"]["adversarial"]["weight"] = -1.0
    with pytest.raises(ConfigError, match=r"matching\.adversarial\.weight"):
        parse(DistillConfig, section, "distill.progressive")


def test_each_student_has_its_weight() -> None:
    section = {"matching": {"steps": [0, 0, 5, 5], "adversarial": {"weight": [0.0, 0.0, 0.0, 0.1]}}}
    config = parse(DistillConfig, section, "distill.progressive")
    assert [config.adversarial_weight_of(stage) for stage in range(4)] == [0.0, 0.0, 0.0, 0.1]
    assert DistillConfig().adversarial_weight_of(0) == 0.0
