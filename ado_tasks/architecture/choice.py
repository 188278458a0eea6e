"""What is chosen of candidates that cost and lose differently: the Pareto front, and one on it by a written policy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ado_tasks.config import config

LEAST = 1e-30  # in the place of 0, where a logarithm is taken
PENALTY = 10.0  # what a quality loss e-fold above the limit counts, beside an e-fold of cost: more than any saving


@config
class Policy:
    """Which candidate is wanted: the fastest whose quality loss is within the limit; of equal ones the better."""

    max_quality_loss: Annotated[float, Field(gt=0)] = 0.1  # see Lesson.quality_loss; 0 is the teacher
    max_peak_memory_mb: Annotated[float, Field(gt=0)] | None = None  # at the batch that was measured; none: any


@dataclass(frozen=True)
class Measured:
    """A candidate's figures. Less is better in each."""

    name: str
    quality_loss: float
    cost: float  # milliseconds an image where it was timed, else multiply-adds
    peak_memory_mb: float = 0.0

    @property
    def figures(self) -> tuple[float, float, float]:
        """What is compared."""
        return self.quality_loss, self.cost, self.peak_memory_mb


def dominates(one: Measured, other: Measured) -> bool:
    """Whether one is no worse in anything, and better in something."""
    return one.figures != other.figures and all(a <= b for a, b in zip(one.figures, other.figures, strict=True))


def pareto_front(candidates: Sequence[Measured]) -> list[Measured]:
    """Those that none dominates, fastest first."""
    front = [each for each in candidates if not any(dominates(other, each) for other in candidates)]
    return sorted(front, key=lambda each: (each.cost, each.name))


def fronts(candidates: Sequence[Measured]) -> list[list[Measured]]:
    """The front, the front of what is left, and so on (Deb et al. 2002, NSGA-II, §III.A)."""
    left, found = list(candidates), []
    while left:
        found.append(pareto_front(left))
        left = [each for each in left if each not in found[-1]]
    return found


def allowed(candidate: Measured, policy: Policy) -> bool:
    """Whether a candidate is within the policy's limits. NaN is not."""
    memory = policy.max_peak_memory_mb
    return candidate.quality_loss <= policy.max_quality_loss and (memory is None or candidate.peak_memory_mb <= memory)


def choose(candidates: Sequence[Measured], policy: Policy) -> Measured | None:
    """The policy's choice, or none where no candidate is within its limits."""
    within = [each for each in candidates if allowed(each, policy)]
    return min(within, key=lambda each: (each.cost, each.quality_loss, each.name), default=None)


def logarithm(figure: float) -> float:
    """Its logarithm; of nothing, that of something very small."""
    return math.log(max(figure, LEAST))


def objective(candidate: Measured, policy: Policy) -> float:
    """What a proposer makes small: log cost, and the quality loss where it is beyond the limit.

    Its least over a space is the policy's choice wherever there is one.
    """
    beyond = logarithm(candidate.quality_loss) - math.log(policy.max_quality_loss)
    return math.log(candidate.cost) + PENALTY * max(0.0, beyond)
