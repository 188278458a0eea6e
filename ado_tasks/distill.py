"""Task `distill`: students that need ever fewer steps, each taught by the one before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, model_validator

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.config import as_plain, as_recorded, config
from ado_tasks.datasets.shards import Dataset, Split, open_dataset
from ado_tasks.diffusion import losses
from ado_tasks.diffusion.denoiser import Denoiser, make_denoiser
from ado_tasks.diffusion.parameterisation import expand
from ado_tasks.diffusion.schedules import NoiseSchedule, schedule_from_diffusers
from ado_tasks.distillation.consistency import tune
from ado_tasks.distillation.guided import fold
from ado_tasks.distillation.stopping import Stopping
from ado_tasks.errors import ConfigError
from ado_tasks.interop.diffusers_folder import StoredModel, read_model, write_model
from ado_tasks.models.unet import UNet2D
from ado_tasks.optimise.batches import images_of_step, labels_of
from ado_tasks.optimise.checkpoints import Checkpoints, run_key
from ado_tasks.optimise.consistency import ConsistencyConfig
from ado_tasks.optimise.cost import distillation_passes
from ado_tasks.optimise.guided import GuidedConfig
from ado_tasks.optimise.loop import Curve, Loop, Step
from ado_tasks.optimise.matching import Matching, MatchingConfig, MatchingStep
from ado_tasks.optimise.progressive import Interval, WalkSolver, distillation_target
from ado_tasks.optimise.steps import TrainStep
from ado_tasks.parallel import sharded_apply
from ado_tasks.pictures import save_curves
from ado_tasks.report import SILENT, Reporter
from ado_tasks.storage import atomic_folder, sha256_tree, write_json
from ado_tasks.variants import INDEX

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
V = TypeVar("V", int, float)


@config
class DistillConfig:
    """How students are taught."""

    method: ClassVar[str] = "progressive"
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
    matching: MatchingConfig | None = None  # what each student learns after its stage: see optimise/matching.py
    stop: Literal["never", "inferior"] = "never"  # inferior: no student follows one that is not as good as the teacher

    @model_validator(mode="after")
    def _stages_divide(self) -> Self:
        for before, after in pairwise((self.teacher_steps, *self.student_steps)):
            if after >= before or before % after:
                raise ValueError(
                    f"a student of {after} steps cannot replace {before} steps: it must be a smaller divisor"
                )
        if not self.student_steps:
            raise ValueError("student_steps: at least one stage is required")
        given = {"stage_steps": self.stage_steps, "learning_rate": self.learning_rate}
        if self.matching:
            given |= {"matching.steps": self.matching.steps, "matching.learning_rate": self.matching.learning_rate}
            if self.matching.adversarial:
                given["matching.adversarial.weight"] = self.matching.adversarial.weight
        for name, values in given.items():
            if isinstance(values, tuple) and len(values) != len(self.student_steps):
                raise ValueError(
                    f"{name}: {len(values)} given for {len(self.student_steps)} stages; one number, or one each"
                )
        return self

    def steps_of(self, stage: int) -> int:
        """Optimiser steps of a stage."""
        return _of_stage(self.stage_steps, stage)

    def rate_of(self, stage: int) -> float:
        """Learning rate at the start of a stage."""
        return _of_stage(self.learning_rate, stage)

    def matching_steps_of(self, stage: int) -> int:
        """Steps of distribution matching after a stage."""
        return self.matching.steps[stage] if self.matching else 0

    def adversarial_weight_of(self, stage: int) -> float:
        """Weight of the adversarial term in a stage's matching; 0 where there is none."""
        asked = self.matching.adversarial if self.matching else None
        return _of_stage(asked.weight, stage) if asked else 0.0

    def total_steps(self) -> int:
        """Optimiser steps of everything."""
        return sum(self.steps_of(stage) + self.matching_steps_of(stage) for stage in range(len(self.student_steps)))


def _of_stage(given: V | tuple[V, ...], stage: int) -> V:
    return given[stage] if isinstance(given, tuple) else given


@dataclass(frozen=True)
class DistillResult:
    """What came out."""

    students: tuple[int, ...]  # steps of each
    final_loss: dict[int, float]  # mean of the last steps of each stage
    guided_loss: float | None = None  # with `guided`, whose folders are of weights, not of steps


