"""Distribution matching: a few-step student is moved until its samples are spread as its teacher's are.

Yin et al. 2024a (DMD, arXiv:2311.18828): the gradient of KL(student's samples ‖ teacher's) is the difference of two
scores at noised samples. One is the teacher's; the other a *critic*'s, a copy of the teacher that keeps learning to
denoise what the student makes. A student that regresses on its teacher's pictures blurs those it cannot place; this
mends that, in a small part of the training that regression takes. Two time-scales (a critic that learns faster than
the student) instead of a large set of stored pairs: Yin et al. 2024b (DMD2, arXiv:2405.14867), §4. Real images may have
a say too: see optimise/adversarial.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

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
from ado_tasks.optimise.adversarial import AdversarialConfig, Judge, head_loss, logits, new_head, student_slope
from ado_tasks.optimise.batches import images_of_step, labels_of
from ado_tasks.optimise.progressive import Interval, WalkSolver, distillation_target, student_step
from ado_tasks.optimise.steps import TrainStep
from ado_tasks.parallel import Parts, Tree

Rate = Annotated[float, Field(gt=0, lt=1)]
Time = Annotated[float, Field(gt=0, lt=1)]
Batch = Mapping[str, mx.array]
Nets = Mapping[str, UNet2D]  # by role: "student", "teacher", "critic", "before"

TINY = 1e-6  # against 0/0 where a sample is the teacher's x̂ already


@config
class MatchingConfig:
    """How a distilled student's samples are brought to its teacher's distribution."""

    steps: tuple[
        Annotated[int, Field(ge=0)], ...
    ]  # of the student, one number for each student; 0: it is left as it is
    batch_size: Annotated[int, Field(ge=2)] = 32  # samples a step
    learning_rate: Rate | tuple[Rate, ...] = 3e-4  # of the student, falls to 0; one number, or one for each student
    critic_learning_rate: Rate = 3e-3  # falls to half
    regression: Annotated[float, Field(ge=0)] = 0.05  # weight of staying near what the stage's teacher makes
    # or, where students learn from walks, near the ends of these: of the pictures that the first teacher makes from the
    # same noise. Samples then come from the walks' noises alone, of which there must be many
    hold_on_to: Literal["teacher", "walks"] = "teacher"
    lowest_time: Time = 0.02  # samples are noised to times between
    highest_time: Time = 0.98  # these (Yin et al. 2024a, §3.2)
    average: Annotated[float, Field(ge=0, lt=1)] = 0.95  # decay of the averaged weights, which are what is kept
    adversarial: AdversarialConfig | None = None  # real images beside the teacher's score: see optimise/adversarial.py


def matching_target(x: mx.array, teacher: mx.array, critic: mx.array) -> mx.array:
    """Where each sample should move: x − (critic's x̂ − teacher's x̂)/mean|x − teacher's x̂|. Shapes (B, …); no gradient.

    Half the squared distance to it has the gradient of Yin et al. 2024a, eq. 7, with the weight of eq. 8: the same for
    every sample and noise level. Where critic and teacher agree, it is x itself.
    """
    scale = mx.mean(mx.abs(x - teacher).reshape(x.shape[0], -1), axis=1)
    return mx.stop_gradient(x - (critic - teacher) / expand(mx.maximum(scale, TINY), x))


@dataclass(frozen=True)
class Matching:
    """The matching of one student: what its steps see, and the functions they are made of."""

    config: MatchingConfig
    interval: Interval  # of the student's stage: N student steps, each in the place of K of its own teacher's
    steps: int
    learning_rate: float
    schedule: NoiseSchedule
    kind: str
    seed: int
    charbonnier: float  # c of the regression's distance, as in the stage before; 0: squared
    adversarial: float = 0.0  # weight of the term that looks at real images; 0: there is none
    solver: WalkSolver = "ddim"  # of the stage's teacher
    precision: Precision = "float32"  # of the passes that have a gradient; scores, whose difference moves samples, and
    # what is sampled are float32

    def learning_rate_at(self, step: int) -> float:
        """Linear to 0."""
        return self.learning_rate * (1 - step / max(1, self.steps - 1))

    def batch(self, part: Split, step: int) -> dict[str, mx.array]:
        """Noise to sample from, labels as frequent as in the train part, and two noise levels with their noises."""
        n, size = self.interval.student_steps, self.config.batch_size
        rows = images_of_step(len(part), size, rng.derive(self.seed, "match", n), step)
        drawn = {"noise": mx.random.normal((size, *part.shape), key=rng.key(self.seed, "match", n, "noise", step))}
        low, high = self.config.lowest_time, self.config.highest_time
        for name in ("student", "critic"):
            generator = rng.generator(self.seed, "match", n, name, step)
            times = low + (high - low) * (generator.permutation(size) + generator.random()) / size  # one a stratum
            drawn[f"{name}_time"] = mx.array(times.astype(np.float32))
            key = rng.key(self.seed, "match", n, f"{name} noise", step)
            drawn[f"{name}_noise"] = mx.random.normal((size, *part.shape), key=key)
        if self.adversarial:
            drawn["real"] = mx.array(part.batch(rows))  # of the same classes as the samples, one by one
            drawn["real_noise"] = mx.random.normal(
                (size, *part.shape), key=rng.key(self.seed, "match", n, "real noise", step)
            )
        return {**drawn, **labels_of(part, rows)}

    # --- on arrays

    def denoiser(self, net: UNet2D, weights: Tree, batch: Batch, precision: Precision = "float32") -> Denoiser:
        """The network with these weights, and the batch's labels bound."""
        labels = [batch["labels"]] if "labels" in batch else []
        network = in_precision(net, precision)

        def apply(z: mx.array, timestep: mx.array) -> mx.array:
            net.update(lowered(weights, precision))
            return network(z, timestep, *labels)

        return make_denoiser(apply, self.schedule, self.kind)

    def judge(
        self, net: UNet2D, weights: Tree, batch: Batch, times: mx.array, precision: Precision = "float32"
    ) -> Judge:
        """The critic with its head, {"net", "head"}: noisy images to x̂ and to the logit that they are real."""
        labels = [batch["labels"]] if "labels" in batch else []

        def judge(z: mx.array) -> tuple[mx.array, mx.array]:
            middles = []

            def apply(z: mx.array, timestep: mx.array) -> mx.array:
                net.update(lowered(weights["net"], precision))
                output, middle = net.with_middle(z, timestep, *labels)
                middles.append(middle)
                return output

            x_hat = make_denoiser(apply, self.schedule, self.kind)(z, times)
            return x_hat, logits(weights["head"], middles[0].astype(mx.float32))

        return judge

    def noised(self, x: mx.array, times: mx.array, noise: mx.array) -> mx.array:
        """z_t = α_t x + σ_t ε."""
        alpha, sigma = self.schedule.alpha_sigma(times)
        return expand(alpha, x) * x + expand(sigma, x) * noise

    def lesson(self, nets: Nets, weights: Mapping[str, Tree], batch: Batch) -> dict[str, mx.array]:
        """What student and critic learn from, without gradient. `nets` and `weights` by role.

        The student samples; only its last step learns, from where its own earlier steps led (DMD2's backward
        simulation). The critic learns to denoise the sample.
        """
        z, n, k = batch["noise"], self.interval.student_steps, self.interval.teacher_substeps
        student = self.denoiser(nets["student"], weights["student"], batch)
        times = [mx.broadcast_to(mx.array(self.interval.times(np.array([i])), mx.float32), (len(z), k + 1))
                 for i in range(n)]  # fmt: skip
        for i in reversed(range(1, n)):
            z = student_step(student(z, times[i][:, 0]), z, times[i], self.schedule)
        x = student(z, times[0][:, 0])
        noisy = self.noised(x, batch["student_time"], batch["student_noise"])
        teacher = self.denoiser(nets["teacher"], weights["teacher"], batch)(noisy, batch["student_time"])
        if self.adversarial:
            judge = self.judge(nets["critic"], weights["critic"], batch, batch["student_time"])
            critic, slope = student_slope(judge, noisy)
        else:
            critic, slope = self.denoiser(nets["critic"], weights["critic"], batch)(noisy, batch["student_time"]), None
        target = matching_target(x, teacher, critic)
        if slope is not None:
            target = target - self.adversarial_pull(slope, batch["student_time"])
        found = {"z": z, "t": times[0][:, 0], "sample": x, "target": target}
        if self.config.regression and "end" in batch:  # where the first teacher's walk from this noise ends
            found["regression"] = batch["end"]
        elif self.config.regression:
            before = self.denoiser(nets["before"], weights["before"], batch)
            found["regression"] = distillation_target(before, z, times[0], self.schedule, self.solver)
        return found

    def adversarial_pull(self, slope: mx.array, times: mx.array) -> mx.array:
        """How far the target moves, so that the student's loss has weight · softplus(−D) in it: (B, …) to (B, …).

        By x the slope by z_t = α x + σ ε is α times as steep; the number of pixels undoes the mean over them.
        """
        alpha, _ = self.schedule.alpha_sigma(times)
        return mx.stop_gradient(self.adversarial * slope[0].size * expand(alpha, slope) * slope)

    def student_loss(self, net: UNet2D) -> Callable[[Tree, Batch], mx.array]:
        """½‖x − target‖² and, weighted, the distance to what the stage's teacher makes: means over pixels."""
        c = self.charbonnier

        def loss(weights: Tree, batch: Batch) -> mx.array:
            x = self.denoiser(net, weights, batch, self.precision)(batch["z"], batch["t"])
            ones = mx.ones(x.shape[0])
            matched = 0.5 * losses.weighted_squared_error(x, batch["target"], ones)
            if not self.config.regression:
                return mx.mean(matched)
            near = (losses.weighted_charbonnier_error(x, batch["regression"], ones, c) if c
                    else losses.weighted_squared_error(x, batch["regression"], ones))  # fmt: skip
            return mx.mean(matched + self.config.regression * near)

        return loss

    def critic_loss(self, net: UNet2D) -> Callable[[Tree, Batch], mx.array]:
        """The teacher's own training loss, ‖v̂ − v‖², on the student's samples (Yin et al. 2024a, eq. 6).

        With an adversarial term the head's loss beside it, on samples and real images at the same noise levels.
        """

        def loss(weights: Tree, batch: Batch) -> mx.array:
            times = batch["critic_time"]
            noisy = self.noised(batch["sample"], times, batch["critic_noise"])
            weight = losses.v(self.schedule.log_snr(times))
            if not self.adversarial:
                x_hat = self.denoiser(net, weights, batch, self.precision)(noisy, times)
                return mx.mean(losses.weighted_squared_error(x_hat, batch["sample"], weight))
            assert self.config.adversarial is not None
            judge = self.judge(net, weights, batch, times, self.precision)
            (x_hat, fake), (_, real) = judge(noisy), judge(self.noised(batch["real"], times, batch["real_noise"]))
            told_apart = self.config.adversarial.critic_weight * head_loss(real, fake)
            return mx.mean(losses.weighted_squared_error(x_hat, batch["sample"], weight) + told_apart)

        return loss


