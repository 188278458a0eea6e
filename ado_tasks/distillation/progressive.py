"""Progressive distillation from a teacher's folder to its students': a chain, each taught by the one before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.config import as_plain, as_recorded
from ado_tasks.datasets.shards import Dataset, Split, open_dataset
from ado_tasks.diffusion.denoiser import Denoiser, make_denoiser
from ado_tasks.diffusion.grids import uniform_time
from ado_tasks.diffusion.schedules import NoiseSchedule, schedule_from_diffusers
from ado_tasks.distillation.stopping import Stopping
from ado_tasks.errors import ConfigError
from ado_tasks.interop.diffusers_folder import StoredModel, check_teacher, read_model, steps_of_student, write_model
from ado_tasks.models.quantised import bits_of, floating, quantised
from ado_tasks.models.unet import UNet2D
from ado_tasks.optimise.checkpoints import Checkpoints, run_key
from ado_tasks.optimise.cost import distillation_passes
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.optimise.loop import Curve
from ado_tasks.optimise.progressive import WalkSolver
from ado_tasks.optimise.students import Stage, with_weights
from ado_tasks.optimise.walks import Walks, walked
from ado_tasks.parallel import sharded_apply
from ado_tasks.pictures import save_curves
from ado_tasks.report import Reporter
from ado_tasks.storage import atomic_folder, sha256_tree, write_json
from ado_tasks.variants import INDEX

WALKS, FURTHER = "-walks", "-further"  # of the names of folders in which walks are kept


def teach(
    config: DistillConfig, *, teacher: Path, start: Path | None, dataset: Path, out: Path, scratch: Path, seed: int,
    features: Path | None, anchor: Path | None, report: Reporter,
) -> dict[int, float]:  # fmt: skip
    """Make the chain of students that `distill` describes, and write their folders.

    The first student begins as the model in `start`, which may be of another architecture, or as the teacher.

    Returns:
        By each student's steps, its last losses' mean; fewer than were asked for where the chain ended itself.

    Raises:
        ConfigError, ArtifactError, DivergenceError: as `distill`.
    """
    stored, data = read_model(teacher), open_dataset(dataset)
    kind = str(stored.scheduler_config.get("prediction_type", "epsilon"))
    if kind == "epsilon":
        raise ConfigError(
            f"{teacher}: predicts epsilon, which cannot be distilled to few steps; allowed: v_prediction, sample"
        )
    if not _goes_on(config, stored.record):
        check_teacher(stored, str(teacher))
    begins = stored if start is None else _other(start, stored, teacher)
    for model, where in ((stored, teacher), (begins, start or teacher)):
        model.unet.config.check_data(data.shape, data.num_classes, f"{where}/unet/config.json")
    bits = bits_of(begins.unet)  # students are taught in floats, and have as few bits as what they begin as in the end
    first, student = floating(stored.unet), floating(begins.unet)
    begins = replace(begins, unet=student)
    schedule = schedule_from_diffusers(stored.scheduler_config)
    stopping = _stopping(config, data, features, anchor, seed)
    inputs = {"dataset": data.sha256, "teacher": sha256_tree(teacher)}
    inputs |= {} if start is None else {"start": sha256_tree(start)}
    key = run_key(__name__, as_plain(config), inputs, seed)
    part = data.split("train")

    walking = Walking(config, part, schedule, kind, seed, scratch / key, report)
    walks = walking.of_teacher(first)
    curves: dict[str, Curve] = {}
    weights: dict[int, Any] = {}
    for number, after in enumerate(config.student_steps):
        stage = Stage(config, number, config.interval_of(number), schedule, kind, seed, walks)
        teaching = first if number == 0 or config.taught_by == "first" else student
        checkpoints = Checkpoints.under(scratch, key + f"-{after}")
        weights[after], curves[f"{after} steps"] = stage.run(student, teaching, part, checkpoints, report)
        student = with_weights(student, weights[after])
        if config.matching_steps_of(number):
            checkpoints = Checkpoints.under(scratch, key + f"-{after}-matched")
            weights[after], curve = stage.match(student, teaching, first, part, checkpoints, report)
            student = with_weights(student, weights[after])
            curves[f"{after} steps, matching"] = curve
        if stopping and not stopping.goes_on(begins, weights[after], stage.interval.grid(), report):
            break
        walks = walking.further(walks, number, student)

    with atomic_folder(out) as folder:
        for steps, learned in weights.items():
            unet = quantised(with_weights(begins.unet, learned), bits)
            record = _record(begins, config, steps, seed, inputs.get("start"))
            write_model(folder / str(steps), unet, stored.scheduler_config, record)
        write_json(folder / "curves.json", curves)
        save_curves(folder / "distillation.png", curves, "distillation loss")
        if stopping:
            write_json(folder / INDEX, stopping.index(config.student_steps))
    report.picture("distillation", out / "distillation.png")
    spent = distillation_passes(_record(begins, config, list(weights)[-1], seed, None))
    report.metric("evaluations", spent.evaluations if spent else 0)
    walking.clear()
    for after in config.student_steps:
        Checkpoints.under(scratch, key + f"-{after}").clear()
        Checkpoints.under(scratch, key + f"-{after}-matched").clear()
    return {steps: curves[f"{steps} steps"][-1][1] for steps in weights}


@dataclass(frozen=True)
class Walking:
    """Who walks from noise to image for the students to learn from, where the config asks for walks."""

    config: DistillConfig
    part: Split
    schedule: NoiseSchedule
    kind: str
    seed: int
    scratch: Path  # what is walked is kept in folders beside it
    report: Reporter

    def of_teacher(self, teacher: UNet2D) -> Walks | None:
        """The teacher's walks, which every stage learns from; None where there are to be none."""
        if self.config.walks is None:
            return None
        times, grid = tuple(self.config.interval_of(0).grid().tolist()), uniform_time(self.config.teacher_steps)
        return self._walked(
            teacher, self.config.walks, times, grid, self.config.teacher_solver, self.seed, WALKS,
            self.config.walk_evaluations,
        )  # fmt: skip

    def further(self, walks: Walks | None, number: int, student: UNet2D) -> Walks | None:
        """What later stages learn from after stage `number`: with the first student's own walks, where there are any.

        They begin in noise that the teacher's do not begin in, and take the student's own steps.
        """
        count = self.config.further_walks
        if walks is None or count is None or number:
            return walks
        fewer, seed = walks.past_times_of(self.config.student_steps[1]), rng.derive(self.seed, "further walks")
        own = self._walked(student, count, fewer.times, np.array(walks.times), "ddim", seed, FURTHER)
        return fewer.and_those_of(own, self.config.teachers_share)

    def clear(self) -> None:
        """Forget what is kept."""
        for name in (WALKS, FURTHER):
            Checkpoints.under(self.scratch.parent, self.scratch.name + name).clear()

    def _walked(
        self, unet: UNet2D, count: int, times: tuple[float, ...], grid: npt.NDArray[np.float64], solver: WalkSolver,
        seed: int, name: str, evaluations: int | None = None,
    ) -> Walks:  # fmt: skip
        apply = sharded_apply(unet, self.config.shards)

        def denoising(labels: Sequence[mx.array]) -> Denoiser:
            return make_denoiser(lambda z, timestep: apply(z, timestep, *labels), self.schedule, self.kind)

        kept = self.scratch.with_name(self.scratch.name + name)
        return walked(
            denoising, times, grid, solver, count, self.part, self.schedule, seed, kept, self.report, evaluations
        )


