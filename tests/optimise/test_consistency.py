"""Consistency tuning against a consistency function known in closed form, and against its own arithmetic."""

import math
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ado_tasks.backend import mlx_utils, mx
from ado_tasks.config import parse
from ado_tasks.diffusion.denoiser import Denoiser, make_denoiser
from ado_tasks.diffusion.oracles import gaussian_consistency
from ado_tasks.diffusion.schedules import Cosine, LinearBeta, NoiseSchedule
from ado_tasks.errors import ConfigError
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.optimise.consistency import (
    ConsistencyConfig,
    Tuning,
    best_points,
    consistency_loss,
    level_before,
    on_grid,
    times_of,
)

STD = 0.5
SCHEDULES = [Cosine(), LinearBeta()]


class GaussianImages:
    """A part of a dataset whose pixels are N(0, s²)."""

    shape, num_classes = (4, 4, 1), 0

    def __init__(self, count: int = 8192) -> None:
        drawn = np.random.default_rng(0).standard_normal((count, *self.shape))
        self.images = (STD * drawn).astype(np.float32)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: np.ndarray) -> np.ndarray:
        return self.images[rows]


PART: Any = GaussianImages()


def tuning(schedule: NoiseSchedule | None = None, **options: Any) -> Tuning:
    config = ConsistencyConfig(**{"batch_size": 512, **options})
    return Tuning(config, schedule or Cosine(), "v_prediction", 0)


def slope(run: Tuning, std: float, batches: int = 12) -> float:
    """Mean over batches of d loss/d a at a = `std`, for f_a the consistency function of N(0, a²)."""

    def loss(a: mx.array, batch: dict[str, mx.array]) -> mx.array:
        return consistency_loss(gaussian_consistency(run.schedule, a), batch, 0.01)

    slopes = [mx.grad(loss)(mx.array(std), run.batch(PART, step)) for step in range(batches)]
    return float(mx.mean(mx.stack(slopes)))


# --- the loss


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "options", [{}, {"level_mean": 0.5, "level_std": 1.0, "sigma_data": 0.5}], ids=["paper", "else"]
)
def test_the_slope_is_zero_at_the_exact_consistency_function_and_leads_back_to_it(schedule, options) -> None:
    run = tuning(schedule, **options)
    low, at, high = (slope(run, factor * STD) for factor in (0.9, 1.0, 1.1))
    assert low < 0 < high
    assert abs(at) < 0.15 * min(-low, high)  # the offsets are 10 %: the zero lies within about 1.5 % of s


def test_descent_ends_at_the_exact_consistency_function() -> None:
    run, a = tuning(level_mean=0.0, level_std=1.5), 1.6 * STD
    for step in range(60):
        a -= 0.2 * (1 - step / 60) * slope(run, a, batches=2)
    assert a == pytest.approx(STD, rel=0.02)


def test_a_wide_gap_ends_too_narrow() -> None:
    """Part of the way is a mean over images: at q = 16 the zero of the slope is 3 to 10 % below s, at 2 far below."""
    assert slope(tuning(q=16.0), 0.9 * STD) < 0 < slope(tuning(q=16.0), 0.97 * STD)
    assert slope(tuning(q=2.0), 0.75 * STD) > 0


@pytest.mark.parametrize("factor", [0.7, 0.9, 1.1, 1.4])
def test_against_exact_targets_the_exact_function_has_the_least_loss(factor: float) -> None:
    run = tuning()

    def loss(std: float) -> float:
        """f_std drawn to what the exact function says at r."""
        exact, wrong = gaussian_consistency(run.schedule, STD), gaussian_consistency(run.schedule, std)
        found = []
        for step in range(4):
            batch = run.batch(PART, step)
            calls: list[int] = []

            def denoise(z: mx.array, t: mx.array, calls: list[int] = calls) -> mx.array:
                calls.append(1)
                return (exact if len(calls) == 1 else wrong)(z, t)  # the near end is asked first

            found.append(float(consistency_loss(denoise, batch, 0.01)))
        return float(np.mean(found))

    assert loss(STD) < 0.7 * loss(factor * STD)


def test_no_gradient_reaches_the_near_end() -> None:
    run = tuning(batch_size=8)
    batch = run.batch(PART, 0)
    far, near = batch["t"], batch["t_near"]

    def loss(gain: mx.array, at: mx.array) -> mx.array:
        exact = gaussian_consistency(run.schedule, STD)
        scaled: Denoiser = lambda z, t: exact(z, t) * (gain if mx.array_equal(t, at) else 1.0)  # noqa: E731
        return consistency_loss(scaled, batch, 0.01)

    assert float(mx.grad(loss)(mx.array(1.0), near)) == 0.0
    assert float(mx.grad(loss)(mx.array(1.0), far)) != 0.0


