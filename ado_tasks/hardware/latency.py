"""How long things take, on a machine whose speed wanders: each in turn, many rounds, ratios within a round."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """The middle and the ends of repeated measurements."""

    median: float
    min: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return Spread(float(np.median(values)), float(np.min(values)), float(np.max(values)))

    def scaled(self, factor: float) -> "Spread":
        """Each figure times a positive factor."""
        return Spread(self.median * factor, self.min * factor, self.max * factor)


def interleaved(
    actions: Mapping[str, Callable[[], object]], rounds: int, on_round: Callable[[int], None] = lambda _: None,
    *, warm: bool = False,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each action in each round. In a round every action runs once, one after another.

    One unmeasured round goes first (kernels are compiled, caches filled), unless they are `warm`: each has run before.
    The order turns by one each round, so that no action always follows the same one. An action must wait for its own
    result.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    for action in () if warm else actions.values():
        action()
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            actions[name]()
            seconds[name].append(time.perf_counter() - began)
        on_round(number + 1)
    return seconds


def speedups(seconds: Mapping[str, Sequence[float]], reference: str) -> dict[str, Spread]:
    """How many times quicker each is than `reference`: the ratio within each round, then the spread of ratios.

    A machine that slows down slows both sides of a ratio; the ratio of two medians would not know.
    """
    base = np.asarray(seconds[reference])
    return {name: Spread.of((base / np.asarray(values)).tolist()) for name, values in seconds.items()}
