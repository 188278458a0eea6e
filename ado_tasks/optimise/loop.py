"""The training loop that `train` and `distill` share: step, check, report, checkpoint, resume."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ado_tasks.backend import mx
from ado_tasks.errors import DivergenceError
from ado_tasks.optimise.checkpoints import Checkpoints
from ado_tasks.report import Reporter

Curve = list[tuple[int, float]]
Batch = Mapping[str, mx.array]


class Step(Protocol):
    """What the loop repeats: `TrainStep`, or anything that keeps its state as it does."""

    def __call__(self, batch: Batch, learning_rate: float) -> mx.array:
        """Take one step; the loss before it."""
        ...

    @property
    def state(self) -> dict[str, mx.array]:
        """All that a later run needs to go on."""
        ...

    def load(self, state: Mapping[str, mx.array]) -> None:
        """Go on from such a state."""
        ...


CHECK_EVERY = 25  # steps between looks at the losses: each look waits for the device
_STEP, _CURVE = "progress.step", "curve."  # names of what is not weights in a checkpoint


@dataclass
class Loop:
    """One run of optimiser steps.

    Every batch and learning rate is a function of the step alone, so that a run which resumes at step k goes on exactly
    as one that never stopped.
    """

    name: str  # of the curves, and in messages
    steps: int
    batch_of: Callable[[int], Batch]
    learning_rate_of: Callable[[int], float]
    checkpoints: Checkpoints
    checkpoint_every: int
    report: Reporter
    report_offset: int = 0  # steps done before this loop, where it is a part of a longer task
    report_total: int | None = None
    validate: Callable[[Any], float] | None = None
    validate_every: int = 500
    curves: dict[str, Curve] = field(default_factory=dict)

    def run(self, step: Step) -> dict[str, Curve]:
        """Go from the last checkpoint, if there is one, to the last step; returns the curves.

        Raises:
            DivergenceError: a loss is not finite. Names the step, the loss and the last good checkpoint.
            KeyboardInterrupt: the reporter raised it, to stop the run; a checkpoint of this very step is kept.
        """
        self.curves = {"training": [], **({"validation": []} if self.validate else {})}
        start = self._resume(step)
        losses: list[mx.array] = []
        for index in range(start, self.steps):
            losses.append(step(self.batch_of(index), self.learning_rate_of(index)))
            done = index + 1
            last = done == self.steps
            # Before a checkpoint too: only what is finite is kept, and a resumed run averages over the same steps.
            looked = last or done % CHECK_EVERY == 0 or done % self.checkpoint_every == 0
            if looked:
                self._check(losses, done)
                losses = []
            if self.validate and (last or done % self.validate_every == 0):
                self._note("validation", done, self.validate(step))
            if done % self.checkpoint_every == 0 and not last:
                self.checkpoints.save(done, self._state(step, done))
            if looked:
                self._tell(step, done)
        return self.curves

    def _tell(self, step: Step, done: int) -> None:
        try:
            loss = self.curves["training"][-1][1]
            self.report.progress(self.report_offset + done, self.report_total or self.steps, loss=loss)
        except KeyboardInterrupt:
            self.checkpoints.save(done, self._state(step, done))
            raise

    def _check(self, losses: list[mx.array], done: int) -> None:
        values = [float(np.array(loss)) for loss in losses]
        for offset, value in enumerate(values):
            if not np.isfinite(value):
                at = done - len(values) + offset + 1
                good = self.checkpoints.last_step()
                kept = f"the last good checkpoint is of step {good}" if good else "there is no checkpoint before it"
                raise DivergenceError(f"{self.name}: the loss is {value} at step {at} of {self.steps}; {kept}")
        self._note("training", done, float(np.mean(values)))

    def _note(self, curve: str, step: int, value: float) -> None:
        rounded = float(np.float32(value))  # as a checkpoint keeps it
        self.curves[curve].append((step, rounded))
        self.report.metric(f"{self.name}.{curve}_loss", rounded, step)

    def _state(self, step: Step, done: int) -> dict[str, mx.array]:
        curves = {_CURVE + name: mx.array(points) for name, points in self.curves.items() if points}
        return {**step.state, **curves, _STEP: mx.array(done)}

    def _resume(self, step: Step) -> int:
        found = self.checkpoints.latest()
        if found is None:
            return 0
        state: dict[str, Any] = found[1]
        done = int(state.pop(_STEP).item())
        for name in [name for name in state if name.startswith(_CURVE)]:
            points = np.array(state.pop(name)).tolist()
            self.curves[name.removeprefix(_CURVE)] = [(int(at), value) for at, value in points]
        step.load(state)
        return done
