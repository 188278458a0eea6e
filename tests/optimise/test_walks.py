"""Walks that are walked once: what is kept of them, and what a student of few steps is shown."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.datasets.shards import Split, open_dataset
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.oracles import gaussian_denoiser, gaussian_solution
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.diffusion.solvers import ddim, ddim_step, dpmpp_2m
from ado_tasks.errors import DivergenceError
from ado_tasks.optimise import walks as module
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.optimise.progressive import WalkSolver, levels, states_on_the_way, steps_asked, target
from ado_tasks.optimise.students import Stage
from ado_tasks.optimise.walks import Walks, walked
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.report import SILENT, Recorder, StopWhen
from ado_tasks.storage import load_arrays, save_arrays

SCHEDULE = Cosine()
TIMES = (1.0, 0.9, 0.85, 0.6, 0.0)
SAMPLERS = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}


def bent(z: mx.array, t: mx.array) -> mx.array:
    """A denoiser that is no straight line in z or t."""
    return mx.tanh(2 * z) * (1 - 0.5 * t[:, None, None, None]) + 0.1 * mx.sin(5 * t[:, None, None, None])


def uniform(steps: int) -> np.ndarray:
    return 1 - np.arange(steps + 1) / steps


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Split:
    folder = tmp_path_factory.mktemp("walks") / "data"
    prepare(PrepareConfig(name="digits", source="digits"), out=folder, seed=0)
    return open_dataset(folder).split("train")


def walk(part: Split, scratch: Path, count: int = 10, solver: WalkSolver = "ddim", seed: int = 0) -> Walks:
    return walked(lambda _: bent, TIMES, uniform(10), solver, count, part, SCHEDULE, seed, scratch, SILENT)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_a_walk_ends_where_the_sampler_ends_wherever_it_is_looked_at(solver: WalkSolver) -> None:
    noise = mx.random.normal((3, 4, 4, 1), key=rng.key(0, "walk"))
    states = states_on_the_way(bent, noise, uniform(10), TIMES[1:], SCHEDULE, solver)
    assert len(states) == len(TIMES) - 1
    end = np.array(SAMPLERS[solver](bent, noise, uniform(10), SCHEDULE))
    np.testing.assert_allclose(np.array(states[-1]), end, atol=2e-5)


def test_at_a_time_of_the_teachers_own_the_state_is_its_own_and_between_two_on_the_line_between() -> None:
    noise = mx.random.normal((3, 4, 4, 1), key=rng.key(0, "walk"))
    _, trajectory = ddim(bent, noise, uniform(10), SCHEDULE, trajectory=True)
    at, between = states_on_the_way(bent, noise, uniform(10), (0.9, 0.85), SCHEDULE)
    np.testing.assert_allclose(np.array(at), np.array(trajectory[1]), atol=1e-6)
    t = mx.full((3,), 0.9)
    half = ddim_step(bent(at, t), at, *levels(t, at, SCHEDULE), *levels(mx.full((3,), 0.85), at, SCHEDULE))
    np.testing.assert_allclose(np.array(between), np.array(half), atol=1e-6)
    assert float(mx.abs(between - (at + trajectory[2]) / 2).max()) > 1e-4  # of constant estimate, not of pixels


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_at_all_times_of_the_teachers_own_the_states_are_the_samplers(solver: WalkSolver) -> None:
    noise = mx.random.normal((3, 4, 4, 1), key=rng.key(0, "walk"))
    _, trajectory = SAMPLERS[solver](bent, noise, uniform(10), SCHEDULE, trajectory=True)
    states = states_on_the_way(bent, noise, uniform(10), uniform(10)[1:].tolist(), SCHEDULE, solver)
    for state, own in zip(states, trajectory[1:], strict=True):
        np.testing.assert_allclose(np.array(state), np.array(own), atol=2e-5)


def test_a_fine_walk_is_the_exact_solution_where_it_is_known() -> None:
    noise, spread = mx.random.normal((2, 4, 4, 1), key=rng.key(0, "exact")), 0.5
    states = states_on_the_way(gaussian_denoiser(SCHEDULE, spread), noise, uniform(400), TIMES[1:], SCHEDULE)
    for time, state in zip(TIMES[1:], states, strict=True):
        exact = gaussian_solution(noise, 1.0, time, SCHEDULE, spread)
        np.testing.assert_allclose(np.array(state), np.array(exact), atol=0.01)


def test_where_the_teacher_is_asked_thins_out_and_begins_at_the_beginning() -> None:
    for steps in range(1, 60):
        for evaluations in range(1, steps + 1):
            found = steps_asked(steps, evaluations)
            assert len(found) == len(set(found)) == evaluations
            assert found == sorted(found)
            assert found[0] == 0
            assert found[-1] < steps
    assert steps_asked(8, 8) == list(range(8))
    assert steps_asked(50, 16) == [0, 1, 2, 3, 4, 5, 7, 9, 12, 15, 19, 23, 28, 33, 38, 43]
    assert steps_asked(49, 7) == [0, 1, 4, 9, 16, 25, 36]  # whole numbers, which (i/n)² in floats falls short of
    gaps = np.diff(steps_asked(1000, 20))
    assert (np.diff(gaps) >= -1).all()  # by rounding
    assert gaps[-1] > 4 * gaps[0]
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=r"must lie in 1\.\.8"):
            steps_asked(8, wrong)


@pytest.mark.parametrize("evaluations", [None, 10, 7, 4, 2])
def test_where_it_is_not_asked_the_teachers_estimate_goes_on_in_a_line(evaluations: int | None) -> None:
    asked = steps_asked(10, evaluations or 10)
    grid, times, answers = uniform(10), [], []

    def listening(z: mx.array, t: mx.array) -> mx.array:
        times.append(float(t[0]))
        answers.append(bent(z, t))
        return answers[-1]

    noise = mx.random.normal((3, 4, 4, 1), key=rng.key(0, "walk"))
    states = states_on_the_way(listening, noise, grid, grid[1:].tolist(), SCHEDULE, "ddim", evaluations)
    np.testing.assert_allclose(times, grid[asked], atol=1e-6)
    z = noise
    for k, state in enumerate(states):  # the same in numbers of steps: uniform times are one tenth apart
        known = [index for index in asked if index <= k][-2:]
        last = np.array(answers[asked.index(known[-1])])
        before = np.array(answers[asked.index(known[0])])
        slope = (last - before) / (known[1] - known[0]) if len(known) == 2 else 0
        estimate = mx.array(last + slope * (k - known[-1]))
        t, s = (mx.full((3,), float(grid[index])) for index in (k, k + 1))
        z = ddim_step(estimate, z, *levels(t, z, SCHEDULE), *levels(s, z, SCHEDULE))
        np.testing.assert_allclose(np.array(state), np.array(z), atol=2e-5)


def test_asked_half_as_often_a_walk_stays_what_it_is_to_second_order() -> None:
    noise, denoise = mx.random.normal((4, 4, 4, 1), key=rng.key(0, "walk")), gaussian_denoiser(SCHEDULE, 0.5)
    forecast, fewer = [], []
    for steps in (160, 320):
        whole, half, short = (
            states_on_the_way(denoise, noise, uniform(count), (0.0,), SCHEDULE, "ddim", evaluations)[0]
            for count, evaluations in ((steps, None), (steps, steps // 2), (steps // 2, None))
        )
        forecast.append(float(mx.abs(half - whole).mean()))
        fewer.append(float(mx.abs(short - whole).mean()))
    assert 1.6 < fewer[0] / fewer[1] < 2.4  # half as many steps: first order
    assert forecast[0] / forecast[1] > 3.2  # as many steps, half of them forecast: second
    assert forecast[1] < fewer[1] / 2


def test_a_solver_that_extrapolates_itself_is_asked_at_each_step() -> None:
    noise = mx.zeros((1, 4, 4, 1))
    with pytest.raises(ValueError, match="a walk of dpmpp_2m is asked at each of its steps"):
        states_on_the_way(bent, noise, uniform(8), (0.0,), SCHEDULE, "dpmpp_2m", 4)


@pytest.mark.parametrize("stops", [(0.5, 0.6), (1.0, 0.0), (0.5, 0.5), (0.5, -0.1)])
def test_stops_that_no_walk_passes_are_refused(stops: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="stops must fall"):
        states_on_the_way(bent, mx.zeros((1, 2, 2, 1)), uniform(4), stops, SCHEDULE)


@pytest.mark.parametrize("steps", [4, 2, 1])
def test_a_leg_goes_from_one_of_the_students_times_to_its_next(part: Split, tmp_path: Path, steps: int) -> None:
    walks = walk(part, tmp_path)
    batch, leg = walks.legs(3, 8, steps)
    every = 4 // steps
    for z, end, number in zip(np.array(batch["z"]), np.array(batch["end"]), leg, strict=True):
        row = int(np.flatnonzero((walks.states[:, number * every] == z).all(axis=(1, 2, 3)))[0])
        np.testing.assert_array_equal(walks.states[row, (number + 1) * every], end)
    assert Counter(leg.tolist()) == dict.fromkeys(range(steps), 8 // steps)


def test_the_target_of_a_leg_leads_to_its_end(part: Split, tmp_path: Path) -> None:
    batch, leg = walk(part, tmp_path).legs(0, 8, 4)
    grid = np.array(TIMES, dtype=np.float32)
    z = batch["z"]
    here, there = (levels(mx.array(grid[at]), z, SCHEDULE) for at in (leg, leg + 1))
    landed = ddim_step(target(batch["end"], z, *here, *there), z, *here, *there)
    np.testing.assert_allclose(np.array(landed), np.array(batch["end"]), atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_is_shown_times_targets_and_weights_as_in_closed_form(part: Split, tmp_path: Path, stage: int) -> None:
    config = DistillConfig(
        teacher_steps=10, student_steps=(4, 2, 1), batch_size=8, times=TIMES, walks=10, loss="v"
    )  # fmt: skip
    walks = walk(part, tmp_path)
    batch = Stage(config, stage, config.interval_of(stage), SCHEDULE, "v_prediction", 0, walks).batch_of_legs(3)
    seen, leg = walks.legs(3, 8, config.student_steps[stage])
    times = np.array(TIMES)[:: 2**stage]
    z, end = (np.array(seen[name], np.float64) for name in ("z", "end"))
    (alpha, sigma), (after, less) = (SCHEDULE.alpha_sigma(times[at]) for at in (leg, leg + 1))
    ratio = (less / sigma)[:, None, None, None]
    wanted = (end - ratio * z) / (after[:, None, None, None] - ratio * alpha[:, None, None, None])
    np.testing.assert_allclose(np.array(batch["t"]), times[leg], rtol=1e-6)
    np.testing.assert_allclose(np.array(batch["target"]), wanted, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.array(batch["weight"]), 1 + (alpha / sigma) ** 2, rtol=1e-4)
    np.testing.assert_array_equal(np.array(batch["labels"]), np.array(seen["labels"]))
    assert set(batch) == {"z", "t", "target", "weight", "labels"}


def test_a_walk_has_another_leg_at_another_step(part: Split, tmp_path: Path) -> None:
    walks = walk(part, tmp_path)
    assert len({tuple(walks.legs(step, 8, 4)[1]) for step in range(5)}) == 5


def test_every_walk_comes_once_in_as_many_steps_as_go_through_all(part: Split, tmp_path: Path) -> None:
    walks = walk(part, tmp_path)
    for seen in (
        [walks.legs(step, 5, 1)[0]["z"] for step in (0, 1)], [walks.pairs(step, 5, 1)["noise"] for step in (0, 1)]
    ):  # fmt: skip
        np.testing.assert_array_equal(
            np.sort(np.concatenate(seen).reshape(10, -1), axis=0), np.sort(walks.states[:, 0].reshape(10, -1), axis=0)
        )


def test_each_walk_has_a_noise_of_its_own_and_the_label_that_the_teacher_was_told(
    part: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the second piece of what is walked, and the third, which is smaller."""
    monkeypatch.setattr(module, "AT_ONCE", 4)

    def denoising(labels: Sequence[mx.array]) -> Denoiser:
        told = labels[0].astype(mx.float32)[:, None, None, None]
        return lambda z, t: mx.broadcast_to(told, z.shape)  # an image that is its label

    walks = walked(denoising, TIMES, uniform(10), "ddim", 10, part, SCHEDULE, 0, tmp_path, SILENT)
    assert walks.labels is not None
    np.testing.assert_allclose(walks.states[:, -1, 0, 0, 0], walks.labels, atol=1e-5)
    assert len(np.unique(walks.states[:, 0, 0, 0, 0])) == 10
    other = walked(denoising, TIMES, uniform(10), "ddim", 10, part, SCHEDULE, 1, tmp_path / "other", SILENT)
    assert other.labels is not None
    assert not np.array_equal(other.labels, walks.labels)  # drawn, not the first of the part


