"""Progressive distillation against its own algebra and against denoisers known in closed form."""

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.diffusion.oracles import gaussian_denoiser
from ado_tasks.diffusion.parameterisation import expand
from ado_tasks.diffusion.schedules import Cosine, LinearBeta, NoiseSchedule
from ado_tasks.diffusion.solvers import ddim, ddim_step, dpmpp_2m
from ado_tasks.optimise.progressive import Interval, distillation_target, student_step, teacher_walk

SCHEDULES = [Cosine(), LinearBeta()]


def times_of(interval: Interval, index: list[int] | range) -> mx.array:
    return mx.array(interval.times(np.array(index)).astype(np.float32))


def noisy(schedule: NoiseSchedule, times: mx.array) -> mx.array:
    """z_t of a bimodal image at the start of each interval."""
    shape = (len(times), 4, 4, 1)
    x = mx.where(mx.random.uniform(shape=shape, key=rng.key(0, "x")) < 0.5, -1.0, 1.0)
    alpha, sigma = schedule.alpha_sigma(times[:, 0])
    noise = mx.random.normal(shape, key=rng.key(0, "noise"))
    return expand(alpha, noise) * x + expand(sigma, noise) * noise


def bent(z: mx.array, t: mx.array) -> mx.array:
    """A denoiser that is no straight line in z or t, so that two steps differ from one."""
    return mx.tanh(2 * z) * (1 - 0.5 * expand(t, z)) + 0.1 * mx.sin(5 * expand(t, z))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "substeps"), [(16, 2), (8, 4), (4, 2), (2, 2), (1, 2)])
def test_a_student_student_step_the_target_lands_on_the_teachers_end(
    schedule: NoiseSchedule, steps: int, substeps: int
) -> None:
    times = times_of(Interval(steps, substeps), range(steps))
    z = noisy(schedule, times)
    wanted = distillation_target(bent, z, times, schedule)
    landed = student_step(wanted, z, times, schedule)
    end = teacher_walk(bent, z, times, schedule)
    assert float(mx.abs(landed - end).max()) <= 1e-5
    one_step = student_step(bent(z, times[:, 0]), z, times, schedule)
    assert float(mx.abs(one_step - end).max()) > 1e-3  # the identity is not vacuous: one teacher step goes elsewhere


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("substeps", [2, 4])
def test_in_the_last_interval_the_target_is_the_teachers_last_estimate(schedule: NoiseSchedule, substeps: int) -> None:
    times = times_of(Interval(8, substeps), [0] * 5)
    z = noisy(schedule, times)
    seen: list[mx.array] = []

    def denoise(z: mx.array, t: mx.array) -> mx.array:
        seen.append(bent(z, t))
        return seen[-1]

    wanted = distillation_target(denoise, z, times, schedule)
    assert len(seen) == substeps
    assert mx.array_equal(wanted, seen[-1])


@pytest.mark.parametrize(("steps", "substeps"), [(8, 4), (8, 2), (3, 2), (7, 2)])
def test_the_grid_has_no_zero_time_to_evaluate_and_ends_at_exactly_zero(steps: int, substeps: int) -> None:
    times = np.array(times_of(Interval(steps, substeps), range(steps))).T  # (K + 1, N), as the network sees them
    assert (times[:-1] > 0).all()
    assert times[-1, 0] == 0.0
    np.testing.assert_allclose(times[0], (np.arange(steps) + 1) / steps, rtol=1e-6)
    np.testing.assert_allclose(times[-1, 1:], times[0, :-1], rtol=1e-6)  # each interval begins where the next ends
    assert (np.diff(times, axis=0) < 0).all()


KNOTS = (1.0, 0.9, 0.85, 0.6, 0.0)


def test_with_knots_the_steps_lie_on_them_and_those_of_fewer_steps_on_every_so_manyth() -> None:
    assert Interval(4, 8, KNOTS).grid().tolist() == list(KNOTS)
    assert Interval(2, 2, KNOTS).grid().tolist() == [1.0, 0.85, 0.0]
    assert Interval(1, 2, KNOTS).times(np.array([0])).tolist() == [[1.0, 0.85, 0.0]]  # its teacher is the one of two
    assert Interval(12, 1, KNOTS).grid()[::3].tolist() == list(KNOTS)
    assert Interval(4, 8).grid().tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_teacher_walks_evenly_between_two_knots_and_never_over_one() -> None:
    times = Interval(4, 8, KNOTS).times(np.arange(4))
    np.testing.assert_allclose(np.diff(times, axis=1), np.repeat(np.diff(KNOTS)[::-1, None] / 8, 8, axis=1))
    assert times[:, 0].tolist() == list(KNOTS[-2::-1]) and times[:, -1].tolist() == list(KNOTS[:0:-1])
    through = Interval(2, 16, KNOTS).times(np.array([1]))[0]  # one of two steps: evenly on each side of the knot in it
    np.testing.assert_allclose(through, [*np.linspace(1, 0.9, 9), *np.linspace(0.9, 0.85, 9)[1:]])


