"""Legs of walks that are drawn by how far off a student was on them."""

from typing import Any

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.errors import ArtifactError
from ado_tasks.optimise.priorities import FLOOR, LOSSES, ROWS, WAITING, Priorities, PrioritisedStep
from ado_tasks.optimise.steps import TrainStep
from ado_tasks.optimise.walks import Walks

COUNT, SIZE, LEGS = 6, 4, 2
FIRST = COUNT * LEGS // SIZE  # steps in which every walk comes up as often as there are legs


def some_walks(count: int = COUNT) -> Walks:
    """With states that tell walk and place: 10 · row + place."""
    states = 10.0 * np.arange(count)[:, None] + np.arange(LEGS + 1)[None]
    return Walks((1.0, 0.7, 0.0), states.reshape(count, LEGS + 1, 1, 1, 1).astype(np.float32), None, 0)


def loss(parameters: Any, batch: Any) -> mx.array:
    """Of each image: (w z − end)², of one weight w."""
    return mx.mean(mx.square(parameters["w"] * batch["z"] - batch["end"]), axis=(1, 2, 3))


def new_step(walks: Walks, exponent: float = 1.0) -> PrioritisedStep:
    step = TrainStep(loss, {"w": mx.array([1.0])}, clip=1e9, ema_decay=None, shards=2, of_each=True)
    return PrioritisedStep(step, Priorities(walks, LEGS, exponent))


def take(step: PrioritisedStep, walks: Walks, number: int) -> tuple[np.ndarray, np.ndarray]:
    rows, legs = step.draw(number, SIZE)
    step(walks.legs(rows, legs, LEGS), 1e-2)
    return rows, legs


def test_at_first_all_walks_come_up_alike() -> None:
    walks = some_walks()
    priorities = Priorities(walks, LEGS, 1.0)
    priorities.losses[:] = np.arange(COUNT)
    for step in range(FIRST):
        for own, alike in zip(priorities.draw(step, SIZE), walks.rows_and_legs(step, SIZE, LEGS), strict=True):
            np.testing.assert_array_equal(own, alike)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_then_as_often_as_the_power_of_the_loss_says(exponent: float) -> None:
    """Each leg by its own losses, over their mean; one that was not met yet counts as the mean."""
    priorities = Priorities(some_walks(), LEGS, exponent)
    priorities.losses[0] = [0, 1, 1, 2, 6, np.nan]
    priorities.losses[1] = [3, 3, 3, 3, 3, 0]
    found = np.zeros((LEGS, COUNT))
    steps = range(FIRST, FIRST + 4000)
    for step in steps:
        rows, legs = priorities.draw(step, SIZE)
        assert sorted(legs) == [0, 0, 1, 1]
        np.add.at(found, (legs, rows), 1)
    for leg, relative in enumerate(([0, 0.5, 0.5, 1, 3, 1], [1.2, 1.2, 1.2, 1.2, 1.2, 0])):
        wanted = (np.array(relative) + FLOOR) ** exponent
        np.testing.assert_allclose(found[leg] / (2 * len(steps)), wanted / wanted.sum(), atol=0.015)


def test_each_kind_of_walks_keeps_its_share_and_has_priorities_of_its_own() -> None:
    """The teacher's two walks have come up often enough at once; the other six of a student not before step 3."""
    walks = some_walks(2).and_those_of(some_walks(6), 0.5)
    priorities = Priorities(walks, LEGS, 1.0)
    priorities.losses[:] = [5, 0, 1, 1, 1, 1, 1, 4]
    found = np.zeros(8)
    for step in range(2, 4002):
        rows, legs = priorities.draw(step, 8)
        assert np.sum(rows < 2) == 4
        assert sorted(legs) == [0] * 4 + [1] * 4
        if step < 3:
            np.testing.assert_array_equal(rows[rows >= 2], walks.rows_and_legs(step, 8, LEGS)[0][4:])
        np.add.at(found, rows, 1)
    relative = np.concatenate([np.array([5, 0]) / 2.5, np.array([1, 1, 1, 1, 1, 4]) / 1.5]) + FLOOR
    wanted = np.concatenate([relative[:2] / relative[:2].sum(), relative[2:] / relative[2:].sum()]) / 2
    np.testing.assert_allclose(found / found.sum(), wanted, atol=0.01)


