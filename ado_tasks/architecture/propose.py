"""Which points of a space to try next: Optuna's tree-structured Parzen estimator, kept to what can still win.

Bergstra et al. 2011; Optuna: Akiba et al. 2019. What a candidate costs is known before it is tuned, and a network that
is smaller in everything loses no less: points that cannot be chosen any more are not proposed (see `can_win`).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ado_tasks import rng
from ado_tasks.architecture.choice import Measured, Policy, allowed, logarithm, objective
from ado_tasks.architecture.space import Point, Space

ASKS = 20  # of the sampler for each point wanted; then the points left over are taken in a seeded order
STARTUP = 4  # points at random before the estimator has something to go by


@dataclass(frozen=True)
class Tried:
    """A point, and what came of it."""

    point: Point
    measured: Measured


def propose(
    space: Space, points: Sequence[Point], cost: Mapping[Point, float], tried: Sequence[Tried], policy: Policy | None,
    count: int, seed: int,
) -> list[Point]:  # fmt: skip
    """Up to `count` points, none of them tried, none that cannot win any more. The same arguments give the same ones.

    Args:
        space: names the dimensions.
        points: those of the space that are networks.
        cost: of each of them: milliseconds measured or predicted, or multiply-adds.
        tried: in the order in which they were.
        policy: what is wanted; none, where losses are not final and no limit can be held against them: the estimator
            then goes for the Pareto front of loss and cost, and every point may still win.
        count: how many at a time; fewer are returned where fewer are left.
        seed: of the sampler.
    """
    from optuna.trial import TrialState  # noqa: PLC0415  (seconds, which only a proposal should cost)

    known = {each.point for each in tried}
    left = [
        point
        for point in points
        if point not in known and (policy is None or can_win(point, space, cost, tried, policy))
    ]
    study = _study(space, tried, policy, rng.derive(seed, "propose", len(tried)) % 2**32)
    chosen: list[Point] = []
    for _ in range(ASKS * count):
        if len(chosen) == count or not set(left) - set(chosen):
            return chosen
        trial = study.ask()
        point = tuple(trial.suggest_int(name, 0, len(each) - 1) for name, each in space.dimensions.items())
        if point in left and point not in chosen:
            chosen.append(point)
        else:
            study.tell(trial, state=TrialState.FAIL)
    spare = [point for point in left if point not in chosen]
    order = rng.generator(seed, "propose", "spare", len(tried)).permutation(len(spare))
    return [*chosen, *(spare[place] for place in order[: count - len(chosen)])]


def can_win(point: Point, space: Space, cost: Mapping[Point, float], tried: Sequence[Tried], policy: Policy) -> bool:
    """Whether the policy might still choose a point.

    Not where one within the limits is as fast, nor where one that is larger in everything is beyond the limit: smaller
    networks inherit less, and are taken to lose no less. (bench/search_small_space.py counts how often that is wrong.)
    """
    for each in tried:
        if each.point == point:
            return False
        if allowed(each.measured, policy):
            if cost[point] >= cost[each.point]:
                return False
        elif each.measured.quality_loss > policy.max_quality_loss and smaller(point, each.point, space):
            return False
    return True


def smaller(point: Point, other: Point, space: Space) -> bool:
    """Whether a network is no larger than another in every dimension."""
    mine, theirs = space.values(point), space.values(other)
    middle = ("none", "plain", "attention")
    for name, value in mine.items():
        if name == "attention":
            less = set(value) <= set(theirs[name])
        elif name == "attention_head_dim":
            less = value == theirs[name]
        elif name == "middle":
            less = middle.index(value) <= middle.index(theirs[name])
        else:
            less = value <= theirs[name]
        if not less:
            return False
    return True


def _study(space: Space, tried: Sequence[Tried], policy: Policy | None, seed: int) -> Any:
    """A study that knows what was tried. In memory; Optuna's own generators only, none of them global."""
    import optuna  # noqa: PLC0415

    logging.getLogger("optuna").setLevel(logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP),
        directions=["minimize"] if policy else ["minimize", "minimize"],
    )
    distributions = {
        name: optuna.distributions.IntDistribution(0, len(choices) - 1) for name, choices in space.dimensions.items()
    }
    for each in tried:
        params = dict(zip(space.dimensions, each.point, strict=True))
        values = [objective(each.measured, policy)] if policy else [*map(logarithm, each.measured.figures[:2])]
        study.add_trial(optuna.trial.create_trial(params=params, distributions=dict(distributions), values=values))
    return study
