"""Students of few steps, one stage each: what it sees and what it learns (Salimans & Ho 2022)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.datasets.shards import Split
from ado_tasks.diffusion import losses
from ado_tasks.diffusion.denoiser import Denoiser, make_denoiser
from ado_tasks.diffusion.parameterisation import expand
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.models.precision import in_precision, lowered
from ado_tasks.models.unet import UNet2D
from ado_tasks.optimise.batches import images_of_step, labels_of
from ado_tasks.optimise.checkpoints import Checkpoints
from ado_tasks.optimise.distill_config import DistillConfig, of_stage
from ado_tasks.optimise.loop import Curve, Loop, Step
from ado_tasks.optimise.matching import Matching, MatchingStep
from ado_tasks.optimise.progressive import Interval, distillation_target, levels, target
from ado_tasks.optimise.steps import TrainStep
from ado_tasks.optimise.walks import Walks
from ado_tasks.parallel import sharded_apply
from ado_tasks.report import Reporter

ASKED = ("z", "times", "labels")  # of a draw: what the teacher's target is computed from, in this order


def with_weights(like: UNet2D, weights: Any) -> UNet2D:
    """Another network of the same architecture, with these weights."""
    net = UNet2D(like.config)
    net.update(weights)
    return net


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
            of_stage(self.config.matching.learning_rate, self.number), self.schedule, self.kind,
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
