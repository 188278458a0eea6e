"""What is chosen, who survives, what is proposed: against definitions, and against enumeration of a space."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ado_tasks import rng
from ado_tasks.architecture.choice import Measured, Policy, choose, dominates, fronts, objective, pareto_front
from ado_tasks.architecture.cost import multiply_adds
from ado_tasks.architecture.propose import Tried, can_win, propose
from ado_tasks.architecture.race import Lane, RaceConfig, survivors
from ado_tasks.architecture.space import Point, Space, SpaceConfig
from ado_tasks.architecture.surrogate import expected_gain
from ado_tasks.config import parse
from ado_tasks.errors import ConfigError
from ado_tasks.models.unet_config import UNet2DConfig

TEACHER = UNet2DConfig(
    sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=2, attention_head_dim=8,
)  # fmt: skip
CHOICES = SpaceConfig(
    channels=((8, 16), (16, 24, 32)), layers_per_block=(1, 2), attention=((), (1,)), middle=("none", "attention")
)
SPACE = Space.around(TEACHER, CHOICES)

figures = st.integers(0, 3).map(float)
candidates = st.lists(st.tuples(figures, figures, figures), min_size=1, max_size=12).map(
    lambda rows: [Measured(f"{number:02d}", *row) for number, row in enumerate(rows)]
)


@given(candidates)
def test_the_front_is_what_nothing_dominates(everyone: list[Measured]) -> None:
    front = pareto_front(everyone)
    assert {each.name for each in front} == {
        each.name for each in everyone if not any(dominates(other, each) for other in everyone)
    }
    assert all(any(dominates(best, each) for best in front) for each in everyone if each not in front)
    assert sorted(each.name for layer in fronts(everyone) for each in layer) == [each.name for each in everyone]


def test_a_front_by_hand() -> None:
    """As good in all but one, and worse in that, is dominated; equal ones are not."""
    rows = {"a": (1.0, 1.0, 2.0), "b": (1.0, 1.0, 1.0), "c": (2.0, 0.5, 1.0), "d": (1.0, 1.0, 1.0)}
    assert [each.name for each in pareto_front([Measured(name, *row) for name, row in rows.items()])] == ["c", "b", "d"]


@given(candidates, st.integers(1, 12), st.randoms())
def test_survivors_do_not_depend_on_the_order(everyone: list[Measured], count: int, random) -> None:
    going = survivors(everyone, count)
    shuffled = everyone[:]
    random.shuffle(shuffled)
    assert survivors(shuffled, count) == going
    assert len(going) == min(count, len(everyone))
    assert not any(dominates(out, into) for into in going for out in everyone if out not in going)


def test_of_those_that_are_good_enough_only_the_fastest_goes_before_others() -> None:
    everyone = [
        Measured("as the teacher", 0.001, 6.0), Measured("near it", 0.01, 5.0), Measured("enough", 0.15, 4.0),
        Measured("half", 0.5, 2.5), Measured("tiny", 1.2, 1.0),
    ]  # fmt: skip
    plain = {each.name for each in survivors(everyone, 3)}
    assert plain == {"as the teacher", "near it", "enough"}  # by the product of loss and cost
    going = survivors(everyone, 3, good_enough=0.2)
    assert {each.name for each in going} == {"enough", "half", "tiny"}
    assert going[0] == everyone[2]  # the product of 0.2 and 4; what is handed on has its own loss
    assert {each.name for each in survivors(everyone, 4, 0.2)} == {"enough", "half", "tiny", "near it"}


@given(candidates, st.integers(1, 6))
def test_a_limit_that_nobody_is_within_changes_nothing(everyone: list[Measured], count: int) -> None:
    worse = [replace(each, quality_loss=each.quality_loss + 1) for each in everyone]
    assert survivors(worse, count, 0.5) == survivors(worse, count)


def test_what_is_not_finite_does_not_survive() -> None:
    everyone = [Measured("a", math.nan, 1.0), Measured("b", 1.0, 1.0), Measured("c", math.inf, 0.5)]
    assert [each.name for each in survivors(everyone, 3)] == ["b"]


def test_the_policy_chooses_the_fastest_within_the_limits() -> None:
    everyone = [Measured("fast", 0.5, 1.0, 9.0), Measured("good", 0.1, 2.0, 9.0), Measured("small", 0.2, 3.0, 4.0)]
    assert choose(everyone, Policy(max_quality_loss=0.2)) == everyone[1]
    assert choose(everyone, Policy(max_quality_loss=0.2, max_peak_memory_mb=5.0)) == everyone[2]
    assert choose(everyone, Policy(max_quality_loss=0.6)) == everyone[0]
    assert choose(everyone, Policy(max_quality_loss=0.05)) is None
    assert choose([Measured("nan", math.nan, 1.0)], Policy()) is None


@given(st.lists(st.tuples(st.floats(1e-3, 10), st.floats(0.5, 2)), min_size=1, max_size=10))
def test_the_least_objective_is_the_policys_choice(rows: list[tuple[float, float]]) -> None:
    policy = Policy(max_quality_loss=0.3)
    everyone = [Measured(f"{number:02d}", *row) for number, row in enumerate(rows)]
    chosen = choose(everyone, policy)
    if chosen is not None and not any(0.3 < each.quality_loss < 0.35 for each in everyone):
        assert min(objective(each, policy) for each in everyone) == objective(chosen, policy)


def test_lanes_are_counted_through_the_rungs() -> None:
    race = RaceConfig(sizes=(4, 2, 1), steps=(10, 20, 40), unguided=2)
    assert [Lane.of(number, race) for number in (0, 3, 4, 6)] == [Lane(0, 0), Lane(0, 3), Lane(1, 0), Lane(2, 0)]
    with pytest.raises(ValueError, match="beyond the race's 7 lanes"):
        Lane.of(7, race)
    assert race.total_steps() == 120
    assert race.evaluations() == pytest.approx(120 / 70)
    for wrong in ({"sizes": [2, 4]}, {"steps": [1]}, {"unguided": 20}):
        with pytest.raises(ConfigError, match=r"probe\.race"):
            parse(RaceConfig, wrong, "probe.race")


def test_the_space_has_what_is_a_network_and_can_inherit() -> None:
    points = list(SPACE.points())
    assert len(points) == len(set(points)) == 5 * 2 * 2 * 2  # of 3 × 2 widths (16, 16) has no projection
    widest = SPACE.candidate((1, 2, 1, 1, 0, 1))
    assert widest.block_out_channels == TEACHER.block_out_channels
    assert widest.down_block_types == TEACHER.down_block_types and widest.add_attention
    with pytest.raises(ConfigError, match="equally wide"):
        SPACE.candidate((1, 0, 0, 0, 0, 0))
    with pytest.raises(ConfigError, match="choice 9; allowed: 0 to 1"):
        SPACE.candidate((9, 0, 0, 0, 0, 0))
    uneven = Space.around(TEACHER, SpaceConfig(channels=((16,), (20, 24))))
    with pytest.raises(ConfigError, match="norm groups do not divide 20 channels"):
        uneven.candidate((0, 0, 0, 0, 0, 0))
    for wrong, message in (
        (SpaceConfig(channels=((8,),)), "choices for each of 2 levels"),
        (SpaceConfig(attention=((2,),)), "levels from 0 to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            Space.around(TEACHER, wrong)


def test_multiply_adds_are_those_of_a_small_network_by_hand() -> None:
    """One level of 4 channels, 8×8 pixels, a middle with attention: every layer's pixels × numbers, by hand."""
    network = UNet2DConfig(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), layers_per_block=1, norm_num_groups=2, attention_head_dim=None,
    )  # fmt: skip
    pixels, conv = 64, 9 * 4 * 4
    time = 4 * 16 + 16 * 16 + 5 * 16 * 4  # the embedding, and a projection in each of five blocks
    images = 2 * 9 * 4 + 3 * 2 * conv + 2 * (2 * conv + conv + 2 * 4 * 4)  # in, out; down, middle ×2; up ×2
    attention = 4 * 4 * 4 * pixels + 2 * pixels**2 * 4
    assert multiply_adds(network, 8, 8) == time + pixels * images + attention