def test_where_r_is_0_the_target_is_the_image() -> None:
    """Plain denoising: the best factor of z is then the posterior mean's, and the loss is its pseudo-Huber distance."""
    run = tuning(q=2.0, batch_size=64)
    batch = run.batch(PART, 0)
    clean = np.array(batch["clean"])
    assert 0.2 < clean.mean() < 0.9
    images, weight = np.array(batch["images"]), np.array(batch["weight"])

    def denoise(z: mx.array, t: mx.array) -> mx.array:
        return mx.zeros_like(z) if mx.array_equal(t, batch["t"]) else mx.full(z.shape, mx.nan)

    only = {name: array[mx.array(np.flatnonzero(clean))] for name, array in batch.items()}
    wanted = weight * (np.sqrt((images**2).sum(axis=(1, 2, 3)) + 0.01**2) - 0.01)
    batch = only
    assert float(consistency_loss(denoise, only, 0.01)) == pytest.approx(wanted[clean].mean(), rel=1e-4)


# --- levels


def test_r_of_u_is_the_papers_mapping() -> None:
    u = np.array([0.01, 0.3, 1.0, 5.0, 80.0])
    for q, stage in ((256.0, 0), (2.0, 0), (2.0, 3), (4.0, 1)):
        wanted = [max(0.0, x * (1 - q ** -(stage + 1) * (1 + 8 / (1 + math.exp(x))))) for x in u]
        np.testing.assert_allclose(level_before(u, q, stage), wanted, rtol=1e-12)
    assert level_before(np.array([1.0]), 256.0, 0) == pytest.approx(1 - (1 + 8 * 0.2689414213699951) / 256)


def test_the_recipe_for_a_pretrained_model_never_meets_0_and_that_from_scratch_does() -> None:
    u = np.geomspace(1e-4, 1e5, 2000)
    assert (level_before(u, 256.0, 0) >= 0.98 * u).all()
    assert (level_before(u, 256.0, 0) < u).all()
    scratch = level_before(u, 2.0, 0)
    assert (scratch[u < 1] == 0).all()
    assert (scratch[u > 10] > 0.49 * u[u > 10]).all()
    stages = [level_before(u, 2.0, stage) for stage in range(8)]
    assert all((after >= before).all() for before, after in pairwise(stages))
    assert not np.array(tuning().batch(PART, 0)["clean"]).any()


def test_levels_are_log_normal_between_the_ends() -> None:
    run = tuning(batch_size=4096)
    u = run.levels(0)
    lowest, highest = float(np.exp(-Cosine().log_snr(1e-3) / 2)), 80.0
    inside = (u > lowest * 1.0001) & (u < highest * 0.9999)
    normal = (np.log(u) + 1.1) / 2.0
    quantiles = stats.norm.cdf(np.sort(normal[inside]))
    ends = stats.norm.cdf((np.log([lowest, highest]) + 1.1) / 2.0)
    assert np.abs(quantiles - np.linspace(*ends, inside.sum())).max() < 2e-3
    assert u.min() == pytest.approx(lowest) and u.max() == pytest.approx(highest)
    assert not np.array_equal(u, run.levels(1))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_both_ends_lie_on_a_line_from_the_same_image_and_noise(schedule: NoiseSchedule) -> None:
    """From z/α = x + u ε and z_r/α_r = x + r ε follow x, which is the image, and ε, which has variance 1."""
    run = tuning(schedule, level_mean=0.0, level_std=0.7, q=4.0)
    batch = {name: np.array(array, dtype=np.float64) for name, array in run.batch(PART, 3).items()}
    u, r = run.levels(3), level_before(run.levels(3), 4.0, 0)
    (alpha, sigma), (alpha_r, _) = (schedule.alpha_sigma(batch[name]) for name in ("t", "t_near"))
    np.testing.assert_allclose(sigma / alpha, u, rtol=1e-4)
    u, r, alpha, alpha_r = (each.reshape(-1, 1, 1, 1) for each in (u, r, alpha, alpha_r))
    far, near = batch["z"] / alpha, batch["z_near"] / alpha_r
    np.testing.assert_allclose((u * near - r * far) / (u - r), batch["images"], atol=2e-3)
    assert ((far - near) / (u - r)).std() == pytest.approx(1, abs=0.03)
    np.testing.assert_allclose(batch["weight"], 1 / u.ravel() ** 2 + 1, rtol=1e-5)
    halved = tuning(schedule, level_mean=0.0, level_std=0.7, q=4.0, sigma_data=0.5).batch(PART, 3)
    np.testing.assert_allclose(np.array(halved["weight"]), 1 / u.ravel() ** 2 + 4, rtol=1e-5)


