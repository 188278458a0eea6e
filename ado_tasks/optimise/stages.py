"""How far progressive distillation may go: it halves the steps until a student is worse than its teacher by a margin.

Students come in order, each from the one before it, so the first that fails ends the chain: what is made of it starts
from what was lost (Salimans & Ho 2022, §3: each stage's teacher is the stage before). A student fails where the upper
end of the 95 % interval of KID − KID(teacher) is not under the margin (`metrics/noninferiority.py`): a wide interval
fails too, and more samples, not another margin, are what it asks for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ado_tasks.errors import ConfigError
from ado_tasks.metrics.interval import Interval
from ado_tasks.metrics.noninferiority import non_inferior


@dataclass(frozen=True)
class Stage:
    """One student of a chain."""

    steps: int
    difference: Interval  # KID − KID(teacher)


@dataclass(frozen=True)
class Stop:
    """Where a chain of students stops."""

    steps: int | None  # of the last student that is as good as the teacher; None: not even the first is
    failed: int | None  # steps of the first that is not; None: none failed
    decided: bool  # False where none failed and one step was not reached: fewer were not tried
    reason: str


def stopping_point(stages: Sequence[Stage], margin: float) -> Stop:
    """The decision for students in the order they were made, most steps first.

    Raises:
        ConfigError: there is no student, or steps do not fall to at least 1.
        StatisticsError: the margin is not positive.
    """
    steps = [stage.steps for stage in stages]
    if not steps or steps[-1] < 1 or any(after >= before for before, after in pairwise(steps)):
        raise ConfigError(f"stages: students of {steps} steps are not allowed: falling numbers, at least one")
    passed = [non_inferior(stage.difference, margin) for stage in stages]
    if all(passed):
        fewer = "no fewer are possible" if steps[-1] == 1 else "fewer were not tried"
        high = f"KID − teacher upper end {stages[-1].difference.high:.4g} < margin {margin:.4g}"
        return Stop(steps[-1], None, steps[-1] == 1, f"goes down to {_steps(steps[-1])}: {high}; {fewer}")
    first = passed.index(False)
    failed, kept = stages[first], steps[first - 1] if first else None
    where = f"stops at {_steps(kept)}" if kept else "stops before its first student"
    reason = f"{where}: at {_steps(failed.steps)} KID − teacher {_against(failed.difference, margin)}"
    later = [stage.steps for stage, good in zip(stages[first:], passed[first:], strict=True) if good]
    if later:
        reason += f"; {', '.join(map(str, later))} would pass again, which is no reason to go on"
    return Stop(kept, failed.steps, True, reason)


def stages_of(entries: Iterable[Mapping[str, Any]], family: str) -> list[Stage]:
    """The students of a family in a report of `evaluate`, most steps first."""
    mine = [entry for entry in entries if entry["name"].rpartition("-")[0] == family]
    found = []
    for entry in sorted(mine, key=lambda entry: -entry["nfe"]):
        difference = entry["kid_minus_teacher"]
        found.append(Stage(int(entry["nfe"]), Interval(difference["value"], *difference["ci"])))
    return found


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"


def _against(difference: Interval, margin: float) -> str:
    """What is wrong with it: worse for certain, or not known well enough."""
    upper = f"upper end {difference.high:.4g} ≥ margin {margin:.4g}"
    if difference.low >= margin:
        return f"{upper}, and so is the lower end ({difference.low:.4g})"
    return f"{upper}, the lower end is not ({difference.low:.4g}): more samples might tell"
