"""How students of few steps are taught: the keys of `distill.<family>` where its method is progressive."""

from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from ado_tasks.config import config
from ado_tasks.hardware.capability import Precision
from ado_tasks.optimise.matching import MatchingConfig
from ado_tasks.optimise.progressive import Interval, WalkSolver
from ado_tasks.optimise.steps import Optimiser

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
APART = 1e-4  # least distance of two of a student's times: nearer ones may be one number in float32
V = TypeVar("V", int, float)


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
    # Network evaluations of each of these walks, at most teacher_steps, of DDIM: at the steps between the teacher's
    # estimate goes on in a straight line. How far walks stray for it: measure it, docs/science.md. None: one a step
    walk_evaluations: Annotated[int, Field(ge=2)] | None = None
    # Noises from which the first student walks too, once it is taught, in steps of its own: what later students learn
    # from beside the teacher's walks, which are dearer and so fewer. None: the teacher's alone
    further_walks: Annotated[int, Field(ge=1)] | None = None
    # Of the walks that a step sees then, how many are the teacher's, who errs less. None: as many as they are of all
    teachers_share: Annotated[float, Field(gt=0, lt=1)] | None = None
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
    def _walks_are_asked(self) -> Self:
        if self.walk_evaluations is None:
            return self
        if self.walks is None or self.teacher_solver != "ddim":
            raise ValueError(
                "walk_evaluations: of the teacher's walks, DDIM's alone; allowed: with walks and teacher_solver: ddim "
                f"(here {self.teacher_solver}{'' if self.walks else ', and no walks'})"
            )
        if self.walk_evaluations > self.teacher_steps:
            raise ValueError(
                f"walk_evaluations: {self.walk_evaluations}; allowed: at most teacher_steps, {self.teacher_steps}"
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
        if self.teachers_share and not self.further_walks:
            raise ValueError("teachers_share: all walks are the teacher's; allowed: with further_walks")
        for size in (self.batch_size, *([self.matching.batch_size] if ends and self.matching else [])):
            if self.teachers_share and not 0 < round(self.teachers_share * size) < size:
                raise ValueError(
                    f"teachers_share: {self.teachers_share} of a batch of {size} leaves one kind of walks out; "
                    "allowed: a share of which each kind has one walk or more"
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
        if ends and self.matching and not self.matching.regression:
            raise ValueError(
                "matching.hold_on_to: walks with regression: 0 holds on to nothing; allowed: a regression above 0, or "
                "teacher"
            )
        if ends and self.matching and self.matching.adversarial:
            raise ValueError("matching.hold_on_to: walks is not supported with matching.adversarial; allowed: teacher")
        return self

    def steps_of(self, stage: int) -> int:
        """Optimiser steps of a stage."""
        return of_stage(self.stage_steps, stage)

    def rate_of(self, stage: int) -> float:
        """Learning rate at the start of a stage."""
        return of_stage(self.learning_rate, stage)

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
        return of_stage(asked.weight, stage) if asked else 0.0

    def total_steps(self) -> int:
        """Optimiser steps of everything."""
        return sum(self.steps_of(stage) + self.matching_steps_of(stage) for stage in range(len(self.student_steps)))


def of_stage(given: V | tuple[V, ...], stage: int) -> V:
    """What holds in a stage, of one number for all or one for each."""
    return given[stage] if isinstance(given, tuple) else given