def distill(
    config: DistillConfig | ConsistencyConfig | GuidedConfig,
    *,
    teacher: Path,
    dataset: Path,
    out: Path,
    scratch: Path,
    seed: int,
    start: Path | None = None,
    features: Path | None = None,
    anchor: Path | None = None,
    report: Reporter = SILENT,
) -> DistillResult:
    """Make students of a teacher that need few steps, one Diffusers folder each. `method` says how.

    `consistency`: tuning to consistency, Geng et al. 2024 (see distillation/consistency.py). `guided`: classifier-free
    guidance folded into one network, Meng et al. 2023: as many steps as before, half the evaluations, one folder for
    each guidance weight, from which few steps are taught next (see distillation/guided.py). Where nothing is said,
    `progressive`: Salimans & Ho 2022, algorithm 2. Where `matching` says so, a student's samples are then brought to
    the first teacher's distribution (Yin et al. 2024), and it is that student which teaches the next. With
    `stop: inferior` the chain ends at the first student that is not as good as the teacher on the selection part;
    `out/index.json` then says where and why (see distillation/stopping.py).

    Args:
        config: see DistillConfig, ConsistencyConfig and GuidedConfig.
        teacher: a Diffusers folder. An `epsilon` network is refused: as α → 0 its x̂ is noise divided by zero.
        dataset: folder made by `prepare`; the train part is used.
        out: folder of the family; `out/<steps>/` is a student. It appears whole or not at all.
        scratch: checkpoints, of the step and of finished stages.
        seed: of the order of images, intervals and noises.
        start: with `consistency`, a Diffusers folder to begin with in the teacher's place, such as a student's.
        features: with `stop: inferior`, folder made by `features`; otherwise not read.
        anchor: with `stop: inferior`, folder made by `anchor` of this teacher: the margin; otherwise not read.
        report: where progress and losses go.

    Raises:
        ConfigError: the teacher predicts ε, the dataset has other sizes or more classes than it, `start` is given to
            another method, or `features` or `anchor` is missing where the chain is to stop itself.
        ArtifactError: the teacher or the dataset is damaged.
        DivergenceError: a loss is not finite.
    """
    given: dict[str, Any] = {
        "teacher": teacher, "dataset": dataset, "out": out, "scratch": scratch, "seed": seed, "report": report
    }  # fmt: skip
    if isinstance(config, ConsistencyConfig):
        curve = tune(config, start=start, **given)
        return DistillResult(config.student_steps, dict.fromkeys(config.student_steps, curve[-1][1]))
    if start is not None:
        raise ConfigError(f"--start {start}: other students begin as their teacher; allowed with: consistency")
    if isinstance(config, GuidedConfig):
        return DistillResult((), {}, fold(config, **given)[-1][1])
    return _progressive(config, features=features, anchor=anchor, **given)


