"""Walks of a teacher from noise to image, walked once and kept, that every student of few steps learns from.

Progressive distillation shows a student noised images and asks the teacher anew at every step. Here the teacher walks
from each of a set of noises, as Luhman & Luhman 2021 (arXiv:2101.02388) make their pairs of noise and image, and what
is kept are the states at which a walk passes the times of the student of most steps. Every student finds its own
among them. So a target is used many times and by every stage, what would be most of the cost goes into optimiser steps
instead, and no student learns what another has lost. And a student sees the states that sampling goes through, those
of the teacher's own sampler where it walks that.

The price: what is learned from few walks is learned by heart. More noises are what it then asks for, not more steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.datasets.shards import Split
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.errors import ArtifactError, DivergenceError
from ado_tasks.optimise.batches import images_of_step
from ado_tasks.optimise.checkpoints import SUM, sum_of
from ado_tasks.optimise.progressive import WalkSolver, states_on_the_way
from ado_tasks.report import Reporter
from ado_tasks.storage import load_arrays_and_metadata, save_arrays

Denoising = Callable[[Sequence[mx.array]], Denoiser]  # labels (none or one array of them) to the teacher with them
AT_ONCE = 512  # walks at the same time, and in one file of what is kept


@dataclass(frozen=True)
class Walks:
    """Walks of a teacher, and of a student after them: states[:, 0] is noise, states[:, k] where time k is passed."""

    times: tuple[float, ...]  # of the student of most steps, from 1 to 0
    states: npt.NDArray[np.float32]  # (count, N + 1, H, W, C)
    labels: npt.NDArray[np.int32] | None  # (count,); None where there are no classes
    seed: int
    teachers: int | None = None  # how many are the teacher's, the first ones; None: all
    share: float | None = None  # of what a step sees that is of those; None: what they are of all

    def past_times_of(self, student_steps: int) -> "Walks":
        """With the states alone that a student of so many steps, and those of fewer, find among them."""
        every = (len(self.times) - 1) // student_steps
        return Walks(self.times[::every], np.ascontiguousarray(self.states[:, ::every]), self.labels, self.seed)

    def and_those_of(self, other: "Walks", share: float | None = None) -> "Walks":
        """All walks of both, which pass the same times; `share` of what a step sees is of the former."""
        labels = None if self.labels is None or other.labels is None else np.append(self.labels, other.labels)
        states = np.concatenate([self.states, other.states])
        return Walks(self.times, states, labels, self.seed, len(self.states), share)

    def legs(self, step: int, size: int, student_steps: int) -> tuple[dict[str, mx.array], npt.NDArray[np.intp]]:
        """One leg of each of `size` walks, from one of a student's times to its next: for one optimiser step.

        Returns:
            "z" and "end", where each begins and ends, (size, H, W, C), and "labels" (size,) where there are classes;
            and the number of each leg, (size,), from 0 for the one that begins in noise: each as often, to within one.
        """
        rows, every = self._rows(step, size, "distill", student_steps), (len(self.times) - 1) // student_steps
        generator = rng.generator(self.seed, "walks", student_steps, "leg", step)
        leg = np.floor((generator.permutation(size) + generator.random()) * student_steps / size).astype(np.intp)
        begins, ends = (mx.array(self.states[rows, place]) for place in (leg * every, (leg + 1) * every))
        return {"z": begins, "end": ends, **self._labels(rows)}, leg

    def pairs(self, step: int, size: int, student_steps: int) -> dict[str, mx.array]:
        """Walks from end to end, in an order of their own: "noise" and "end" (size, H, W, C), and "labels"."""
        rows = self._rows(step, size, "match", student_steps)
        return {
            "noise": mx.array(self.states[rows, 0]), "end": mx.array(self.states[rows, -1]), **self._labels(rows)
        }  # fmt: skip

    def _rows(self, step: int, size: int, purpose: str, student_steps: int) -> np.ndarray:
        """Of the teacher's and of others their share, each of a kind once before any comes again."""
        seed, count = rng.derive(self.seed, "walks", purpose, student_steps), len(self.states)
        if self.share is None or self.teachers is None:
            return images_of_step(count, size, seed, step)
        own = round(self.share * size)
        others = images_of_step(count - self.teachers, size - own, rng.derive(seed, "others"), step)
        return np.concatenate([images_of_step(self.teachers, own, seed, step), self.teachers + others])

    def _labels(self, rows: np.ndarray) -> dict[str, mx.array]:
        return {} if self.labels is None else {"labels": mx.array(self.labels[rows])}


def walked(
    denoising: Denoising, times: tuple[float, ...], grid: npt.NDArray[np.float64], solver: WalkSolver, count: int,
    part: Split, schedule: NoiseSchedule, seed: int, scratch: Path, report: Reporter, evaluations: int | None = None,
) -> Walks:  # fmt: skip
    """Let a teacher walk from `count` noises in its solver's steps along `grid`, past `times`; both go from 1 to 0.

    With fewer `evaluations` than steps it is not asked at each (see `states_on_the_way`).

    Labels are as frequent as in `part`. What has been walked is kept in `scratch`, from where a run that was
    interrupted goes on; what is damaged, or is not of these walks, is walked anew. All states are held in memory:
    count × len(times) images in float32.

    Raises:
        DivergenceError: a state is not finite.
    """
    labels = None
    if part.num_classes:
        labels = part.labels[images_of_step(len(part), count, rng.derive(seed, "walks", "labels"), 0)].astype(np.int32)
    found = np.empty((count, len(times), *part.shape), np.float32)
    for first in range(0, count, AT_ONCE):
        path, here = scratch / f"walks-{first:08d}.safetensors", np.arange(first, min(first + AT_ONCE, count))
        states = _kept(path, (len(here), *found.shape[1:]))
        if states is None:
            noise = mx.random.normal((len(here), *part.shape), key=rng.key(seed, "walks", "noise", first))
            teacher = denoising([] if labels is None else [mx.array(labels[here])])
            passed = [noise, *states_on_the_way(teacher, noise, grid, times[1:], schedule, solver, evaluations)]
            states = np.stack([np.array(state) for state in passed], axis=1)
            if not np.isfinite(states).all():
                raise DivergenceError(f"walks of the teacher are not finite ({len(grid) - 1} steps of {solver})")
            kept = {"states": mx.array(states)}
            save_arrays(path, kept, {SUM: sum_of(kept)})
        found[here] = states
        report.progress(min(first + AT_ONCE, count), count)
    return Walks(times, found, labels, seed)


def _kept(path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.float32] | None:
    """The states in a file of what has been walked; None where it is not there, damaged, or of another shape."""
    try:
        kept, metadata = load_arrays_and_metadata(path)
    except ArtifactError:
        return None
    whole = metadata.get(SUM) == sum_of(kept) and set(kept) == {"states"}
    return np.array(kept["states"]) if whole and kept["states"].shape == shape else None