def test_pairs_are_the_ends_of_a_walk_and_come_in_another_order_than_legs(part: Split, tmp_path: Path) -> None:
    walks = walk(part, tmp_path)
    pairs, (legs, _) = walks.pairs(0, 10, 1), walks.legs(0, 10, 1)
    rows = [int(np.flatnonzero((walks.states[:, 0] == z).all(axis=(1, 2, 3)))[0]) for z in np.array(pairs["noise"])]
    assert sorted(rows) == list(range(10))
    np.testing.assert_array_equal(np.array(pairs["end"]), walks.states[rows, -1])
    assert walks.labels is not None
    np.testing.assert_array_equal(np.array(pairs["labels"]), walks.labels[rows])
    assert not np.array_equal(np.array(legs["z"]), np.array(pairs["noise"]))


def test_where_there_are_no_classes_there_are_no_labels(part: Split, tmp_path: Path) -> None:
    asked: list[int] = []

    def denoising(labels: Sequence[mx.array]) -> Denoiser:
        asked.append(len(labels))
        return bent

    walks = walked(
        denoising, TIMES, uniform(10), "ddim", 3, replace(part, num_classes=0), SCHEDULE, 0, tmp_path, SILENT
    )  # fmt: skip
    assert asked == [0]
    assert set(walks.legs(0, 8, 2)[0]) == {"z", "end"}  # more than there are walks
    assert set(walks.pairs(0, 8, 2)) == {"noise", "end"}