def test_students_on_knots_walk_the_way_of_their_teacher() -> None:
    """All intervals from the top, one after another, are the DDIM sampler on the teacher's times."""
    schedule, grid = Cosine(), Interval(4, 8, KNOTS)
    denoise = gaussian_denoiser(schedule, 0.5)
    z = start = mx.random.normal((3, 4, 4, 1), key=rng.key(0, "knots"))
    for index in (3, 2, 1, 0):
        times = mx.array(np.repeat(grid.times(np.array([index])), 3, axis=0).astype(np.float32))
        z = student_step(distillation_target(denoise, z, times, schedule), z, times, schedule)
    fine = Interval(32, 1, KNOTS).grid()
    np.testing.assert_allclose(np.array(z), np.array(ddim(denoise, start, fine, schedule)), atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("index", [0, 3, 7])
def test_a_walk_of_dpm_solver_is_that_solver_on_the_interval(schedule: NoiseSchedule, index: int) -> None:
    times = Interval(8, 4).times(np.array([index]))
    z = noisy(schedule, mx.array(times.astype(np.float32)))
    walked = teacher_walk(bent, z, mx.array(times.astype(np.float32)), schedule, "dpmpp_2m")
    np.testing.assert_allclose(np.array(walked), np.array(dpmpp_2m(bent, z, times[0], schedule)), atol=2e-5)


def test_a_walk_of_dpm_solver_is_nearer_to_the_exact_solution() -> None:
    """Over intervals of two: at least four times nearer than DDIM in as many steps, for Gaussian data."""
    schedule = Cosine()
    times = times_of(Interval(2, 8), [0, 1])
    z, denoise = noisy(schedule, times), gaussian_denoiser(schedule, 0.5)
    exact = teacher_walk(denoise, z, times_of(Interval(2, 512), [0, 1]), schedule)
    errors = [
        float(mx.abs(teacher_walk(denoise, z, times, schedule, each) - exact).max()) for each in ("ddim", "dpmpp_2m")
    ]
    assert errors[1] < errors[0] / 4


def test_the_teachers_walk_is_ddim() -> None:
    """All intervals from the top, one after another, are the DDIM sampler on the fine grid."""
    schedule = Cosine()
    denoise = gaussian_denoiser(schedule, 0.5)
    z = mx.random.normal((6, 4, 4, 1), key=rng.key(0, "z"))
    sampled = ddim(denoise, z, np.arange(8, -1, -1) / 8, schedule)
    for i in (3, 2, 1, 0):
        z = teacher_walk(denoise, z, times_of(Interval(4, 2), [i] * 6), schedule)
    assert float(mx.abs(z - sampled).max()) < 1e-5


def test_no_gradient_reaches_the_teacher() -> None:
    schedule, times = Cosine(), times_of(Interval(4, 2), [0, 3])
    z = noisy(schedule, times)

    def loss(scale: mx.array) -> mx.array:
        return distillation_target(lambda z, t: scale * bent(z, t), z, times, schedule).sum()

    assert float(mx.grad(loss)(mx.array(1.0))) == 0.0


def test_steps_meet_the_oracle_of_a_gaussian() -> None:
    """For N(0, s²) everything is linear, so the target is a known multiple of z: check it against float64 by hand."""
    schedule, times = Cosine(), times_of(Interval(2, 2), [1])
    s = 0.5
    z = mx.ones((1, 1, 1, 1))
    t, m, e = (np.float64(v) for v in (1.0, 0.75, 0.5))

    def gain(a: float, b: float) -> float:
        (alpha, sigma), (alpha_s, sigma_s) = schedule.alpha_sigma(a), schedule.alpha_sigma(b)
        x = alpha * s**2 / (alpha**2 * s**2 + sigma**2)
        return float(alpha_s * x + sigma_s / sigma * (1 - alpha * x))

    end = gain(t, m) * gain(m, e)
    (alpha, sigma), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(e)
    expected = (end - sigma_s / sigma) / (alpha_s - sigma_s / sigma * alpha)
    found = distillation_target(gaussian_denoiser(schedule, s), z, times, schedule)
    assert float(found.item()) == pytest.approx(float(expected), rel=1e-5)


def test_ddim_step_is_linear_between_x_and_noise() -> None:
    x, noise = mx.array([0.3]), mx.array([-1.2])
    z = 0.6 * x + 0.8 * noise
    assert float(mx.abs(ddim_step(x, z, 0.6, 0.8, 0.8, 0.6) - (0.8 * x + 0.6 * noise)).max()) < 1e-6
