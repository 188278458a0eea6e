"""Task `distill`: students that need ever fewer steps, each taught by the one before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.config import as_plain, config
from ado_tasks.datasets.shards import Split, open_dataset
from ado_tasks.diffusion import losses
from ado_tasks.diffusion.denoiser import Denoiser, make_denoiser
from ado_tasks.diffusion.parameterisation import expand
from ado_tasks.diffusion.schedules import NoiseSchedule, schedule_from_diffusers
from ado_tasks.errors import ConfigError
from ado_tasks.interop.diffusers_folder import StoredModel, read_model, write_model
from ado_tasks.models.unet import UNet2D
from ado_tasks.optimise.batches import images_of_step, labels_of
from ado_tasks.optimise.checkpoints import Checkpoints, run_key
from ado_tasks.optimise.loop import Curve, Loop
from ado_tasks.optimise.progressive import Interval, WalkSolver, distillation_target
from ado_tasks.optimise.steps import TrainStep
from ado_tasks.parallel import sharded_apply
from ado_tasks.pictures import save_curves
from ado_tasks.report import SILENT, Reporter
from ado_tasks.storage import atomic_folder, sha256_tree, write_json

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]


@config
class DistillConfig:
    """How students are taught."""

    teacher_steps: Annotated[int, Field(ge=2)] = 32  # steps of the teacher that the first student replaces
    teacher_solver: WalkSolver = "ddim"  # of those steps; later teachers are students, and take DDIM's
    student_steps: tuple[Annotated[int, Field(ge=1)], ...] = (8, 4, 2, 1)  # one stage each; each divides the one before
    stage_steps: Count | tuple[Count, ...] = 500  # optimiser steps of each stage: one number, or one a stage
    batch_size: Annotated[int, Field(ge=1)] = 64  # images a step
    learning_rate: Rate | tuple[Rate, ...] = 1e-3  # at the start of each stage, falls to 0 in each; or one a stage
    clip: Annotated[float, Field(gt=0)] = 1.0  # largest global norm of a gradient (Salimans & Ho 2022, table 5)
    loss: Literal["truncated_snr", "v"] = "truncated_snr"  # weight on ‖x̂ − x̃‖² (Salimans & Ho 2022, §4)
    charbonnier: Annotated[float, Field(ge=0)] = 0.0  # c of √(w‖·‖² + c²) − c, a pixel; 0: the paper's squared error
    shards: Annotated[int, Field(ge=1, le=16)] = 2  # parts of a batch computed at the same time on a CPU
    checkpoint_every: Annotated[int, Field(ge=1)] = 250  # steps

    @model_validator(mode="after")
    def _stages_divide(self) -> Self:
        for before, after in pairwise((self.teacher_steps, *self.student_steps)):
            if after >= before or before % after:
                raise ValueError(
                    f"a student of {after} steps cannot replace {before} steps: it must be a smaller divisor"
                )
        if not self.student_steps:
            raise ValueError("student_steps: at least one stage is required")
        for name in ("stage_steps", "learning_rate"):
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != len(self.student_steps):
                raise ValueError(
                    f"{name}: {len(given)} given for {len(self.student_steps)} stages; one number, or one each"
                )
        return self

    def steps_of(self, stage: int) -> int:
        """Optimiser steps of a stage."""
        return self.stage_steps[stage] if isinstance(self.stage_steps, tuple) else self.stage_steps

    def rate_of(self, stage: int) -> float:
        """Learning rate at the start of a stage."""
        return self.learning_rate[stage] if isinstance(self.learning_rate, tuple) else self.learning_rate


@dataclass(frozen=True)
class DistillResult:
    """What came out."""

    students: tuple[int, ...]  # steps of each
    final_loss: dict[int, float]  # mean of the last steps of each stage


def distill(
    config: DistillConfig,
    *,
    teacher: Path,
    dataset: Path,
    out: Path,
    scratch: Path,
    seed: int,
    report: Reporter = SILENT,
) -> DistillResult:
    """Distil a teacher progressively (Salimans & Ho 2022, algorithm 2) and write one Diffusers folder a student.

    Args:
        config: see DistillConfig.
        teacher: a Diffusers folder. An `epsilon` network is refused: as α → 0 its x̂ is noise divided by zero.
        dataset: folder made by `prepare`; the train part is used.
        out: folder of the family; `out/<steps>/` is a student. It appears whole or not at all.
        scratch: checkpoints, of the step and of finished stages.
        seed: of the order of images, intervals and noises.
        report: where progress and losses go.

    Raises:
        ConfigError: the teacher predicts ε, or the dataset is not of its size.
        ArtifactError: the teacher or the dataset is damaged.
        DivergenceError: a loss is not finite.
    """
    stored, data = read_model(teacher), open_dataset(dataset)
    kind = str(stored.scheduler_config.get("prediction_type", "epsilon"))
    if kind == "epsilon":
        raise ConfigError(
            f"{teacher}: predicts epsilon, which cannot be distilled to few steps; allowed: v_prediction, sample"
        )
    schedule = schedule_from_diffusers(stored.scheduler_config)
    key = run_key(__name__, as_plain(config), {"dataset": data.sha256, "teacher": sha256_tree(teacher)}, seed)
    part = data.split("train")

    curves: dict[str, Curve] = {}
    weights: dict[int, Any] = {}
    parameters = stored.unet.parameters()
    for number, (before, after) in enumerate(pairwise((config.teacher_steps, *config.student_steps))):
        stage = Stage(config, number, Interval(after, before // after), schedule, kind, seed)
        checkpoints = Checkpoints.under(scratch, key + f"-{after}")
        parameters, curves[f"{after} steps"] = stage.run(stored.unet, parameters, part, checkpoints, report)
        weights[after] = parameters

    with atomic_folder(out) as folder:
        for steps, student in weights.items():
            stored.unet.update(student)
            write_model(folder / str(steps), stored.unet, stored.scheduler_config, _record(stored, config, steps, seed))
        write_json(folder / "curves.json", curves)
        save_curves(folder / "distillation.png", curves, "distillation loss")
    report.picture("distillation", out / "distillation.png")
    for after in config.student_steps:
        Checkpoints.under(scratch, key + f"-{after}").clear()
    return DistillResult(
        config.student_steps, {steps: curves[f"{steps} steps"][-1][1] for steps in config.student_steps}
    )


@dataclass(frozen=True)
class Stage:
    """One student taught by one teacher."""

    config: DistillConfig
    number: int
    interval: Interval
    schedule: NoiseSchedule
    kind: str
    seed: int

    def run(
        self, unet: UNet2D, teacher: Any, part: Split, checkpoints: Checkpoints, report: Reporter
    ) -> tuple[Any, Curve]:
        """Teach a student that starts from its teacher's weights; returns its weights and the loss curve."""
        steps = [self.config.steps_of(stage) for stage in range(len(self.config.student_steps))]
        frozen = UNet2D(unet.config)
        frozen.update(teacher)
        targets = self.targets(frozen)
        step = TrainStep(self.loss(unet), teacher, clip=self.config.clip, ema_decay=None, shards=self.config.shards)
        loop = Loop(
            name=f"distill_{self.interval.student_steps}",
            steps=steps[self.number],
            batch_of=lambda index: self.batch(part, targets, index),
            learning_rate_of=self.learning_rate_at,
            checkpoints=checkpoints,
            checkpoint_every=self.config.checkpoint_every,
            report=report,
            report_offset=sum(steps[: self.number]),
            report_total=sum(steps),
        )
        curve = loop.run(step)["training"]
        return step.parameters(), curve

    def learning_rate_at(self, step: int) -> float:
        """Linear to 0 within the stage (Salimans & Ho 2022, appendix): exactly 0 at its last step."""
        last, rate = self.config.steps_of(self.number) - 1, self.config.rate_of(self.number)
        return rate * (1 - step / last) if last else rate

    def denoiser(self, unet: UNet2D, labels: Sequence[mx.array]) -> Denoiser:
        """A network as a denoiser, with its labels (none or one array of them) bound."""
        return make_denoiser(lambda z, timestep: unet(z, timestep, *labels), self.schedule, self.kind)

    def targets(self, teacher: UNet2D) -> Callable[..., mx.array]:
        """(z, times, labels) → x̃, the teacher's weights compiled in.

        A function of its own: mx.compile mistakes weights that are held for weights that come in, where both are used.
        """
        # A student knows DDIM's steps from its own grid only: nothing else is asked of it when it teaches.
        solver: WalkSolver = self.config.teacher_solver if self.number == 0 else "ddim"

        def walk(z: mx.array, times: mx.array, *labels: mx.array) -> mx.array:
            return distillation_target(self.denoiser(teacher, labels), z, times, self.schedule, solver)

        return sharded_apply(walk, self.config.shards)

    def loss(self, student: UNet2D) -> Callable[[Any, Mapping[str, mx.array]], mx.array]:
        """The stage's loss: mean over a batch of w(λ_t) ‖x̂(z_t) − x̃‖², or of Charbonnier's distance."""
        c = self.config.charbonnier

        def loss(parameters: Any, batch: Mapping[str, mx.array]) -> mx.array:
            student.update(parameters)
            labels = [batch["labels"]] if "labels" in batch else []
            x_hat = self.denoiser(student, labels)(batch["z"], batch["t"])
            if c:
                return mx.mean(losses.weighted_charbonnier_error(x_hat, batch["target"], batch["weight"], c))
            return mx.mean(losses.weighted_squared_error(x_hat, batch["target"], batch["weight"]))

        return loss

    def batch(self, part: Split, targets: Callable[..., mx.array], step: int) -> dict[str, mx.array]:
        """z_t at the starts of intervals i ~ U{0..N−1}, and x̃, of one step: all drawn from (seed, stage, step)."""
        size, steps = self.config.batch_size, self.interval.student_steps
        rows = images_of_step(len(part), size, rng.derive(self.seed, "distill", steps), step)
        images = mx.array(part.batch(rows))
        # Strata as in training: every interval comes up equally often in a batch, to within one, in random order.
        generator = rng.generator(self.seed, "distill", steps, "index", step)
        index = np.floor((generator.permutation(size) + generator.random()) * steps / size)
        times = self.interval.times(index)
        alpha, sigma = (mx.array(level.astype(np.float32)) for level in self.schedule.alpha_sigma(times[:, 0]))
        noise = mx.random.normal(images.shape, key=rng.key(self.seed, "distill", steps, "noise", step))
        z = expand(alpha, noise) * images + expand(sigma, noise) * noise
        labels = labels_of(part, rows)
        clock = mx.array(times.astype(np.float32))
        log_snr = mx.array(self.schedule.log_snr(times[:, 0]).astype(np.float32))
        return {
            "z": z,
            "t": clock[:, 0],
            "target": targets(z, clock, *labels.values()),
            "weight": losses.weight(self.config.loss)(log_snr),
            **labels,
        }


def _record(stored: StoredModel, config: DistillConfig, steps: int, seed: int) -> dict[str, Any]:
    done = {"task": "distill", "method": "progressive", "steps": steps, "config": as_plain(config), "seed": seed}
    return {
        "history": [*stored.record.get("history", []), done],
        "sampler": {"solver": "ddim", "steps": steps, "grid": "uniform_time"},
    }