def test_v_prediction_has_the_boundary_condition_and_is_edms_with_sigma_d_1() -> None:
    schedule = Cosine()
    u = np.array([0.0, 0.1, 1.0, 20.0])
    t = mx.array(times_of(u, schedule).astype(np.float32))
    assert float(t[0]) == 0.0
    said = mx.random.normal((4, 4, 4, 1), key=mx.random.key(1))
    z = mx.random.normal((4, 4, 4, 1), key=mx.random.key(0))
    found = np.array(make_denoiser(lambda z, timestep: said, schedule, "v_prediction")(z, t))
    np.testing.assert_array_equal(found[0], np.array(z[0]))
    alpha = schedule.alpha_sigma(np.array(t, dtype=np.float64))[0].reshape(-1, 1, 1, 1)
    u = u.reshape(-1, 1, 1, 1)
    c_skip, c_out = 1 / (u**2 + 1), u / np.sqrt(u**2 + 1)
    np.testing.assert_allclose(found, c_skip * np.array(z) / alpha - c_out * np.array(said), atol=2e-4)


def test_rates_and_stages_by_step() -> None:
    run = tuning(steps=100, warmup_steps=10, learning_rate=0.5, stages=4, q=2.0)
    rates = [run.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.5 / 11) and rates[10] == 0.5 == max(rates) and rates[-1] == 0
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) < 0).all()
    assert [run.stage_of(step) for step in (0, 24, 25, 74, 75, 99)] == [0, 0, 1, 2, 3, 3]


# --- with a network


def network(dropout: float, seed: int = 0) -> UNet2D:
    config = {
        "sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": [8],
        "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "layers_per_block": 1,
        "norm_num_groups": 4, "add_attention": False, "dropout": dropout,
    }  # fmt: skip
    net, drawn = UNet2D(parse(UNet2DConfig, config, "model")), np.random.default_rng(seed)
    flat = mlx_utils.tree_flatten(net.parameters())
    net.update(mlx_utils.tree_unflatten([
        (name, mx.array((0.3 * drawn.standard_normal(array.shape)).astype(np.float32))) for name, array in flat
    ]))  # fmt: skip
    return net


def test_both_passes_drop_the_same_units() -> None:
    """With both ends at the same place nothing is left of the loss, whatever is dropped, if it is the same."""
    run, net = tuning(batch_size=6), network(dropout=0.5)
    batch = run.batch(PART, 0, net.config.dropout)
    same = {**batch, "z_near": batch["z"], "t_near": batch["t"]}
    loss = run.loss(net)
    assert float(loss(net.parameters(), same)) == 0.0
    dropped = float(loss(net.parameters(), batch))
    assert dropped != float(loss(net.parameters(), {k: v for k, v in batch.items() if k != "dropout"}))
    assert dropped != float(loss(net.parameters(), {**batch, "dropout": batch["dropout"][1:]}))


def test_the_loss_of_a_network_is_the_loss_of_its_denoiser() -> None:
    run, net = tuning(batch_size=6, norm_c=0.2), network(dropout=0.0)
    batch = run.batch(PART, 0, 0.0)
    assert "dropout" not in batch
    wanted = consistency_loss(make_denoiser(net, run.schedule, "v_prediction"), batch, 0.2)
    assert float(run.loss(net)(net.parameters(), batch)) == pytest.approx(float(wanted), rel=1e-6)
    default = consistency_loss(make_denoiser(net, run.schedule, "v_prediction"), batch, 0.00054 * 4)
    found = tuning(batch_size=6).loss(net)(net.parameters(), batch)
    assert float(found) == pytest.approx(float(default), rel=1e-6)


# --- points


def test_points_are_found_one_after_another() -> None:
    candidates, goal = [0.9, 0.7, 0.5, 0.3], (0.7, 0.3)
    asked: list[tuple[float, ...]] = []

    def score(points: tuple[float, ...]) -> float:
        asked.append(points)
        return sum(min(abs(want - have) for have in points) for want in goal) + 0.01 * len(points)

    found = best_points(score, candidates, 2)
    assert [points for points, _ in found] == [(), (0.7,), (0.7, 0.3)]
    brute = min(combinations(candidates, 1), key=score)
    assert found[1][0] == brute and set(found[1][1]) == set(candidates)
    assert all(points == tuple(sorted(points, reverse=True)) for points in asked)
    assert len(best_points(score, [0.5], 3)) == 2


def test_points_lie_on_diffusers_timesteps() -> None:
    grid = on_grid(np.array([0.0001, 0.42505, 0.99198]), Cosine())
    np.testing.assert_array_equal(np.round(Cosine().timestep(grid), 6), [0, 424, 991])


# --- configuration


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("q", 1.0, "greater than 1"), ("student_steps", [2, 2], "each once"), ("student_steps", [], "at least one"),
     ("norm_c", 0.0, "greater than 0"), ("teacher_steps", 8, "unknown key"), ("ema_decay", 1.0, "less than 1")],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(key: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(ConsistencyConfig, {key: value}, "distill.consistency")