def synthetic(point: Point) -> Measured:
    """Losses that fall and costs that rise with everything, as those of real candidates by and large."""
    network = SPACE.candidate(point)
    cost = float(multiply_adds(network, 8, 8))
    noise = rng.generator(0, "race", *point).standard_normal()
    small = sum(32 / width for width in network.block_out_channels) + 2 / network.layers_per_block
    return Measured(str(point), 0.02 * small**1.5 * math.exp(0.05 * noise), cost)


def test_proposals_are_new_seeded_and_can_win() -> None:
    points = list(SPACE.points())
    cost = {point: synthetic(point).cost for point in points}
    tried = [Tried(point, synthetic(point)) for point in points[:6]]
    policy = Policy(max_quality_loss=0.2)
    before = repr(np.random.get_state())  # noqa: NPY002
    first = propose(SPACE, points, cost, tried, policy, 4, 0)
    assert first == propose(SPACE, points, cost, tried, policy, 4, 0)
    assert first != propose(SPACE, points, cost, tried, policy, 4, 1)
    assert len(set(first)) == 4 and not {each.point for each in tried} & set(first)
    assert all(can_win(point, cost, tried, policy) for point in first)
    assert repr(np.random.get_state()) == before  # noqa: NPY002
    assert len(set(propose(SPACE, points, cost, tried, None, 99, 0))) == len(points) - 6


