"""Consistency tuning: a diffusion model becomes a consistency function, which leads from any noise level to clean.

Geng et al. 2024 (ECT, arXiv:2406.14548). Two points x_u = x + u ε and x_r = x + r ε, r < u, lie on the same line from
the same image and noise; f(x_u, u) is drawn to f(x_r, r), which is held fixed. A diffusion model is where this begins:
its x̂ is the consistency function of a step all the way, r = 0.

The paper's t is a noise level; here it is u, for t is a schedule's time. A network on a variance-preserving schedule
sees z = α (x + u ε) with u = σ/α, so nothing but the names changes: `schedule.time(-2 ln u)` is its time, exactly.

The boundary condition f(x, 0) = x is the network's own. With v-prediction and α² + σ² = 1, u = σ/α,

    f = α z − σ v = (x + u ε)/(1 + u²) − u/√(1 + u²) v:

Karras et al. 2022's c_skip and c_out with σ_d = 1, exact at u = 0 whatever the network says. So nothing is wrapped
around it, training starts from the very function that the teacher is, and the result is still a v-prediction network
that Diffusers runs. The weight 1/u² + 1/σ_d² has σ_d = 1 for the same reason: it is then 1/c_out².
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from scipy import special

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.config import config
from ado_tasks.datasets.shards import Split
from ado_tasks.diffusion import losses
from ado_tasks.diffusion.denoiser import Denoiser, make_denoiser
from ado_tasks.diffusion.parameterisation import expand
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.models.unet import UNet2D
from ado_tasks.optimise.batches import images_of_step, labels_of, times_of_step

Batch = Mapping[str, mx.array]
Floats = npt.NDArray[np.float64]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]

GAP_K, GAP_B = 8.0, 1.0  # of the mapping u → r (the paper's k and b; `ECMLoss` of its code)
NORM_C = 0.00054  # c = 0.00054 √(numbers an image) (Song & Dhariwal 2024, §3.3)


@config
class ConsistencyConfig:
    """How a model is tuned to consistency, and how its students sample."""

    method: ClassVar[str] = "consistency"
    steps: Count = 1000  # optimiser steps
    batch_size: Count = 64  # images a step (the paper: 128)
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-4  # at its peak, falls to 0 (the paper: constant)
    warmup_steps: Annotated[int, Field(ge=0)] = 50  # in the place of the paper's RAdam, whose first steps are small too
    clip: Positive = 1.0  # largest global norm of a gradient
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9993  # of the weights that are kept (the paper's code)
    level_mean: float = -1.1  # P_mean: ln u ~ N(P_mean, P_std²)
    level_std: Positive = 2.0  # P_std
    highest_level: Positive = 80.0  # u at which sampling begins, and the most that is trained (Karras et al. 2022)
    q: Annotated[float, Field(gt=1)] = 256.0  # 1 − r/u is about 1/q^stage; the paper's value for a pretrained model
    stages: Count = 1  # equal parts of the steps, in each of which the gap shrinks q-fold; from scratch: q = 2, 8
    sigma_data: Positive = 1.0  # σ_d of the weight 1/u² + 1/σ_d²: that of the network's own preconditioning, see above
    norm_c: Positive | None = None  # c of √(‖·‖² + c²) − c; none given: 0.00054 √d (Song & Dhariwal 2024)
    student_steps: tuple[Annotated[int, Field(ge=1, le=8)], ...] = (2, 1)  # evaluations an image, one student each
    search_samples: Annotated[int, Field(ge=50)] = 512  # images drawn to judge a point that is noised to
    search_levels: Annotated[int, Field(ge=1)] = 9  # such points, in equal ratios
    shards: Annotated[int, Field(ge=1, le=16)] = 2  # parts of a batch computed at the same time on a CPU
    checkpoint_every: Count = 250  # steps

    @model_validator(mode="after")
    def _students_differ(self) -> Self:
        if not self.student_steps or len(set(self.student_steps)) < len(self.student_steps):
            raise ValueError(f"student_steps: {list(self.student_steps)}: at least one, each once")
        return self


def level_before(level: Floats, q: float, stage: int) -> Floats:
    """r(u) = max(0, u (1 − q^−(stage+1) (1 + k sigmoid(−b u)))): the level that u is held to; (B,) to (B,).

    Geng et al. 2024, §4 (`t_to_r_sigmoid` in the paper's code). It is 0 for small u while q^(stage+1) < 1 + k/2 = 5,
    and above 0 everywhere from there on.
    """
    gap = (1 + GAP_K * special.expit(-GAP_B * level)) / q ** (stage + 1)
    return np.maximum(0.0, level * (1 - gap))


def consistency_loss(denoise: Denoiser, batch: Batch, c: float) -> mx.array:
    """Mean over a batch of w(u) (√(‖f(x_u, u) − f(x_r, r)‖² + c²) − c), f(x_r, r) held fixed, and x itself at r = 0.

    `batch`: z, t at u; z_near, t_near at r; images x; clean (B,), whether r = 0; weight w(u), (B,).
    """
    near = denoise(batch["z_near"], batch["t_near"])
    target = mx.stop_gradient(mx.where(expand(batch["clean"], near), batch["images"], near))
    return mx.mean(losses.weighted_norm_error(denoise(batch["z"], batch["t"]), target, batch["weight"], c))


@dataclass(frozen=True)
class Tuning:
    """One run of tuning: what its steps see, and the loss they take."""

    config: ConsistencyConfig
    schedule: NoiseSchedule
    kind: str
    seed: int

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up to the peak, then linear to 0."""
        warm, rate = self.config.warmup_steps, self.config.learning_rate
        if step < warm:
            return rate * (step + 1) / (warm + 1)
        return rate * (self.config.steps - 1 - step) / max(1, self.config.steps - 1 - warm)

    def stage_of(self, step: int) -> int:
        """Which stage a step belongs to, from 0."""
        return step * self.config.stages // self.config.steps

    def levels(self, step: int) -> Floats:
        """Noise levels u of one step, (B,): ln u ~ N(P_mean, P_std²), one in each stratum of equal probability.

        Held between the least level that networks on this schedule are trained at and the highest that is sampled from.
        """
        generator = rng.generator(self.seed, "consistency", "level", step)
        normal = special.ndtri(times_of_step(self.config.batch_size, generator))
        lowest = float(np.exp(-self.schedule.log_snr(self.schedule.t_min) / 2))
        logs = self.config.level_mean + self.config.level_std * normal
        return np.exp(np.clip(logs, np.log(lowest), np.log(highest_level(self.config.highest_level, self.schedule))))

    def batch(self, part: Split, step: int, dropout: float = 0.0) -> dict[str, mx.array]:
        """What one step sees, drawn from (seed, step): see `consistency_loss`. Dropout keys where there is dropout."""
        size = self.config.batch_size
        rows = images_of_step(len(part), size, rng.derive(self.seed, "consistency"), step)
        images = mx.array(part.batch(rows))
        noise = mx.random.normal(images.shape, key=rng.key(self.seed, "consistency", "noise", step))
        level = self.levels(step)
        near = level_before(level, self.config.q, self.stage_of(step))
        drawn = {"images": images, "clean": mx.array(near == 0)}
        for name, each in (("", level), ("_near", near)):
            times = times_of(each, self.schedule)
            alpha, sigma = (mx.array(factor.astype(np.float32)) for factor in self.schedule.alpha_sigma(times))
            drawn[f"z{name}"] = expand(alpha, noise) * images + expand(sigma, noise) * noise
            drawn[f"t{name}"] = mx.array(times.astype(np.float32))
        drawn["weight"] = losses.edm(mx.array((-2 * np.log(level)).astype(np.float32)), self.config.sigma_data)
        if dropout:
            # A key a row, so that each part of the batch that is computed apart has one of its own.
            drawn["dropout"] = mx.random.split(rng.key(self.seed, "consistency", "dropout", step), size)
        return drawn | labels_of(part, rows)

    def loss(self, unet: UNet2D) -> Callable[[Any, Batch], mx.array]:
        """(weights, batch) to the loss; both passes have the same weights and drop the same units."""

        def loss(parameters: Any, batch: Batch) -> mx.array:
            unet.update(parameters)
            labels, key = batch.get("labels"), batch["dropout"][0] if "dropout" in batch else None
            denoise = make_denoiser(
                lambda z, timestep: unet(z, timestep, labels, dropout_key=key), self.schedule, self.kind
            )
            numbers = batch["images"][0].size
            return consistency_loss(denoise, batch, self.config.norm_c or NORM_C * float(np.sqrt(numbers)))

        return loss


def times_of(level: Floats, schedule: NoiseSchedule) -> Floats:
    """The times of noise levels u = σ/α, exactly 0 for u = 0."""
    noisy = level > 0
    return np.where(noisy, schedule.time(-2 * np.log(np.where(noisy, level, 1.0))), 0.0)


def highest_level(wanted: float, schedule: NoiseSchedule) -> float:
    """`wanted`, or the schedule's own highest level where it does not reach so far."""
    return min(wanted, float(np.exp(-schedule.log_snr(1.0) / 2)))


def on_grid(times: Floats, schedule: NoiseSchedule) -> Floats:
    """The nearest times that Diffusers has integer timesteps for, t = (i + 1)/N, where the schedule has such."""
    steps: int | None = getattr(schedule, "num_train_timesteps", None)
    return times if steps is None else np.clip(np.rint(times * steps), 1, steps) / steps


def best_points(
    score: Callable[[tuple[float, ...]], float], candidates: Sequence[float], count: int
) -> list[tuple[tuple[float, ...], dict[float, float]]]:
    """0, 1, … `count` points in falling order, each set the one before with the candidate that makes the score least.

    Song et al. 2023, at their Algorithm 1, find the points one after another too. Beside each set: the score of every
    candidate that was tried for it. The first of equal ones is taken. Fewer sets come back where candidates run out.
    """
    chosen: list[tuple[tuple[float, ...], dict[float, float]]] = [((), {})]
    for _ in range(count):
        points = chosen[-1][0]
        scores = {
            each: score(tuple(sorted((*points, each), reverse=True))) for each in candidates if each not in points
        }
        if not scores:
            break
        best = min(scores, key=lambda each: scores[each])
        chosen.append((tuple(sorted((*points, best), reverse=True)), scores))
    return chosen
