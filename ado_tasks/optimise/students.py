"""Students of few steps, one stage each: what a stage is configured by, sees and learns (Salimans & Ho 2022)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, model_validator

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.config import config
from ado_tasks.datasets.shards import Split
from ado_tasks.diffusion import losses
from ado_tasks.diffusion.denoiser import Denoiser, make_denoiser
from ado_tasks.diffusion.parameterisation import expand
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.hardware.capability import Precision
from ado_tasks.models.precision import in_precision, lowered
from ado_tasks.models.unet import UNet2D
from ado_tasks.optimise.batches import images_of_step, labels_of
from ado_tasks.optimise.checkpoints import Checkpoints
from ado_tasks.optimise.loop import Curve, Loop, Step
from ado_tasks.optimise.matching import Matching, MatchingConfig, MatchingStep
from ado_tasks.optimise.progressive import Interval, WalkSolver, distillation_target, levels, target
from ado_tasks.optimise.steps import Optimiser, TrainStep
from ado_tasks.optimise.walks import Walks
from ado_tasks.parallel import sharded_apply
from ado_tasks.report import Reporter

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
APART = 1e-4  # least distance of two of a student's times: nearer ones may be one number in float32
V = TypeVar("V", int, float)
ASKED = ("z", "times", "labels")  # of a draw: what the teacher's target is computed from, in this order


@config
class DistillConfig:
    """How students are taught."""

    method: ClassVar[str] = "progressive"
    teacher_steps: Annotated[int, Field(ge=2)] = 32  # steps of the teacher that the first student replaces
    teacher_solver: WalkSolver = "ddim"  # of those steps; later teachers are students, and take DDIM's
    student_steps: tuple[Annotated[int, Field(ge=1)], ...] = (8, 4, 2, 1)  # one stage each; each divides the one before
    # Where the student of most steps takes them, from 1 to 0 (one number more than it has steps), the others every so
    # manyth; steps of teachers lie evenly between. None: uniform
    times: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None
    stage_steps: Count | tuple[Count, ...] = 500  # optimiser steps of each stage: one number, or one a stage
    batch_size: Annotated[int, Field(ge=1)] = 64  # images a step
    learning_rate: Rate | tuple[Rate, ...] = 1e-3  # at the start of each stage, falls to 0 in each; or one a stage
    optimiser: Optimiser = "adam"  # muon: learns more of as many images, see optimise/muon.py; matching's is Adam
    clip: Annotated[float, Field(gt=0)] = 1.0  # largest global norm of a gradient (Salimans & Ho 2022, table 5)
    loss: Literal["truncated_snr", "v"] = "truncated_snr"  # weight on ‖x̂ − x̃‖² (Salimans & Ho 2022, §4)
    charbonnier: Annotated[float, Field(ge=0)] = 0.0  # c of √(w‖·‖² + c²) − c, a pixel; 0: the paper's squared error
    # Who a later stage learns from: the student before it (Salimans & Ho 2022), or the teacher itself, in as many steps
    # of its own as the first stage's: dearer, and nothing that a student has lost is handed on. Weights are inherited
    # from the student before in both.
    taught_by: Literal["previous", "first"] = "previous"
    shards: Annotated[int, Field(ge=1, le=16)] = 2  # parts of a batch computed at the same time on a CPU
    # Noises from which the first teacher walks to images once, in teacher_steps uniform steps of float32; every stage
    # then learns from the states on these walks, all held in memory, and the first student's steps need not divide
    # those: see optimise/walks.py. None: from noised images, the teacher asked at each step
    walks: Annotated[int, Field(ge=1)] | None = None
    # Noises from which the first student walks too, once it is taught, in steps of its own: what later students learn
    # from beside the teacher's walks, which are dearer and so fewer. None: the teacher's alone
    further_walks: Annotated[int, Field(ge=1)] | None = None
    precision: Precision = "float32"  # of a pass of student or teacher; weights, state, matching's scores are float32
    targets_together: Annotated[int, Field(ge=1)] = 1  # steps whose targets are computed at once: faster, more memory
    checkpoint_every: Annotated[int, Field(ge=1)] = 250  # steps
    matching: MatchingConfig | None = None  # what each student learns after its stage: see optimise/matching.py
    stop: Literal["never", "inferior"] = "never"  # inferior: no student follows one that is not as good as the teacher

    @model_validator(mode="after")
    def _stages_divide(self) -> Self:
        for stage, (before, after) in enumerate(pairwise((self.teacher_steps, *self.student_steps))):
            anywhere = stage == 0 and self.walks is not None
            if after >= before or (before % after and not anywhere):
                raise ValueError(
                    f"student_steps: a student of {after} steps cannot replace {before} steps; allowed: a smaller "
                    + ("number" if anywhere else "divisor")
                )
        if not self.student_steps:
            raise ValueError("student_steps: at least one stage is required")
        if self.precision == "float16" and self.matching and self.matching.adversarial:
            raise ValueError(
                "precision: float16 with matching.adversarial is not supported; allowed: bfloat16, float32"
            )
        given = {"stage_steps": self.stage_steps, "learning_rate": self.learning_rate}
        if self.matching:
            given |= {"matching.steps": self.matching.steps, "matching.learning_rate": self.matching.learning_rate}
            if self.matching.adversarial:
                given["matching.adversarial.weight"] = self.matching.adversarial.weight
        for name, values in given.items():
            if isinstance(values, tuple) and len(values) != len(self.student_steps):
                raise ValueError(
                    f"{name}: {len(values)} given for {len(self.student_steps)} stages; allowed: "
                    + ("one each" if name == "matching.steps" else "one number, or one each")
                )
        return self

    @model_validator(mode="after")
    def _times_fall(self) -> Self:
        if self.times is None:
            return self
        wanted = self.student_steps[0] + 1
        falls = all(above - below >= APART for above, below in pairwise(self.times))
        if len(self.times) != wanted or not falls or (self.times[0], self.times[-1]) != (1, 0):
            raise ValueError(
                f"times: {self.times}: {wanted} falling numbers are required (of {wanted - 1} steps, the first of "
                f"student_steps), from 1 to 0 and {APART} or more apart"
            )
        return self

    @model_validator(mode="after")
    def _walks_fit(self) -> Self:
        ends = self.matching is not None and self.matching.hold_on_to == "walks"
        if self.further_walks and (self.walks is None or len(self.student_steps) < 2):
            raise ValueError(
                "further_walks: they are the first student's, beside its teacher's, for later students; allowed: with "
                "walks and two student_steps or more"
            )
        if self.walks is None:
            if ends:
                raise ValueError(
                    "matching.hold_on_to: walks, and there are none; allowed: teacher, or a number of walks"
                )
            return self
        if self.taught_by == "first" or self.targets_together > 1:
            raise ValueError(
                "walks: they are all that is taught by; allowed: taught_by: previous with targets_together: 1"
            )
        if ends and self.matching and self.matching.adversarial:
            raise ValueError("matching.hold_on_to: walks is not supported with matching.adversarial; allowed: teacher")
        return self

    def steps_of(self, stage: int) -> int:
        """Optimiser steps of a stage."""
        return _of_stage(self.stage_steps, stage)

    def rate_of(self, stage: int) -> float:
        """Learning rate at the start of a stage."""
        return _of_stage(self.learning_rate, stage)

    def walk_of(self, stage: int) -> int:
        """Steps that the teacher of a stage takes in the place of one of the student's."""
        first = stage == 0 or self.taught_by == "first"
        return (self.teacher_steps if first else self.student_steps[stage - 1]) // self.student_steps[stage]

    def interval_of(self, stage: int) -> Interval:
        """Where the student of a stage steps, and its teacher between."""
        return Interval(self.student_steps[stage], self.walk_of(stage), self.times)

    def solver_of(self, stage: int) -> WalkSolver:
        """Of those steps. A student knows DDIM's from its own grid only: nothing else is asked of one that teaches."""
        return self.teacher_solver if stage == 0 or self.taught_by == "first" else "ddim"

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


