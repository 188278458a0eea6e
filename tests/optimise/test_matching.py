"""Distribution matching against distributions whose scores are known in closed form."""

import numpy as np
import pytest

from ado_tasks.backend import mlx_utils, mx
from ado_tasks.config import parse
from ado_tasks.diffusion.denoiser import make_denoiser
from ado_tasks.diffusion.oracles import gaussian_denoiser
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.diffusion.solvers.ddim import ddim
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.optimise.matching import Matching, MatchingConfig, MatchingStep, matching_target
from ado_tasks.optimise.progressive import Interval

SCHEDULE = Cosine()
SIZE = 6
CONFIG = {
    "sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4,
    "add_attention": False, "num_class_embeds": 3,
}  # fmt: skip


def network(seed: int) -> UNet2D:
    net = UNet2D(parse(UNet2DConfig, CONFIG, "model"))
    rng = np.random.default_rng(seed)
    drawn = [
        (name, mx.array((0.2 * rng.standard_normal(array.shape)).astype(np.float32)))
        for name, array in mlx_utils.tree_flatten(net.parameters())
    ]
    net.update(mlx_utils.tree_unflatten(drawn))
    return net


def matching(steps: int, **options) -> Matching:
    config = MatchingConfig(steps=(6,), batch_size=SIZE, **options)
    return Matching(config, Interval(steps, 2), 6, 1e-3, SCHEDULE, "v_prediction", 0, 0.03)


def batch(seed: int = 0) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    drawn = {name: mx.array(rng.standard_normal((SIZE, 4, 4, 1)).astype(np.float32))
             for name in ("noise", "student_noise", "critic_noise")}  # fmt: skip
    times = {name: mx.array(rng.uniform(0.1, 0.9, SIZE).astype(np.float32)) for name in ("student_time", "critic_time")}
    return {**drawn, **times, "labels": mx.array(rng.integers(0, 3, SIZE).astype(np.int32))}


def test_a_sample_stays_where_critic_and_teacher_agree() -> None:
    x, y = (mx.array(np.random.default_rng(seed).standard_normal((5, 4, 4, 1)).astype(np.float32)) for seed in (0, 1))
    np.testing.assert_array_equal(matching_target(x, y, y), x)
    assert np.isfinite(np.array(matching_target(x, x, y))).all()  # and 0/0 is not met


@pytest.mark.parametrize(("mean", "std"), [(0.7, 0.5), (-0.4, 1.3)])
def test_a_generator_of_gaussians_ends_at_the_teachers_mean_and_standard_deviation(mean: float, std: float) -> None:
    """x = a + b z has N(a, b²), for which the best critic is known: only matching moves a and b."""
    teacher, a, b = gaussian_denoiser(SCHEDULE, std, mean), 0.0, 1.0
    rng = np.random.default_rng(0)
    for step in range(600):
        noise, other = (rng.standard_normal((256, 1)).astype(np.float32) for _ in range(2))
        x, t = mx.array(a + b * noise), mx.array(rng.uniform(0.02, 0.98, 256).astype(np.float32))
        alpha, sigma = SCHEDULE.alpha_sigma(t)
        noisy = alpha[:, None] * x + sigma[:, None] * mx.array(other)
        critic = gaussian_denoiser(SCHEDULE, b, a)
        # The mean over the batch in place of each sample's: with one pixel a sample, that one can be near 0.
        gap = np.array(critic(noisy, t) - teacher(noisy, t)) / np.abs(np.array(x - teacher(noisy, t))).mean()
        together = x.reshape(1, -1), teacher(noisy, t).reshape(1, -1), critic(noisy, t).reshape(1, -1)
        moved = np.array(matching_target(*together)).reshape(-1, 1)
        np.testing.assert_allclose(np.array(x) - moved, gap, atol=1e-5)
        rate = 0.1 * (1 - step / 600)
        a -= rate * float((np.array(x) - moved).mean())
        b -= rate * float(((np.array(x) - moved) * noise).mean())
    assert a == pytest.approx(mean, abs=0.03)
    assert b == pytest.approx(std, abs=0.03)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_lesson_is_about_what_the_student_itself_samples(steps: int) -> None:
    student, teacher = network(0), network(1)
    told = batch()
    each = {"student": student, "before": teacher, "teacher": teacher, "critic": teacher}
    weights = {name: net.parameters() for name, net in each.items()}
    found = matching(steps).lesson(network(2), weights, told)
    denoise = make_denoiser(lambda z, t: student(z, t, told["labels"]), SCHEDULE, "v_prediction")
    expected = ddim(denoise, told["noise"], np.linspace(1, 0, steps + 1), SCHEDULE)
    np.testing.assert_allclose(found["sample"], expected, atol=2e-5)
    np.testing.assert_allclose(found["t"], np.full(SIZE, 1 / steps), atol=1e-7)
    np.testing.assert_array_equal(found["target"], found["sample"])  # this critic is the teacher
    # What regression holds it to: two steps of the stage's teacher from where the student's last step begins.
    denoise = make_denoiser(lambda z, t: teacher(z, t, told["labels"]), SCHEDULE, "v_prediction")
    expected = ddim(denoise, found["z"], np.array([1, 0.5, 0]) / steps, SCHEDULE)
    np.testing.assert_allclose(found["regression"], expected, atol=2e-5)


def step_of(shards: int = 1) -> MatchingStep:
    start = [network(seed).parameters() for seed in range(3)]
    return MatchingStep(matching(2), network(3), *start, 1.0, shards)


def run(step: MatchingStep, first: int, last: int) -> MatchingStep:
    for index in range(first, last):
        step(batch(index), 1e-3)
    return step


def test_a_run_that_stops_and_goes_on_ends_with_the_same_bytes() -> None:
    unbroken = run(step_of(), 0, 6)
    kept = {name: mx.array(np.array(array)) for name, array in run(step_of(), 0, 3).state.items()}
    resumed = step_of()
    resumed.load(kept)
    run(resumed, 3, 6)
    for name, array in unbroken.state.items():
        np.testing.assert_array_equal(np.array(resumed.state[name]), np.array(array), err_msg=name)


def test_student_and_critic_both_learn_and_the_teacher_does_not() -> None:
    step = step_of()
    start = {name: np.array(array) for name, array in step.state.items()}
    run(step, 0, 2)
    for who in ("student", "critic"):
        assert np.abs(np.array(step.state[f"{who}.parameters"]) - start[f"{who}.parameters"]).max() > 0
    for name, array in mlx_utils.tree_flatten(network(2).parameters()):
        np.testing.assert_array_equal(dict(mlx_utils.tree_flatten(step._held["teacher"]))[name], array)


def test_parts_side_by_side_change_only_the_last_bits() -> None:
    one, two = run(step_of(1), 0, 2), run(step_of(2), 0, 2)
    np.testing.assert_allclose(
        np.array(one.state["student.parameters"]), np.array(two.state["student.parameters"]), atol=1e-5
    )
