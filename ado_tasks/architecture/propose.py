"""Which points of a space to try next: Optuna's tree-structured Parzen estimator, kept to what can still win.

Bergstra et al. 2011; Optuna: Akiba et al. 2019. What a candidate costs is known before it is tuned, so points that are
no faster than one within the limits are not proposed (`can_win`); and of those that Optuna proposes, those go first
which promise most by their cost and a guess at their loss (surrogate.py).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ado_tasks import rng
from ado_tasks.architecture.choice import Measured, Policy, allowed, logarithm, objective
from ado_tasks.architecture.space import Point, Space
from ado_tasks.architecture.surrogate import expected_gain

ASKS = 24  # of the sampler at most for each point wanted; then points left over are taken in a seeded order
SHORTLIST = 8  # points proposed for each one wanted, of which the most promising goes first
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
    left = [point for point in points if point not in known and (policy is None or can_win(point, cost, tried, policy))]
    study = _study(space, tried, policy, rng.derive(seed, "propose", len(tried)) % 2**32)
    wanted = count if policy is None or len(tried) < STARTUP else SHORTLIST * count
    chosen: list[Point] = []
    for _ in range(ASKS * count if len(left) > wanted else 0):
        if len(chosen) == wanted:
            break
        trial = study.ask()
        point = tuple(trial.suggest_int(name, 0, len(each) - 1) for name, each in space.dimensions.items())
        if point in left and point not in chosen:
            chosen.append(point)
        else:
            study.tell(trial, state=TrialState.FAIL)
    spare = [point for point in left if point not in chosen]
    order = rng.generator(seed, "propose", "spare", len(tried)).permutation(len(spare))
    chosen += [spare[place] for place in order[: wanted - len(chosen)]]
    if policy is not None and wanted > count and chosen:
        losses = [(each.point, each.measured.quality_loss) for each in tried]
        gains = expected_gain(space, chosen, cost, losses, policy.max_quality_loss)
        chosen = [chosen[place] for place in np.argsort(-gains, kind="stable")]
    return chosen[:count]


def can_win(point: Point, cost: Mapping[Point, float], tried: Sequence[Tried], policy: Policy) -> bool:
    """Whether the policy might still choose a point: not where one within the limits was found that is as fast."""
    return all(cost[point] < cost[each.point] for each in tried if allowed(each.measured, policy))


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
