"""Distribution matching against distributions whose scores are known in closed form."""

from itertools import combinations

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
from ado_tasks.optimise.adversarial import AdversarialConfig
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


def matching(steps: int, adversarial: float = 0.0, **options) -> Matching:
    asked = AdversarialConfig(weight=adversarial, critic_weight=1.0) if adversarial else None
    config = MatchingConfig(steps=(6,), batch_size=SIZE, adversarial=asked, **options)
    return Matching(config, Interval(steps, 2), 6, 1e-3, SCHEDULE, "v_prediction", 0, 0.03, adversarial)


def batch(seed: int = 0) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    drawn = {name: mx.array(rng.standard_normal((SIZE, 4, 4, 1)).astype(np.float32))
             for name in ("noise", "student_noise", "critic_noise", "real_noise")}  # fmt: skip
    drawn["real"] = mx.array((0.8 + 0.1 * rng.standard_normal((SIZE, 4, 4, 1))).astype(np.float32))  # bright images
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
    found = matching(steps).lesson(dict.fromkeys(each, network(2)), weights, told)
    denoise = make_denoiser(lambda z, t: student(z, t, told["labels"]), SCHEDULE, "v_prediction")
    expected = ddim(denoise, told["noise"], np.linspace(1, 0, steps + 1), SCHEDULE)
    np.testing.assert_allclose(found["sample"], expected, atol=2e-5)
    np.testing.assert_allclose(found["t"], np.full(SIZE, 1 / steps), atol=1e-7)
    np.testing.assert_array_equal(found["target"], found["sample"])  # this critic is the teacher
    # What regression holds it to: two steps of the stage's teacher from where the student's last step begins.
    denoise = make_denoiser(lambda z, t: teacher(z, t, told["labels"]), SCHEDULE, "v_prediction")
    expected = ddim(denoise, found["z"], np.array([1, 0.5, 0]) / steps, SCHEDULE)
    np.testing.assert_allclose(found["regression"], expected, atol=2e-5)


def step_of(shards: int = 1, adversarial: float = 0.0, **options) -> MatchingStep:
    start = [network(seed) for seed in range(3)]
    return MatchingStep(matching(2, adversarial, **options), *start, 1.0, shards, (4, 4, 1))


def run(step: MatchingStep, first: int, last: int, rate: float = 1e-3) -> MatchingStep:
    for index in range(first, last):
        step(batch(index), rate)
    return step


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_run_that_stops_and_goes_on_ends_with_the_same_bytes(weight: float) -> None:
    unbroken = run(step_of(1, weight), 0, 6)
    kept = {name: mx.array(np.array(array)) for name, array in run(step_of(1, weight), 0, 3).state.items()}
    resumed = step_of(1, weight)
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


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_parts_side_by_side_change_only_the_last_bits(weight: float) -> None:
    one, two = run(step_of(1, weight), 0, 2), run(step_of(2, weight), 0, 2)
    np.testing.assert_allclose(
        np.array(one.state["student.parameters"]), np.array(two.state["student.parameters"]), atol=1e-5
    )


def test_without_the_adversarial_term_real_images_change_nothing_and_no_head_is_kept() -> None:
    told = batch()
    seen = {name: array for name, array in told.items() if not name.startswith("real")}
    with_images, without = step_of(), step_of()
    with_images(told, 1e-3), without(seen, 1e-3)
    for name, array in without.state.items():
        np.testing.assert_array_equal(np.array(with_images.state[name]), np.array(array), err_msg=name)
    extra = step_of(adversarial=0.3).state["critic.parameters"].size - without.state["critic.parameters"].size
    assert extra == 4 * 4 * 8 + 1  # middle features, and a bias


def test_the_head_learns_to_tell_real_images_and_samples_are_drawn_to_them() -> None:
    """Student, teacher and critic are one network that knows nothing of bright images: only the head can tell."""
    options, same, told = {"regression": 0.0, "average": 0.0}, network(0), batch(100)
    ends = []
    for weight in (0.0, 10.0):
        term = matching(2, weight, critic_learning_rate=0.01, **options)
        step = run(MatchingStep(term, same, same, same, 1.0, 1, (4, 4, 1)), 0, 20, 3e-3)
        denoise = make_denoiser(lambda z, t, s=step: _with(s)(z, t, told["labels"]), SCHEDULE, "v_prediction")
        ends.append(float(np.array(ddim(denoise, told["noise"], np.array([1, 0.5, 0]), SCHEDULE)).mean()))
    assert ends[0] < -0.5
    assert -0.2 < ends[1] < 0.8


def _with(step: MatchingStep) -> UNet2D:
    net = network(0)
    net.update(step.parameters())
    return net


def test_real_images_of_a_step_have_the_samples_labels_and_noise_of_their_own() -> None:
    class Part:
        shape, num_classes, labels = (4, 4, 1), 3, np.arange(30) % 3

        def __len__(self) -> int:
            return 30

        def batch(self, rows: np.ndarray) -> np.ndarray:
            return np.broadcast_to(self.labels[rows][:, None, None, None], (len(rows), 4, 4, 1)).astype(np.float32)

    plain, found = (matching(1, weight).batch(Part(), 4) for weight in (0.0, 0.3))  # pyright: ignore[reportArgumentType]
    assert set(found) - set(plain) == {"real", "real_noise"}
    for name, array in plain.items():
        np.testing.assert_array_equal(np.array(found[name]), np.array(array), err_msg=name)
    np.testing.assert_array_equal(np.array(found["real"])[:, 0, 0, 0], np.array(found["labels"]))
    noises = [np.array(found[f"{name}_noise"]) for name in ("real", "critic", "student")]
    assert all(np.abs(one - other).min() > 0 for one, other in combinations(noises, 2))