class MatchingStep:
    """One step of the student and one of its critic, as one step of `Loop`; the state of both is its state."""

    def __init__(
        self, matching: Matching, student: UNet2D, before: UNet2D, teacher: UNet2D, clip: float, shards: int,
        shape: tuple[int, int, int],
    ) -> None:  # fmt: skip
        """From a student that regression has taught, the model that taught it, and the first teacher.

        Each is a network with its weights; they may be of different architectures. `shape`: of an image, (H, W, C).
        """
        self._matching = matching
        # A network of its own for each function: what is compiled must not meet another's weights.
        own, critics = UNet2D(student.config), UNet2D(teacher.config)
        nets = {role: UNet2D(net.config) for role, net in
                {"student": student, "teacher": teacher, "critic": teacher, "before": before}.items()}  # fmt: skip
        self._student = TrainStep(
            matching.student_loss(own), student.parameters(), clip=clip, ema_decay=matching.config.average,
            shards=shards,
        )  # fmt: skip
        first = teacher.parameters()
        critic = {"net": first, "head": new_head(teacher, shape)} if matching.adversarial else first
        self._critic = TrainStep(matching.critic_loss(critics), critic, clip=clip, ema_decay=None, shards=shards)
        self._held = {"teacher": first, "before": before.parameters()}
        self._lesson = Parts(lambda weights, batch: matching.lesson(nets, weights, batch), shards)
        self._done = 0

    def __call__(self, batch: Batch, learning_rate: float) -> mx.array:
        """One step of each; the student's loss."""
        weights = {**self._held, "student": self._student.parameters(), "critic": self._critic.parameters()}
        parts = [found for _, found in self._lesson(weights, batch)]
        learned = {name: mx.concatenate([part[name] for part in parts]) for name in parts[0]}
        labels = {"labels": batch["labels"]} if "labels" in batch else {}
        seen = {name: learned[name] for name in ("z", "t", "target", "regression") if name in learned}
        loss = self._student({**seen, **labels}, learning_rate)
        noised = {name: batch[name] for name in ("critic_time", "critic_noise", "real", "real_noise") if name in batch}
        self._critic({"sample": learned["sample"], **noised, **labels}, self._critic_rate())
        self._done += 1
        return loss

    def _critic_rate(self) -> float:
        return self._matching.config.critic_learning_rate * (1 - 0.5 * self._done / max(1, self._matching.steps))

    @property
    def state(self) -> dict[str, mx.array]:
        """Of both, by name."""
        both = {"student": self._student.state, "critic": self._critic.state}
        return {f"{who}.{name}": array for who, state in both.items() for name, array in state.items()}

    def load(self, state: Mapping[str, mx.array]) -> None:
        """Go on from a checkpoint's state. Raises ArtifactError where it does not fit."""
        for who, step in (("student.", self._student), ("critic.", self._critic)):
            step.load({name.removeprefix(who): array for name, array in state.items() if name.startswith(who)})
        self._done = int(np.array(state["student.step"]))

    def parameters(self) -> Any:
        """The student's averaged weights."""
        return self._student.averaged_parameters()
