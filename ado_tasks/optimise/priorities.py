"""Which legs of walks are met again: those that a student is farthest off on, more often.

Schaul et al. 2016, "Prioritized experience replay" (arXiv:1511.05952), §3.3, the proportional variant: an example is
drawn as often as a power of its last error says. Unlike there no weight undoes it (their §3.4): a leg has one right end
and no noise, so nothing is biased but the student's attention. Few walks pass near where a picture is decided, and
those are the ones that few steps get wrong; most are learned long before.

What is known costs nothing: the loss of each image of each optimiser step. First every walk comes up as often as a
student has legs, as without priorities; where that is all the stage has time for, nothing changes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.errors import ArtifactError
from ado_tasks.optimise.steps import TrainStep
from ado_tasks.optimise.walks import Walks

FLOOR = 0.3  # added to a leg's loss, of which the mean is 1: none is forgotten, as Schaul et al.'s ε
LOSSES, ROWS, LEGS, WAITING = "priorities.losses", "priorities.rows", "priorities.legs", "priorities.waiting"
State = dict[str, mx.array]


class Priorities:
    """The last loss of each leg of each walk, and what is drawn by it."""

    def __init__(self, walks: Walks, student_steps: int, exponent: float) -> None:
        """Of a student of so many steps. Nothing is known yet."""
        self._walks, self._student_steps, self._exponent = walks, student_steps, exponent
        self.losses = np.full((student_steps, len(walks.states)), np.nan, np.float32)  # NaN: not met yet

    def draw(self, step: int, size: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Rows and legs, (size,) each, of one optimiser step: each leg as often, to within one."""
        rows, legs = self._walks.rows_and_legs(step, size, self._student_steps)
        generator = rng.generator(self._walks.seed, "walks", self._student_steps, "priority", step)
        for kind, count in self._walks.kinds(size):
            if step * count < self._student_steps * (kind.stop - kind.start):
                continue
            own = (rows >= kind.start) & (rows < kind.stop)
            for leg, losses in enumerate(self.losses[:, kind]):
                wanted = own & (legs == leg)
                rows[wanted] = kind.start + by_priority(losses, self._exponent, int(wanted.sum()), generator)
        return rows, legs

    def met(self, rows: npt.NDArray[np.intp], legs: npt.NDArray[np.intp], losses: npt.NDArray[np.float32]) -> None:
        """Remember the losses (size,) of what was drawn."""
        self.losses[legs, rows] = losses


def by_priority(
    losses: npt.NDArray[np.float32], exponent: float, count: int, generator: np.random.Generator
) -> npt.NDArray[np.intp]:
    """`count` rows, one from each of as many equal stretches of all priorities laid end to end.

    Priorities are powers of the losses (n,) over their mean, plus FLOOR; what was not met yet (NaN) counts as the mean.
    """
    known = np.isfinite(losses)
    mean = losses[known].mean(dtype=np.float64) if known.any() else 1.0
    relative = np.where(known, losses / max(mean, np.finfo(np.float32).tiny), 1.0)
    ends = np.cumsum((relative + FLOOR) ** exponent)
    points = (np.arange(count) + generator.random(count)) / max(count, 1) * ends[-1]
    return np.minimum(np.searchsorted(ends, points, side="right"), len(ends) - 1)


class PrioritisedStep:
    """A stage's optimiser step that notes how far off each leg was, and draws the next batches by it.

    A batch depends on the losses of all steps but the last one before it: that one may still be running.
    """

    def __init__(self, step: TrainStep, priorities: Priorities) -> None:
        """`step` keeps the loss of each image."""
        self._step, self._priorities = step, priorities
        self._drawn: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []  # not stepped on yet
        self._waiting: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], mx.array]] = []  # stepped on, not noted

    def draw(self, step: int, size: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Rows and legs of the next step's batch."""
        self._note()
        self._drawn = [self._priorities.draw(step, size)]
        return self._drawn[0]

    def __call__(self, batch: Mapping[str, mx.array], learning_rate: float) -> mx.array:
        """Take a step on the batch that was drawn last; the loss before it."""
        loss = self._step(batch, learning_rate)
        rows, legs = self._drawn.pop()
        self._waiting.append((rows, legs, self._step.of_each))
        return loss

    def parameters(self) -> Any:
        """The weights as they are now."""
        return self._step.parameters()

    @property
    def state(self) -> State:
        """That of the optimiser, all losses that are noted, and those of the last step, which wait."""
        self._note()
        found = {**self._step.state, LOSSES: mx.array(self._priorities.losses)}
        for rows, legs, losses in self._waiting:
            found |= {ROWS: mx.array(rows.astype(np.int32)), LEGS: mx.array(legs.astype(np.int32)), WAITING: losses}
        return found

    def load(self, state: Mapping[str, mx.array]) -> None:
        """Go on from a checkpoint's state. Raises ArtifactError where it does not fit these walks."""
        own = (LOSSES, ROWS, LEGS, WAITING)
        found = {name: np.array(state[name]) for name in own if name in state}
        if found.get(LOSSES, np.empty(0)).shape != self._priorities.losses.shape or len(found) not in {1, len(own)}:
            raise ArtifactError("a checkpoint does not fit: its priorities are not of these walks")
        self._step.load({name: array for name, array in state.items() if name not in own})
        self._priorities.losses = found[LOSSES].astype(np.float32)
        self._waiting, self._drawn = [], []
        if WAITING in found:
            self._waiting = [(found[ROWS].astype(np.intp), found[LEGS].astype(np.intp), mx.array(found[WAITING]))]

    def _note(self) -> None:
        """Note all losses but those of the last step."""
        for rows, legs, losses in self._waiting[:-1]:
            self._priorities.met(rows, legs, np.array(losses))
        self._waiting = self._waiting[-1:]
