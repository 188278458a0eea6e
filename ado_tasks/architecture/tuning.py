"""How a candidate learns from its teacher: its x̂ at random times, and the features that both have.

A candidate's channels are some of its teacher's, so what leaves a block is compared with the same channels of the same
block there: no layer stands between them that would have to be learned and thrown away (Romero et al. 2015, FitNets,
need one, as do most; Kim et al. 2023, BK-SDM, arXiv:2305.15798, §3.2, compare at every block as here).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ado_tasks import rng
from ado_tasks.architecture import axes
from ado_tasks.architecture.inherit import Rows
from ado_tasks.backend import mx
from ado_tasks.config import config
from ado_tasks.datasets.shards import Split
from ado_tasks.diffusion import losses
from ado_tasks.diffusion.denoiser import make_denoiser
from ado_tasks.diffusion.parameterisation import expand
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.models.unet import UNet2D
from ado_tasks.optimise.batches import images_of_step, labels_of, times_of_step
from ado_tasks.optimise.checkpoints import Checkpoints
from ado_tasks.optimise.loop import Curve, Loop
from ado_tasks.optimise.steps import TrainStep
from ado_tasks.parallel import sharded_apply
from ado_tasks.report import Reporter

Batch = Mapping[str, mx.array]
IMPORTANCE_STEP = -2  # as are those before it: of batches that importance is measured on
VALIDATION_STEP = -1  # a step that tuning never takes: its noises and times belong to the measure of quality
TINY = 1e-8  # against 0/0 where a block of the teacher gives nothing


@config
class TuneConfig:
    """How a candidate is tuned."""

    batch_size: Annotated[int, Field(ge=1)] = 64  # images a step
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-3  # at the start of each rung, falls to 0 in each
    clip: Annotated[float, Field(gt=0)] = 1.0  # largest global norm of a gradient
    feature_weight: Annotated[float, Field(ge=0)] = 0.1  # of the features' distance beside that of x̂
    shards: Annotated[int, Field(ge=1, le=16)] = 2  # parts of a batch computed at the same time on a CPU
    checkpoint_every: Annotated[int, Field(ge=1)] = 250  # steps
    validation_images: Annotated[int, Field(ge=1)] = 256  # of the selection part, always the same ones


@dataclass(frozen=True)
class Lesson:
    """What one candidate learns from one teacher."""

    config: TuneConfig
    teacher: UNet2D
    kept: Mapping[str, Rows]  # by stream of the teacher: the candidate's channels
    schedule: NoiseSchedule
    kind: str  # what both networks predict
    seed: int

    def loss(self, candidate: UNet2D) -> Callable[[Any, Batch], mx.array]:
        """Mean over the batch of (1 + SNR) ‖x̂ − x̂_T‖² + β mean_blocks ‖f − f_T‖²/‖f_T‖², of kept channels.

        Under this weight the first term is ‖v̂ − v̂_T‖² (Salimans & Ho 2022, §4): no step of a sampler is preferred.
        """
        weight = self.config.feature_weight

        def loss(parameters: Any, batch: Batch) -> mx.array:
            candidate.update(parameters)
            x_hat, features = self.run(candidate, batch["z"], batch["t"], batch.get("labels"))
            distance = losses.weighted_squared_error(x_hat, batch["target"], batch["weight"])
            if weight:
                wanted = [batch[f"features.{number}"] for number in range(len(features))]
                parts = [_relative(mine, theirs) for mine, theirs in zip(features, wanted, strict=True)]
                distance = distance + weight * sum(parts, mx.zeros(())) / len(parts)
            return mx.mean(distance)

        return loss

    def run(self, unet: UNet2D, z: mx.array, t: mx.array, labels: mx.array | None) -> tuple[mx.array, list[mx.array]]:
        """x̂, and what leaves each block."""
        leaving: list[mx.array] = []
        denoise = make_denoiser(
            lambda noisy, timestep: unet(noisy, timestep, labels, leaving=leaving), self.schedule, self.kind
        )
        return denoise(z, t), leaving

    def targets(self) -> Callable[..., list[mx.array]]:
        """(z, t, labels) → the teacher's x̂, and its features at the channels that were kept. No gradient."""
        kept = [mx.array(self.kept[stream]) for stream in feature_streams(self.teacher)]
        with_features = self.config.feature_weight > 0

        def targets(z: mx.array, t: mx.array, *labels: mx.array) -> list[mx.array]:
            x_hat, leaving = self.run(self.teacher, z, t, *(labels or (None,)))
            features = [mx.take(each, rows, axis=-1) for each, rows in zip(leaving, kept, strict=True)]
            return [x_hat, *(features if with_features else [])]

        return mx.compile(targets)

    def batch(self, part: Split, targets: Callable[..., list[mx.array]], step: int) -> dict[str, mx.array]:
        """Noisy images at times spread over (0, 1], and what the teacher says of them: drawn from (seed, step)."""
        noisy = self.noisy(part, self.config.batch_size, step)
        labels = [noisy["labels"]] if "labels" in noisy else []
        x_hat, *features = targets(noisy["z"], noisy["t"], *labels)
        named = {f"features.{number}": each for number, each in enumerate(features)}
        return {name: array for name, array in noisy.items() if name != "images"} | {"target": x_hat} | named

    def noisy(self, part: Split, size: int, step: int) -> dict[str, mx.array]:
        """Noisy z = α x + σ ε with their images, times, weights, labels; steps below 0 take the images of the first."""
        rows = images_of_step(len(part), size, rng.derive(self.seed, "tune"), max(step, 0))
        images = mx.array(part.batch(rows))
        times = times_of_step(size, rng.generator(self.seed, "tune", "time", step))
        alpha, sigma = (mx.array(level.astype(np.float32)) for level in self.schedule.alpha_sigma(times))
        noise = mx.random.normal(images.shape, key=rng.key(self.seed, "tune", "noise", step))
        return {
            "images": images,
            "z": expand(alpha, noise) * images + expand(sigma, noise) * noise,
            "t": mx.array(times.astype(np.float32)),
            "weight": losses.v(mx.array(self.schedule.log_snr(times).astype(np.float32))),
            **labels_of(part, rows),
        }

    def quality_loss(self, candidate: UNet2D, held_out: Split) -> float:
        """Σ w ‖x̂ − x̂_T‖² / Σ w ‖x̂_T − x‖², on fixed images, times and noises of the selection part.

        The candidate's distance to its teacher, in units of the teacher's own error: 0 is the teacher. Where the
        teacher is as good as can be, it is the share by which a candidate's denoising loss is above the teacher's.
        """
        batch = self.noisy(held_out, min(self.config.validation_images, len(held_out)), VALIDATION_STEP)
        labels = (batch["labels"],) if "labels" in batch else ()
        mine, theirs = (
            sharded_apply(
                lambda z, t, *labels, unet=unet: self.run(unet, z, t, *(labels or (None,)))[0], self.config.shards
            )(batch["z"], batch["t"], *labels)
            for unet in (candidate, self.teacher)
        )
        apart = mx.sum(losses.weighted_squared_error(mine, theirs, batch["weight"]))
        own = mx.sum(losses.weighted_squared_error(theirs, batch["images"], batch["weight"]))
        return float(np.array(apart)) / float(np.array(own))


