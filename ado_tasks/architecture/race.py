"""The race: candidates are proposed, tuned a little, and the most promising tuned on (successive halving).

Jamieson & Talwalkar 2016 (arXiv:1502.07943), algorithm 1, with rungs that are written down: rung r tunes `sizes[r]`
candidates, the survivors of rung r−1, for `steps[r]` more steps. Nothing depends on which of them is done first.
Who survives is decided by Pareto fronts of loss and cost. A limit on quality at the end says little about quality at
the start, but for one thing: who is within it already will be within it, and of those only the fastest can be chosen.
`good_enough` says so; without it the candidates nearest to the teacher, which are the slowest, fill the last rung.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Self

from pydantic import Field, model_validator

from ado_tasks.architecture.choice import Measured, fronts, logarithm
from ado_tasks.config import config

Count = Annotated[int, Field(ge=1)]
Lanes = Annotated[int, Field(ge=1, le=256)]  # each is a stage of the graph


@config
class RaceConfig:
    """The rungs, lowest first."""

    sizes: Annotated[tuple[Lanes, ...], Field(min_length=1)] = (12, 6, 3)  # candidates tuned in each
    steps: tuple[Count, ...] = (60, 120, 360)  # optimiser steps in each, beside those of the rungs below
    good_enough: Annotated[float, Field(gt=0)] | None = (
        None  # quality loss below which less is no better; none: no such
    )
    unguided: Count = 8  # of the lowest rung: points in a seeded order; the others are proposed by what came of these

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if len(self.steps) != len(self.sizes):
            raise ValueError(f"steps: {len(self.steps)} given for {len(self.sizes)} rungs; one number each")
        if any(above > below for below, above in pairwise(self.sizes)):
            raise ValueError(f"sizes: {self.sizes} grow; a rung tunes survivors of the one below")
        if self.unguided > self.sizes[0]:
            raise ValueError(f"unguided: {self.unguided} is more than the lowest rung's {self.sizes[0]} lanes")
        return self

    def total_steps(self) -> int:
        """Optimiser steps of the whole race."""
        return sum(size * steps for size, steps in zip(self.sizes, self.steps, strict=True))

    def evaluations(self) -> float:
        """The same in candidates that are tuned to the end."""
        return self.total_steps() / sum(self.steps)


def survivors(candidates: Sequence[Measured], count: int, good_enough: float | None = None) -> list[Measured]:
    """Who goes on: front by front; within the front that does not fit whole, the least product of loss and cost.

    A loss below `good_enough` counts as that. Ties are broken by name: the order in which candidates were tuned decides
    nothing. NaN never goes before a number.
    """
    finite = {each.name: each for each in candidates if all(map(math.isfinite, each.figures))}
    least = good_enough or 0.0
    compared = [replace(each, quality_loss=max(each.quality_loss, least)) for each in finite.values()]
    chosen: list[Measured] = []
    for front in fronts(compared):
        chosen += sorted(front, key=_product)[: count - len(chosen)]
    return [finite[each.name] for each in chosen]


def _product(candidate: Measured) -> tuple[float, str]:
    return logarithm(candidate.quality_loss) + logarithm(candidate.cost), candidate.name


@dataclass(frozen=True)
class Lane:
    """One place in the race."""

    rung: int
    place: int  # in the rung: of the lowest, the number of the proposal; above, the place among the survivors

    @staticmethod
    def of(number: int, race: RaceConfig) -> "Lane":
        """The lane with this number, counted through all rungs from the lowest. Raises ValueError beyond the last."""
        for rung, size in enumerate(race.sizes):
            if number < size:
                return Lane(rung, number)
            number -= size
        raise ValueError(f"lane: beyond the race's {sum(race.sizes)} lanes")