def test_what_cannot_win_is_left_out() -> None:
    points = list(SPACE.points())
    cost = {point: synthetic(point).cost for point in points}
    policy, least = Policy(max_quality_loss=0.2), min(points, key=lambda point: cost[point])
    good = [Tried(least, Measured("s", 0.1, cost[least]))]  # the cheapest is good enough: nothing else can be faster
    assert propose(SPACE, points, cost, good, policy, 4, 0) == []
    bad = [Tried(least, Measured("s", 0.3, cost[least]))]
    assert len(propose(SPACE, points, cost, bad, policy, 99, 0)) == len(points) - 1


def test_the_guess_is_a_bayesian_regression() -> None:
    """Of losses that are a power of the width exactly, a point between is known; far limits make it sure."""
    points = [point for point in SPACE.points() if point[2:] == (0, 0, 0, 0)]
    cost = dict.fromkeys(SPACE.points(), 1.0) | {point: 0.1 for point in points}
    tried = [(point, 4.0 / SPACE.values(point)["channels.1"]) for point in points]
    gains = expected_gain(SPACE, points, cost, tried, limit=1e3)
    assert gains == pytest.approx(0, abs=1e-9)  # nothing is cheaper than what is within the limit
    gains = expected_gain(SPACE, points, cost, tried, limit=1e-6)  # nothing is within: the dearest stands for the best
    assert gains == pytest.approx(0, abs=1e-6)
    (middle,) = [point for point in points if SPACE.values(point)["channels.1"] == 24 and point[0] == 0]
    others = [(point, loss) for point, loss in tried if point != middle]
    cost[middle] = 0.05
    gain = expected_gain(SPACE, [middle], cost, others, limit=4.0 / 24)[0]
    assert 0.3 < gain / math.log(0.1 / 0.05) < 0.7  # the limit is just what is expected: as likely as not


def test_the_search_finds_the_optimum_of_an_enumeration() -> None:
    points = list(SPACE.points())
    cost = {point: synthetic(point).cost for point in points}
    policy = Policy(max_quality_loss=0.25)
    best = choose([synthetic(point) for point in points], policy)
    assert best is not None
    found = 0
    for seed in range(10):
        tried: list[Tried] = []
        while len(tried) < 0.4 * len(points) and not any(each.measured == best for each in tried):
            tried += [Tried(point, synthetic(point)) for point in propose(SPACE, points, cost, tried, policy, 1, seed)]
        found += any(each.measured == best for each in tried)
    assert found >= 9