def test_labels_are_as_frequent_as_in_the_train_part(part: Split, tmp_path: Path) -> None:
    labels = walk(part, tmp_path, count=len(part)).labels
    assert labels is not None
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(part.labels))


def test_what_was_walked_is_kept_and_what_is_damaged_is_walked_anew(
    part: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 4)
    whole = walk(part, tmp_path / "whole")
    asked: list[int] = []

    def denoise(z: mx.array, t: mx.array) -> mx.array:
        asked.append(len(z))
        return bent(z, t)

    def again(report: object) -> Walks:
        asked.clear()
        return walked(
            lambda _: denoise, TIMES, uniform(10), "ddim", 10, part, SCHEDULE, 0, tmp_path / "stopped", report,  # type: ignore[arg-type]
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        again(StopWhen(lambda: len(asked) >= 20))
    assert asked == [4] * 20
    (tmp_path / "stopped" / "walks-00000000.safetensors").write_bytes(b"half a file")
    recorder = Recorder()
    resumed = again(recorder)
    assert asked == [4] * 10 + [2] * 10  # the damaged one and the last; the second was there
    np.testing.assert_array_equal(resumed.states, whole.states)
    assert [(done, total) for done, total, _ in recorder.steps] == [(4, 10), (8, 10), (10, 10)]


def test_what_is_readable_and_not_of_these_walks_is_walked_anew(part: Split, tmp_path: Path) -> None:
    whole = walk(part, tmp_path).states
    path = tmp_path / "walks-00000000.safetensors"
    kept = path.read_bytes()
    flipped = bytearray(kept)
    flipped[-2] ^= 1  # a bit of the last number: a readable file of the right shape
    path.write_bytes(bytes(flipped))
    np.testing.assert_array_equal(walk(part, tmp_path).states, whole)
    walk(part, tmp_path, count=7)
    assert len(load_arrays(path)["states"]) == 7
    np.testing.assert_array_equal(walk(part, tmp_path).states, whole)
    save_arrays(path, {"others": whole})
    np.testing.assert_array_equal(walk(part, tmp_path).states, whole)
    assert path.read_bytes() == kept


def test_walks_depend_on_the_seed(part: Split, tmp_path: Path) -> None:
    assert not np.array_equal(walk(part, tmp_path / "0").states, walk(part, tmp_path / "1", seed=1).states)


def test_a_walk_to_nowhere_is_named(part: Split, tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match="10 steps of ddim"):
        walked(lambda _: lambda z, t: z * mx.inf, TIMES, uniform(10), "ddim", 3, part, SCHEDULE, 0, tmp_path, SILENT)
    assert not list(tmp_path.iterdir())


def rows_of(walks: Walks, noise: np.ndarray) -> np.ndarray:
    """Which walks begin in these noises."""
    return np.array([int(np.flatnonzero((walks.states[:, 0] == z).all(axis=(1, 2, 3)))[0]) for z in noise])


@pytest.mark.parametrize("purpose", ["legs", "pairs"])
def test_of_what_a_step_sees_the_teachers_walks_have_their_share_each_once_an_epoch(
    part: Split, tmp_path: Path, purpose: str
) -> None:
    teachers, others = walk(part, tmp_path / "a", 9), walk(part, tmp_path / "b", 30, seed=1)
    both = teachers.and_those_of(others, 0.25)
    seen = [both.legs(step, 12, 1)[0]["z"] if purpose == "legs" else both.pairs(step, 12, 1)["noise"]
            for step in range(30)]  # fmt: skip
    rows = np.stack([rows_of(both, np.array(noise)) for noise in seen])
    np.testing.assert_array_equal(np.sum(rows < 9, axis=1), 3)
    assert Counter(rows[rows < 9].tolist()) == dict.fromkeys(range(9), 10)
    assert Counter(rows[rows >= 9].tolist()) == dict.fromkeys(range(9, 39), 9)


def test_legs_do_not_depend_on_whose_walk_it_is(part: Split, tmp_path: Path) -> None:
    both = walk(part, tmp_path / "a", 9).and_those_of(walk(part, tmp_path / "b", 30, seed=1), 0.25)
    found: Counter[tuple[bool, int]] = Counter()
    for step in range(100):
        batch, leg = both.legs(step, 12, 2)
        begins = np.array(batch["z"])
        own = [
            bool((both.states[:9, number] == z).all(axis=(1, 2, 3)).any())
            for z, number in zip(begins, leg * 2, strict=True)
        ]
        assert Counter(leg.tolist()) == {0: 6, 1: 6}
        found.update(zip(own, leg.tolist(), strict=True))
    assert min(found[True, 0], found[True, 1]) > 120
    assert min(found[False, 0], found[False, 1]) > 400


def test_without_a_share_all_come_up_alike(part: Split, tmp_path: Path) -> None:
    both = walk(part, tmp_path / "a", 9).and_those_of(walk(part, tmp_path / "b", 30, seed=1))
    rows = rows_of(both, np.concatenate([both.pairs(step, 13, 1)["noise"] for step in range(3)]))
    assert Counter(rows.tolist()) == dict.fromkeys(range(39), 1)