def tune(
    lesson: Lesson, candidate: UNet2D, part: Split, first: int, steps: int, checkpoints: Checkpoints, report: Reporter
) -> Curve:
    """Tune a candidate in place: steps `first` to `first + steps` of its lesson; the learning rate falls to 0 in them.

    Raises:
        DivergenceError: a loss is not finite.
    """
    config = lesson.config
    targets = lesson.targets()
    step = TrainStep(
        lesson.loss(candidate), candidate.parameters(), clip=config.clip, ema_decay=None, shards=config.shards
    )
    loop = Loop(
        name="probe", steps=steps, batch_of=lambda index: lesson.batch(part, targets, first + index),
        learning_rate_of=lambda index: config.learning_rate * (1 - index / steps), checkpoints=checkpoints,
        checkpoint_every=config.checkpoint_every, report=report,
    )  # fmt: skip
    curve = loop.run(step)["training"]
    candidate.update(step.parameters())
    return curve


def gradient_batches(lesson: Lesson, part: Split, count: int, size: int) -> list[dict[str, mx.array]]:
    """Batches of which importance is measured: real images at times of their own, with labels."""
    return [lesson.noisy(part, size, IMPORTANCE_STEP - number) for number in range(count)]


def denoising_loss(lesson: Lesson) -> Callable[[Any, Batch], mx.array]:
    """The teacher's own loss, (1 + SNR) ‖x̂ − x‖²: at its distance to itself every gradient would be 0."""

    def loss(parameters: Any, batch: Batch) -> mx.array:
        lesson.teacher.update(parameters)
        x_hat, _ = lesson.run(lesson.teacher, batch["z"], batch["t"], batch.get("labels"))
        return mx.mean(losses.weighted_squared_error(x_hat, batch["images"], batch["weight"]))

    return loss


def feature_streams(unet: UNet2D) -> list[str]:
    """The stream of what leaves each block, in the order of `leaving`."""
    levels = range(len(unet.config.block_out_channels))
    return [*map(axes.down, levels), *(axes.up(level) for level in reversed(levels))]


def _relative(mine: mx.array, theirs: mx.array) -> mx.array:
    """‖f − f_T‖²/‖f_T‖² of each image, (B, H, W, C) to (B,)."""
    flat = theirs.reshape(len(theirs), -1)
    apart = mx.sum(mx.square(mine.reshape(len(mine), -1) - flat), axis=1)
    return apart / (mx.sum(mx.square(flat), axis=1) + TINY)