def _other(start: Path, teacher: StoredModel, where: Path) -> StoredModel:
    """What the first student begins as, in the teacher's place.

    Which version of Diffusers wrote it does not matter.

    Raises:
        ConfigError: it predicts something else than the teacher, knows other noise or other classes, or is a student.
    """
    model = read_model(start)
    check_teacher(model, str(start))
    own, taught = (
        {f"scheduler {key}": value for key, value in each.scheduler_config.items() if key != "_diffusers_version"}
        | {"num_class_embeds": each.unet.config.num_class_embeds}
        for each in (model, teacher)
    )
    for name in (*own, *taught):
        if own.get(name) != taught.get(name):
            raise ConfigError(
                f"--start {start}: its {name} is {own.get(name)}; allowed: that of {where}, {taught.get(name)}"
            )
    return model


def _goes_on(config: DistillConfig, record: Mapping[str, Any]) -> bool:
    """Whether a student is asked only what it knows: its own steps, which fewer of the next replace.

    Matching asks it at every noise level; a consistency model does not take DDIM's steps.
    """
    said = record.get("sampler", {})
    own = said.get("solver") == "ddim" and steps_of_student(record) == config.teacher_steps
    uniform = "times" not in said and config.times is None
    return own and uniform and config.teacher_solver == "ddim" and config.matching is None


def _stopping(
    config: DistillConfig, data: Dataset, features: Path | None, anchor: Path | None, seed: int
) -> Stopping | None:
    """What students are held against, where the chain is to stop itself."""
    if config.stop == "never":
        return None
    if features is None or anchor is None:
        missing = " ".join(name for name, path in (("--features", features), ("--anchor", anchor)) if path is None)
        raise ConfigError(
            f"stop: inferior needs {missing}: the folders made by `features` and `anchor`, or stop: never"
        )
    return Stopping.read(data, features, anchor, seed)


def _record(begins: StoredModel, config: DistillConfig, steps: int, seed: int, start: str | None) -> dict[str, Any]:
    stage = config.student_steps.index(steps)
    matched = config.matching_steps_of(stage) > 0
    method = "progressive, matching" if matched else "progressive"
    if matched and config.adversarial_weight_of(stage):
        method += ", adversarial"
    unsaid = {"stop": "never", "targets_together": 1, "taught_by": "previous", "precision": "float32", "times": None,
              "walks": None, "further_walks": None, "optimiser": "adam", "teachers_share": None,
              "walk_evaluations": None}  # fmt: skip
    settings = as_recorded(config, **unsaid)
    if config.matching and config.matching.adversarial is None:
        del settings["matching"]["adversarial"]  # as records were before there was such a key
    if config.matching and config.matching.hold_on_to == "teacher":
        del settings["matching"]["hold_on_to"]  # the same
    grid = {"grid": "uniform_time"}
    if config.times is not None:
        grid = {"grid": "given", "times": config.interval_of(stage).grid().tolist()}
    done = {"task": "distill", "method": method, "steps": steps, "config": settings, "seed": seed}
    done |= {} if start is None else {"start": start}  # of the folder that the first student began as
    return {
        "history": [*begins.record.get("history", []), done],
        "sampler": {"solver": "ddim", "steps": steps, **grid},
    }