def _progressive(
    config: DistillConfig, *, teacher: Path, dataset: Path, out: Path, scratch: Path, seed: int, features: Path | None,
    anchor: Path | None, report: Reporter,
) -> DistillResult:  # fmt: skip
    """A chain of students, each taught by the one before; see `distill`."""
    stored, data = read_model(teacher), open_dataset(dataset)
    kind = str(stored.scheduler_config.get("prediction_type", "epsilon"))
    if kind == "epsilon":
        raise ConfigError(
            f"{teacher}: predicts epsilon, which cannot be distilled to few steps; allowed: v_prediction, sample"
        )
    stored.unet.config.check_data(data.shape, data.num_classes, f"{teacher}/unet/config.json")
    schedule = schedule_from_diffusers(stored.scheduler_config)
    stopping = _stopping(config, data, features, anchor, seed)
    key = run_key(__name__, as_plain(config), {"dataset": data.sha256, "teacher": sha256_tree(teacher)}, seed)
    part = data.split("train")

    curves: dict[str, Curve] = {}
    weights: dict[int, Any] = {}
    first = parameters = stored.unet.parameters()
    for number, (before, after) in enumerate(pairwise((config.teacher_steps, *config.student_steps))):
        stage = Stage(config, number, Interval(after, before // after), schedule, kind, seed)
        checkpoints = Checkpoints.under(scratch, key + f"-{after}")
        student, curves[f"{after} steps"] = stage.run(stored.unet, parameters, part, checkpoints, report)
        if config.matching_steps_of(number):
            checkpoints = Checkpoints.under(scratch, key + f"-{after}-matched")
            student, curve = stage.match(stored.unet, student, parameters, first, part, checkpoints, report)
            curves[f"{after} steps, matching"] = curve
        parameters = weights[after] = student
        if stopping and not stopping.goes_on(stored, student, after, report):
            break

    with atomic_folder(out) as folder:
        for steps, student in weights.items():
            stored.unet.update(student)
            write_model(folder / str(steps), stored.unet, stored.scheduler_config, _record(stored, config, steps, seed))
        write_json(folder / "curves.json", curves)
        save_curves(folder / "distillation.png", curves, "distillation loss")
        if stopping:
            write_json(folder / INDEX, stopping.index(config.student_steps))
    report.picture("distillation", out / "distillation.png")
    spent = distillation_passes(_record(stored, config, list(weights)[-1], seed))
    report.metric("evaluations", spent.evaluations if spent else 0)
    for after in config.student_steps:
        Checkpoints.under(scratch, key + f"-{after}").clear()
        Checkpoints.under(scratch, key + f"-{after}-matched").clear()
    return DistillResult(tuple(weights), {steps: curves[f"{steps} steps"][-1][1] for steps in weights})


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
        frozen = UNet2D(unet.config)
        frozen.update(teacher)
        targets = self.targets(frozen)
        step = TrainStep(self.loss(unet), teacher, clip=self.config.clip, ema_decay=None, shards=self.config.shards)
        curve = self._repeat(
            step, f"distill_{self.interval.student_steps}", self.config.steps_of(self.number),
            lambda index: self.batch(part, targets, index), self.learning_rate_at, checkpoints, report, 0,
        )  # fmt: skip
        return step.parameters(), curve

    def match(
        self, unet: UNet2D, student: Any, before: Any, first: Any, part: Split, checkpoints: Checkpoints,
        report: Reporter,
    ) -> tuple[Any, Curve]:  # fmt: skip
        """Bring the stage's student to the first teacher's distribution; returns its weights and the loss curve."""
        assert self.config.matching is not None
        matching = Matching(
            self.config.matching, self.interval, self.config.matching_steps_of(self.number),
            _of_stage(self.config.matching.learning_rate, self.number), self.schedule, self.kind,
            self.seed, self.config.charbonnier, self.config.adversarial_weight_of(self.number),
        )  # fmt: skip
        step = MatchingStep(matching, unet, student, before, first, self.config.clip, self.config.shards, part.shape)
        curve = self._repeat(
            step, f"match_{self.interval.student_steps}", matching.steps, lambda index: matching.batch(part, index),
            matching.learning_rate_at, checkpoints, report, self.config.steps_of(self.number),
        )  # fmt: skip
        return step.parameters(), curve

    def _repeat(
        self, step: Step, name: str, steps: int, batch_of: Callable[[int], Mapping[str, mx.array]],
        rate_of: Callable[[int], float], checkpoints: Checkpoints, report: Reporter, offset: int,
    ) -> Curve:  # fmt: skip
        """Run the loop; progress counts the steps of all stages."""
        done = sum(self.config.steps_of(each) + self.config.matching_steps_of(each) for each in range(self.number))
        loop = Loop(
            name=name, steps=steps, batch_of=batch_of, learning_rate_of=rate_of, checkpoints=checkpoints,
            checkpoint_every=self.config.checkpoint_every, report=report,
            report_offset=done + offset, report_total=self.config.total_steps(),
        )  # fmt: skip
        return loop.run(step)["training"]

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
    stage = config.student_steps.index(steps)
    matched = config.matching_steps_of(stage) > 0
    method = "progressive, matching" if matched else "progressive"
    if matched and config.adversarial_weight_of(stage):
        method += ", adversarial"
    settings = as_recorded(config, stop="never")
    if config.matching and config.matching.adversarial is None:
        del settings["matching"]["adversarial"]  # as records were before there was such a key
    done = {"task": "distill", "method": method, "steps": steps, "config": settings, "seed": seed}
    return {
        "history": [*stored.record.get("history", []), done],
        "sampler": {"solver": "ddim", "steps": steps, "grid": "uniform_time"},
    }
