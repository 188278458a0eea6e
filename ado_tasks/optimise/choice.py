"""Which way to sample on this machine: variant, solver, evaluations and batch by measured cost and measured quality.

A network evaluation of a whole batch costs what it costs on this machine, at this batch size, with the arithmetic of
this solver; nothing of that is known from a count of operations. It is measured at two numbers of evaluations n, from
noise to image, and taken to be a straight line:

    time of a batch = fixed + step · n.

Where a limit on quality is given, the cheapest way that keeps it is taken; else the best that keeps the limits on cost.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ado_tasks.errors import BudgetError, StatisticsError

Measure = Literal["kid", "distance"]

TOLERANCE = 0.03  # costs that differ by less are equal: medians of rounds in turn repeat about that well on two cores
# Limits by name, with what they are limits of, as a person reads it.
LIMITS = {
    "ms_per_image": "ms an image", "ms_per_batch": "ms a batch", "kid": "KID − teacher (upper end)",
    "distance": "squared distance to the fine solution",
}  # fmt: skip
QUALITIES: tuple[Measure, ...] = ("kid", "distance")


@dataclass(frozen=True)
class StepCost:
    """What a batch costs with one network and one solver, in ms of the median round."""

    solver: str
    batch: int
    fixed_ms: float  # whatever the number of evaluations
    step_ms: float  # each evaluation

    def ms_per_batch(self, nfe: int) -> float:
        """From noise to images."""
        return max(self.fixed_ms, 0.0) + nfe * self.step_ms


@dataclass(frozen=True)
class Way:
    """One way to sample: what it costs here, and how good it is."""

    name: str  # variant, or <solver>-<nfe> of a learned schedule
    solver: str
    nfe: int
    kid: float | None = None  # upper end of KID − KID(teacher at 50 steps), selection part; None: not judged
    distance: float | None = None  # mean squared to the fine solution, selection noise; None: not measured
    batch: int = 1
    ms_per_batch: float = 0.0

    @property
    def ms_per_image(self) -> float:
        """In batches of this size."""
        return self.ms_per_batch / self.batch

    def value(self, limit: str) -> float | None:
        """What a limit of this name is held against."""
        return getattr(self, limit)


@dataclass(frozen=True)
class Budget:
    """Limits, each the most that is allowed, None for no limit; and what is good where no limit of quality is given."""

    ms_per_image: float | None = None
    ms_per_batch: float | None = None  # from asking to having a whole batch
    kid: float | None = None
    distance: float | None = None
    quality: Measure = "kid"

    def limits(self) -> dict[str, float]:
        """Those that are given, by name."""
        return {name: limit for name in LIMITS if (limit := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Choice:
    """What was chosen, and of what."""

    way: Way
    kept: int  # ways that keep every limit
    considered: int
    reason: str


def at_every_batch(ways: Iterable[Way], costs: Sequence[StepCost]) -> list[Way]:
    """Each way at each batch size that its solver's cost was measured at."""
    return [
        replace(way, batch=cost.batch, ms_per_batch=cost.ms_per_batch(way.nfe))
        for way in ways
        for cost in costs
        if cost.solver == way.solver
    ]


def choose(ways: Sequence[Way], budget: Budget, tolerance: float = TOLERANCE) -> Choice:
    """The cheapest of `ways` that keeps a limit on quality; without such a limit, the best that costs no more.

    Cost is ms an image. Costs within `tolerance` of the least are equal: of these the better is taken, then fewer
    evaluations, then the smaller batch, which is ready sooner and needs less memory. A way whose quality is not known
    keeps no limit on it, and is not the best.

    Raises:
        BudgetError: none keeps the limits; it names the smallest that would do, or that there is none.
        StatisticsError: nothing is known of any way's quality, or of none all that a limit is given for.
    """
    limits = budget.limits()
    asked = [name for name in QUALITIES if name in limits]
    measure = asked[0] if asked else budget.quality
    needed = asked or [measure]
    known = [way for way in ways if all(way.value(name) is not None for name in needed)]
    if not known:
        raise StatisticsError(
            f"{' and '.join(needed)}: known of no way to sample; allowed: {' or '.join(QUALITIES)}, measured"
        )
    kept = [way for way in known if all(_keeps(way, name, limit) for name, limit in limits.items())]
    if not kept:
        raise BudgetError(_what_would_do(known, limits))
    quality: Callable[[Way], float] = lambda way: way.value(measure) or 0.0  # noqa: E731
    best = kept if asked else [way for way in kept if quality(way) <= min(map(quality, kept))]
    least = min(way.ms_per_image for way in best)
    equal = [way for way in best if way.ms_per_image <= least * (1 + tolerance)]
    way = min(equal, key=lambda way: (quality(way), way.nfe, way.batch, way.ms_per_image, way.name))
    said = ", ".join(f"{LIMITS[name]} ≤ {limit:.4g}" for name, limit in limits.items()) or "no limit"
    rule = "the cheapest" if asked else f"the least {LIMITS[measure]}"
    reason = f"{rule} of {len(kept)} ways that keep {said}, of {len(known)} whose {' and '.join(needed)} is known"
    return Choice(way, len(kept), len(known), reason)


def _keeps(way: Way, name: str, limit: float) -> bool:
    value = way.value(name)
    return value is not None and value <= limit


def _what_would_do(ways: Sequence[Way], limits: dict[str, float]) -> str:
    """For each limit, the smallest that lets a way through, the others kept; or that loosening one does not do."""
    said = ", ".join(f"{LIMITS[name]} ≤ {limit:.4g}" for name, limit in limits.items())
    suggestions = []
    for name in limits:
        others = {other: limit for other, limit in limits.items() if other != name}
        able = [way for way in ways if all(_keeps(way, *other) for other in others.items())]
        able = [way for way in able if way.value(name) is not None]
        if able:
            way = min(able, key=lambda way: (way.value(name) or 0.0, way.nfe, way.batch))
            beside = " with the rest as it is" if others else ""
            suggestions.append(
                f"{LIMITS[name]} ≤ {_rounded_up(way.value(name) or 0.0)}{beside} ({way.name}, batches of {way.batch})"
            )
    if not suggestions:
        lowest = [
            f"{LIMITS[name]} {_rounded_up(min(value for way in ways if (value := way.value(name)) is not None))}"
            for name in limits
            if any(way.value(name) is not None for way in ways)
        ]
        return f"no way to sample keeps {said}, nor with any one of these given up; each alone: {', '.join(lowest)}"
    return f"no way to sample keeps {said}; the least that would do: {', or '.join(suggestions)}"


def _rounded_up(value: float) -> str:
    """Three digits, never less than the value: what is suggested has to do."""
    digits = f"{value:.3g}"
    if float(digits) >= value:
        return digits
    return f"{value + 10.0 ** (math.floor(math.log10(abs(value))) - 2) if value else 0.0:.3g}"