def test_with_no_loss_known_or_all_zero_all_come_up() -> None:
    for losses in (np.nan, 0.0):
        priorities = Priorities(some_walks(), LEGS, 1.0)
        priorities.losses[:] = losses
        assert {row for step in range(FIRST, FIRST + 50) for row in priorities.draw(step, SIZE)[0]} == set(range(COUNT))


def test_what_is_remembered_is_the_loss_of_that_leg_before_the_step_one_step_late() -> None:
    walks, seen = some_walks(), []
    step = new_step(walks)
    for number in range(5):
        w = float(np.array(step.parameters()["w"])[0])
        rows, legs = take(step, walks, number)
        z, end = walks.states[rows, legs].ravel(), walks.states[rows, legs + 1].ravel()
        seen.append((rows, legs, (w * z - end) ** 2))
    wanted = np.full((LEGS, COUNT), np.nan, np.float32)
    for rows, legs, losses in seen[:-1]:
        wanted[legs, rows] = losses
    state = step.state
    np.testing.assert_allclose(np.array(state[LOSSES]), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(state[WAITING]), seen[-1][2], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.array(state[ROWS]), seen[-1][0])


@pytest.mark.parametrize("at", [1, FIRST, FIRST + 3])
def test_from_a_checkpoint_it_draws_and_learns_as_if_it_had_not_stopped(at: int) -> None:
    walks = some_walks()
    whole, again = new_step(walks), new_step(walks)
    for number in range(at):
        take(whole, walks, number)
    again.load({name: mx.array(np.array(array)) for name, array in whole.state.items()})
    for number in range(at, at + 6):
        one, other = take(whole, walks, number), take(again, walks, number)
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert set(whole.state) == set(again.state)
    for name, array in whole.state.items():
        np.testing.assert_array_equal(np.array(again.state[name]), np.array(array), err_msg=name)


@pytest.mark.parametrize("lost", [LOSSES, ROWS])
def test_a_checkpoint_of_other_walks_or_with_a_part_gone_is_refused(lost: str) -> None:
    walks = some_walks()
    step = new_step(walks)
    take(step, walks, 0)
    state = step.state
    with pytest.raises(ArtifactError, match="priorities are not of these walks"):
        new_step(some_walks(COUNT + 1)).load(state)
    with pytest.raises(ArtifactError, match="priorities are not of these walks"):
        new_step(walks).load({name: array for name, array in state.items() if name != lost})


def test_that_losses_are_kept_changes_no_bit_of_a_step() -> None:
    batch = {name: mx.random.normal((5, 2, 2, 1), key=rng.key(0, name)) for name in ("z", "end")}
    kept = TrainStep(loss, {"w": mx.array([1.0])}, clip=1.0, ema_decay=None, shards=2, of_each=True)
    plain = TrainStep(
        lambda *given: mx.mean(loss(*given)), {"w": mx.array([1.0])}, clip=1.0, ema_decay=None, shards=2
    )  # fmt: skip
    for _ in range(3):
        before = np.array(loss(kept.parameters(), batch))
        one, other = kept(batch, 1e-2), plain(batch, 1e-2)
        assert float(one) == float(other)
        np.testing.assert_allclose(np.array(kept.of_each), before, rtol=1e-6)
    for name, array in plain.state.items():
        np.testing.assert_array_equal(np.array(kept.state[name]), np.array(array))


def test_losses_are_not_kept_of_a_batch_in_pieces() -> None:
    with pytest.raises(ValueError, match="accumulate 1"):
        TrainStep(loss, {"w": mx.array([1.0])}, clip=1.0, ema_decay=None, accumulate=2, of_each=True)
