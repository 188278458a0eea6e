"""What training and optimising cost, in network evaluations of one image: the same on every machine.

A backward pass counts as two forward passes, so a training step costs 3 evaluations an image. What a model cost is
computed from the history in its record (`ado.json`), which holds the whole config of everything that was done to it:
a folder made before this module existed tells it as well. Tests count the images that really go through a network.

Not counted: drawing pictures, losses on the selection part, KID in networks that are not the model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ado_tasks.errors import ArtifactError

BACKWARD = 2  # forward passes that a backward pass counts as
GRADIENT = 1 + BACKWARD  # a forward pass and its backward pass

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Passes:
    """Images that went through a network, and gradients that came back, of one image each."""

    forward: int
    backward: int

    @property
    def evaluations(self) -> int:
        """With a backward pass as two forward passes."""
        return self.forward + BACKWARD * self.backward

    def __add__(self, other: "Passes") -> "Passes":
        """Both together."""
        return Passes(self.forward + other.forward, self.backward + other.backward)


NOTHING = Passes(0, 0)


def training_passes(record: Record) -> Passes | None:
    """Of the teacher's training, from its own record; None where it was not trained here.

    Raises:
        ArtifactError: the history is not one that a task wrote.
    """
    return _total(record, "train", _training)


def distillation_passes(record: Record) -> Passes | None:
    """Of everything that a student was taught by, from its teacher on: its own stage and those before.

    None where it was not distilled, or by a method that is not known here.

    Raises:
        ArtifactError: the history is not one that a task wrote.
    """
    return _total(record, "distill", _distillation)


def family_passes(records: Iterable[Record]) -> Passes | None:
    """Of a whole family: what its costliest student took, since all the others came up on the way to it."""
    known = [passes for passes in map(distillation_passes, records) if passes is not None]
    return max(known, key=lambda passes: passes.evaluations) if known else None


def progressive_passes(config: Mapping[str, Any], steps: int) -> Passes:
    """Of progressive distillation down to a student of `steps`, matching included, from its config as plain values.

    A step of a stage: its teacher's K evaluations of each image (of the first teacher's in every stage, where
    `taught_by` says so), and the student's gradient. One of matching: the
    student's own n − 1 steps before the last and that last one, teacher and critic where it is noised, the stage's
    teacher again where regression holds on to it, then a gradient of the student and one of the critic. With an
    adversarial term half of the critic, where its features are narrowest, is gone through three times more: back to the
    sample, and forth and back with real images. Where students learn from walks, these come first, of teacher_steps
    evaluations each (or `walk_evaluations`), and no step of a stage asks a teacher again; walks of the first
    student's own cost its steps.
    """
    students = list(config["student_steps"])
    matching, walks, before = config.get("matching"), config.get("walks"), config["teacher_steps"]
    asked = config.get("walk_evaluations") or config["teacher_steps"]
    total = Passes(walks * asked, 0) if walks else NOTHING
    for stage, n in enumerate(students[: students.index(steps) + 1]):
        images = _of_stage(config["stage_steps"], stage) * config["batch_size"]
        walk = (config["teacher_steps"] if config.get("taught_by") == "first" else before) // n
        total += Passes(images * ((0 if walks else walk) + 1), images)
        if matching:
            images = matching["steps"][stage] * matching["batch_size"]
            known = not matching["regression"] or matching.get("hold_on_to") == "walks"
            total += Passes(images * (n + 2 + (0 if known else walk) + 2), images * 2)
            if _weight(matching.get("adversarial"), stage):
                total += Passes(images // 2, images)
        before = n
        if stage == 0 and steps < n:
            total += Passes((config.get("further_walks") or 0) * n, 0)
    return total


def consistency_passes(config: Mapping[str, Any], steps: int) -> Passes:
    """Of consistency tuning, and of finding the points that a student of `steps` noises to.

    A step: two forward passes and the gradient of one of them. The search tries each level that is not taken yet for
    the first point, in two evaluations, then for the second, in three, and so on.
    """
    images = config["steps"] * config["batch_size"]
    tried = sum((config["search_levels"] + 1 - point) * (point + 1) for point in range(1, steps))
    return Passes(2 * images + tried * config["search_samples"], images)


def guided_passes(config: Mapping[str, Any]) -> Passes:
    """Of folding guidance into one network: two evaluations of the teacher and the student's gradient."""
    images = config["steps"] * config["batch_size"]
    return Passes(images * (2 + 1), images)


def _weight(adversarial: Mapping[str, Any] | None, stage: int) -> float:
    """Of the adversarial term after a stage; 0 where there is none."""
    if adversarial is None:
        return 0.0
    given = adversarial["weight"]
    return given if isinstance(given, int | float) else given[stage]


def _training(done: Mapping[str, Any]) -> Passes:
    images = done["config"]["steps"] * done["config"]["batch_size"]
    return Passes(images, images)


def _distillation(done: Mapping[str, Any]) -> Passes | None:
    if done["method"] in {"progressive", "progressive, matching", "progressive, matching, adversarial"}:
        return progressive_passes(done["config"], done["steps"])
    if done["method"] == "consistency":
        return consistency_passes(done["config"], done["steps"])
    if done["method"] == "guided":
        return guided_passes(done["config"])
    return None


def _total(record: Record, task: str, passes_of: Callable[[Mapping[str, Any]], Passes | None]) -> Passes | None:
    """Over all entries of a task; None where there is none, or one is not known."""
    try:
        found = [passes_of(done) for done in record.get("history", []) if done.get("task") == task]
        known = [passes for passes in found if passes is not None]
        return sum(known, NOTHING) if known and len(known) == len(found) else None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as problem:
        raise ArtifactError(
            f"ado.json: what was done by {task!r} cannot be read from its history ({problem!r}); allowed: the entries "
            "that `ado` writes"
        ) from None


def _of_stage(given: int | Sequence[int], stage: int) -> int:
    return given if isinstance(given, int) else given[stage]
