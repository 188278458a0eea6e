"""The hardware-aware choice: known optima, ties, budgets that cannot be kept and what would do instead."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ado_tasks.errors import BudgetError, StatisticsError
from ado_tasks.optimise.choice import LIMITS, Budget, StepCost, Way, at_every_batch, choose

COSTS = [  # a network whose batches of 64 are efficient, and of 256 no more so; ipndm adds arithmetic of its own
    StepCost("ddim", 1, 1.0, 4.0), StepCost("ddim", 64, 2.0, 32.0), StepCost("ddim", 256, 8.0, 128.0),
    StepCost("ipndm", 1, 1.0, 4.5), StepCost("ipndm", 64, 2.0, 35.0),
]  # fmt: skip
WAYS = at_every_batch(
    [
        Way("teacher-50", "ddim", 50, kid=0.0), Way("student-2", "ddim", 2, kid=0.004),
        Way("student-1", "ddim", 1, kid=0.018), Way("ipndm-8", "ipndm", 8, distance=0.0006),
        Way("ddim-8", "ddim", 8, distance=0.0016), Way("ddim-4", "ddim", 4, distance=0.0099),
    ],
    COSTS,
)  # fmt: skip


def test_a_way_costs_a_fixed_part_and_each_step_at_each_batch_of_its_solver() -> None:
    assert len(WAYS) == 5 * 3 + 2
    by = {(way.name, way.batch): way for way in WAYS}
    assert by["student-2", 64].ms_per_batch == 2 + 2 * 32
    assert by["student-2", 64].ms_per_image == (2 + 2 * 32) / 64
    assert by["ipndm-8", 1].ms_per_batch == 1 + 8 * 4.5
    assert StepCost("ddim", 1, -0.5, 4.0).ms_per_batch(2) == 8.0  # a fixed part below 0 is noise


@pytest.mark.parametrize(
    ("budget", "name", "batch"),
    [
        (Budget(kid=0.021), "student-1", 64),  # the cheapest that is good enough, in the batch that is cheapest
        (Budget(kid=0.01), "student-2", 64),
        (Budget(kid=0.001), "teacher-50", 64),
        (Budget(kid=0.021, ms_per_batch=10.0), "student-1", 1),  # a batch of 64 would not be there in time
        (Budget(ms_per_image=1.1), "student-2", 64),  # the best that is cheap enough
        (Budget(ms_per_image=0.6), "student-1", 64),
        (Budget(ms_per_image=100.0), "teacher-50", 64),
        (Budget(ms_per_batch=10.0), "student-2", 1),
        (Budget(ms_per_image=5.0, quality="distance"), "ipndm-8", 64),
        (Budget(ms_per_image=4.1, quality="distance"), "ddim-8", 64),
        (Budget(distance=0.002), "ddim-8", 64),
        (Budget(distance=0.001), "ipndm-8", 64),
        (Budget(distance=0.01), "ddim-4", 64),
    ],
)
def test_the_known_optimum_is_chosen(budget: Budget, name: str, batch: int) -> None:
    found = choose(WAYS, budget, tolerance=0.05)
    assert (found.way.name, found.way.batch) == (name, batch)


def test_another_machine_another_choice() -> None:
    slow_arithmetic = at_every_batch(
        [Way("ipndm-6", "ipndm", 6, distance=0.0016), Way("ddim-8", "ddim", 8, distance=0.0016)],
        [StepCost("ddim", 64, 0.0, 1.0), StepCost("ipndm", 64, 0.0, 1.5)],
    )  # fmt: skip
    large_network = at_every_batch(
        [Way("ipndm-6", "ipndm", 6, distance=0.0016), Way("ddim-8", "ddim", 8, distance=0.0016)],
        [StepCost("ddim", 64, 0.0, 100.0), StepCost("ipndm", 64, 0.0, 100.5)],
    )  # fmt: skip
    budget = Budget(distance=0.002)
    assert choose(slow_arithmetic, budget).way.name == "ddim-8"
    assert choose(large_network, budget).way.name == "ipndm-6"


def test_of_equal_costs_the_better_then_fewer_evaluations_then_the_smaller_batch() -> None:
    def way(name: str, kid: float, nfe: int, batch: int, ms_per_image: float = 1.0) -> Way:
        return Way(name, "ddim", nfe, kid=kid, batch=batch, ms_per_batch=ms_per_image * batch)

    budget = Budget(kid=0.5)
    assert choose([way("a", 0.2, 2, 8), way("b", 0.1, 4, 8, 1.02)], budget, 0.03).way.name == "b"
    assert choose([way("a", 0.2, 2, 8), way("b", 0.1, 4, 8, 1.02)], budget, 0.01).way.name == "a"
    assert choose([way("a", 0.1, 4, 8), way("b", 0.1, 2, 64)], budget).way.name == "b"
    assert choose([way("a", 0.1, 2, 64), way("b", 0.1, 2, 8)], budget).way.name == "b"
    assert choose([way("b", 0.1, 2, 8), way("a", 0.1, 2, 8)], budget).way.name == "a"  # whatever their order
    assert choose([way("a", 0.1, 2, 64), way("b", 0.1, 2, 8, 1.02)], Budget(ms_per_image=2.0)).way.name == "b"


@pytest.mark.parametrize(
    ("budget", "suggested"),
    [
        (Budget(ms_per_image=0.1), {"ms an image": 0.531}),
        (Budget(ms_per_batch=4.0), {"ms a batch": 5.0}),
        (Budget(kid=0.003, ms_per_image=5.0), {"KID − teacher (upper end)": 0.004, "ms an image": 25.1}),
    ],
)
def test_a_budget_that_nothing_keeps_is_named_with_the_least_that_would_do(
    budget: Budget, suggested: dict[str, float]
) -> None:
    with pytest.raises(BudgetError) as problem:
        choose(WAYS, budget)
    found = dict(re.findall(r"(?:do: |or )(.*?) ≤ ([\d.e-]+)", str(problem.value)))
    assert {name: float(value) for name, value in found.items()} == pytest.approx(suggested, rel=5e-3)
    names = {text: name for name, text in LIMITS.items()}
    for text, value in found.items():  # each suggestion, the rest as it is, does
        choose(WAYS, replace(budget, **{names[text]: float(value)}))


def test_where_no_single_limit_can_be_given_up_that_is_said() -> None:
    ways = [
        Way("a", "ddim", 1, kid=0.9, batch=1, ms_per_batch=1.0), Way("b", "ddim", 9, kid=0.1, batch=4, ms_per_batch=36)
    ]  # fmt: skip
    with pytest.raises(BudgetError, match=r"nor with any one of these given up; each alone: ms an image 1, .* 0\.1"):
        choose(ways, Budget(kid=0.05, ms_per_image=0.5))


def test_what_nobody_measured_is_not_chosen_by() -> None:
    with pytest.raises(StatisticsError, match="distance"):
        choose([Way("a", "ddim", 1, kid=0.1)], Budget(ms_per_image=1.0, quality="distance"))
    apart = [Way("a", "ddim", 1, kid=0.1), Way("b", "ddim", 2, distance=0.1)]
    with pytest.raises(StatisticsError, match="kid and distance: known of no way"):
        choose(apart, Budget(kid=0.5, distance=0.5))
    unknown = [Way("a", "ddim", 1), Way("b", "ddim", 2, kid=0.1, ms_per_batch=9.0)]
    assert choose(unknown, Budget(kid=0.5)).way.name == "b"


LEVELS = st.sampled_from([0.5, 1.0, 1.01, 2.0, 4.0])
RANDOM_WAYS = st.lists(
    st.builds(
        lambda kid, nfe, batch, ms: Way("w", "ddim", nfe, kid=kid, batch=batch, ms_per_batch=ms * batch),
        LEVELS, st.integers(1, 4), st.sampled_from([1, 8]), LEVELS,
    ),
    min_size=1, max_size=8,
)  # fmt: skip


@given(RANDOM_WAYS, st.none() | LEVELS, st.none() | LEVELS, st.none() | LEVELS)
def test_it_is_what_brute_force_over_the_definition_finds(
    ways: list[Way], per_image: float | None, per_batch: float | None, kid: float | None
) -> None:
    budget = Budget(ms_per_image=per_image, ms_per_batch=per_batch, kid=kid)
    able = [way for way in ways if all((way.value(name) or 0.0) <= most for name, most in budget.limits().items())]
    if not able:
        with pytest.raises(BudgetError):
            choose(ways, budget)
        return
    found = choose(ways, budget, tolerance=0.03).way
    assert found in able
    least = min(way.value("kid") or 0.0 for way in able)
    best = able if kid is not None else [way for way in able if way.kid == least]
    assert found in best
    assert found.ms_per_image <= 1.03 * min(way.ms_per_image for way in best)