def with_weights(like: UNet2D, weights: Any) -> UNet2D:
    """Another network of the same architecture, with these weights."""
    net = UNet2D(like.config)
    net.update(weights)
    return net


def _of_stage(given: V | tuple[V, ...], stage: int) -> V:
    return given[stage] if isinstance(given, tuple) else given


@dataclass(frozen=True)
class Stage:
    """One student taught by one teacher."""

    config: DistillConfig
    number: int
    interval: Interval
    schedule: NoiseSchedule
    kind: str
    seed: int
    walks: Walks | None = None  # where students learn from these

    def run(
        self, student: UNet2D, teacher: UNet2D, part: Split, checkpoints: Checkpoints, report: Reporter
    ) -> tuple[Any, Curve]:
        """Teach a student that starts from the weights it has; returns its new weights and the loss curve."""
        if self.walks:
            batches = self.batch_of_legs
        else:
            frozen = with_weights(teacher, lowered(teacher.parameters(), self.config.precision))
            batches = self.batches(part, self.targets(frozen))
        loss = self.loss(UNet2D(student.config))
        step = TrainStep(
            loss, student.parameters(), clip=self.config.clip, ema_decay=None, shards=self.config.shards,
            optimiser=self.config.optimiser,
        )  # fmt: skip
        curve = self._repeat(
            step, f"distill_{self.interval.student_steps}", self.config.steps_of(self.number),
            batches, self.learning_rate_at, checkpoints, report, 0,
        )  # fmt: skip
        return step.parameters(), curve

    def match(
        self, student: UNet2D, before: UNet2D, first: UNet2D, part: Split, checkpoints: Checkpoints, report: Reporter
    ) -> tuple[Any, Curve]:
        """Bring the stage's student to the first teacher's distribution; returns its weights and the loss curve.

        `before`: who taught it in this stage.
        """
        assert self.config.matching is not None
        matching = Matching(
            self.config.matching, self.interval, self.config.matching_steps_of(self.number),
            _of_stage(self.config.matching.learning_rate, self.number), self.schedule, self.kind,
            self.seed, self.config.charbonnier, self.config.adversarial_weight_of(self.number),
            self.config.solver_of(self.number), self.config.precision,
        )  # fmt: skip
        step = MatchingStep(matching, student, before, first, self.config.clip, self.config.shards, part.shape)

        def batch(index: int) -> dict[str, mx.array]:
            return {**matching.batch(part, index), **self.ends_of_walks(index)}

        curve = self._repeat(
            step, f"match_{self.interval.student_steps}", matching.steps, batch, matching.learning_rate_at,
            checkpoints, report, self.config.steps_of(self.number),
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

    def batch_of_legs(self, step: int) -> dict[str, mx.array]:
        """States at the student's times on the teacher's walks, each with the x̃ that leads to the next."""
        assert self.walks is not None
        batch, leg = self.walks.legs(step, self.config.batch_size, self.interval.student_steps)
        grid, z = self.interval.grid(), batch["z"]
        t, s = (mx.array(times.astype(np.float32)) for times in (grid[leg], grid[leg + 1]))
        wanted = target(batch.pop("end"), z, *levels(t, z, self.schedule), *levels(s, z, self.schedule))
        return {**batch, "t": t, "target": wanted, "weight": losses.weight(self.config.loss)(self.schedule.log_snr(t))}

    def ends_of_walks(self, step: int) -> dict[str, mx.array]:
        """What matching samples from and holds on to: noises of walks and their ends, where it is to."""
        if self.walks is None or self.config.matching is None or self.config.matching.hold_on_to == "teacher":
            return {}
        return self.walks.pairs(step, self.config.matching.batch_size, self.interval.student_steps)

    def learning_rate_at(self, step: int) -> float:
        """Linear to 0 within the stage (Salimans & Ho 2022, appendix): exactly 0 at its last step."""
        last, rate = self.config.steps_of(self.number) - 1, self.config.rate_of(self.number)
        return rate * (1 - step / last) if last else rate

    def denoiser(self, unet: UNet2D, labels: Sequence[mx.array]) -> Denoiser:
        """A network as a denoiser, with its labels (none or one array of them) bound."""
        apply = in_precision(unet, self.config.precision)
        return make_denoiser(lambda z, timestep: apply(z, timestep, *labels), self.schedule, self.kind)

    def targets(self, teacher: UNet2D) -> Callable[..., mx.array]:
        """(z, times, labels) → x̃, the teacher's weights compiled in.

        A function of its own: mx.compile mistakes weights that are held for weights that come in, where both are used.
        """
        solver = self.config.solver_of(self.number)

        def walk(z: mx.array, times: mx.array, *labels: mx.array) -> mx.array:
            return distillation_target(self.denoiser(teacher, labels), z, times, self.schedule, solver)

        return sharded_apply(walk, self.config.shards)

    def loss(self, student: UNet2D) -> Callable[[Any, Mapping[str, mx.array]], mx.array]:
        """The stage's loss: mean over a batch of w(λ_t) ‖x̂(z_t) − x̃‖², or of Charbonnier's distance."""
        c = self.config.charbonnier

        def loss(parameters: Any, batch: Mapping[str, mx.array]) -> mx.array:
            student.update(lowered(parameters, self.config.precision))
            labels = [batch["labels"]] if "labels" in batch else []
            x_hat = self.denoiser(student, labels)(batch["z"], batch["t"])
            if c:
                return mx.mean(losses.weighted_charbonnier_error(x_hat, batch["target"], batch["weight"], c))
            return mx.mean(losses.weighted_squared_error(x_hat, batch["target"], batch["weight"]))

        return loss

    def batches(self, part: Split, targets: Callable[..., mx.array]) -> Callable[[int], dict[str, mx.array]]:
        """The batch of each step, with its targets: of as many steps at once as `targets_together` says.

        A teacher does not learn, so what it is asked does not depend on the steps between; a small batch keeps a CPU
        waiting. Steps belong together by their number: a resumed run asks for the same ones.
        """
        together, total = self.config.targets_together, self.config.steps_of(self.number)
        known: dict[int, dict[str, mx.array]] = {}

        def batch(step: int) -> dict[str, mx.array]:
            if step not in known:
                known.clear()
                first = step - step % together
                drawn = [self.draw(part, each) for each in range(first, min(first + together, total))]
                asked = [mx.concatenate([each[name] for each in drawn]) for name in drawn[0] if name in ASKED]
                answers = mx.split(targets(*asked), len(drawn))
                for number, (each, answer) in enumerate(zip(drawn, answers, strict=True)):
                    known[first + number] = {**each, "t": each["times"][:, 0], "target": answer}
            found = dict(known[step])
            del found["times"]
            return found

        return batch

    def draw(self, part: Split, step: int) -> dict[str, mx.array]:
        """z_t at the starts of intervals i ~ U{0..N−1} of one step: all drawn from (seed, stage, step)."""
        size, steps = self.config.batch_size, self.interval.student_steps
        rows = images_of_step(len(part), size, rng.derive(self.seed, "distill", steps), step)
        images = mx.array(part.batch(rows))
        # Strata as in training: every interval comes up equally often in a batch, to within one, in random order.
        generator = rng.generator(self.seed, "distill", steps, "index", step)
        index = np.floor((generator.permutation(size) + generator.random()) * steps / size)
        times = self.interval.times(index)
        alpha, sigma = (mx.array(level.astype(np.float32)) for level in self.schedule.alpha_sigma(times[:, 0]))
        noise = mx.random.normal(images.shape, key=rng.key(self.seed, "distill", steps, "noise", step))
        log_snr = mx.array(self.schedule.log_snr(times[:, 0]).astype(np.float32))
        return {
            "z": expand(alpha, noise) * images + expand(sigma, noise) * noise,
            "times": mx.array(times.astype(np.float32)),
            "weight": losses.weight(self.config.loss)(log_snr),
            **labels_of(part, rows),
        }
