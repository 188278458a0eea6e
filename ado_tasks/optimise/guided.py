"""Guided distillation: classifier-free guidance, two evaluations a step, folded into one network that is told w.

Meng et al. 2023 (arXiv:2210.03142), §3.1, stage one. With x̂_w = x̂_u + w (x̂_c − x̂_u) of the teacher, the student learns

    min E ω(λ_t) ‖x̂_η(z_t, c, w) − x̂_w(z_t, c)‖²,    w ~ U[w_min, w_max]

at every t, on real images that noise was added to. w enters as the timestep does: an embedding e(w) of it is added to
that of the timestep and the class, and begins as zero, so the student begins as the conditional teacher, w = 1.

Because e(w) is only ever added, a network at one fixed w is an ordinary one: e(w) goes into the bias of the last layer
of the timestep's embedding (`with_weight`), and nothing else has to know of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ado_tasks import rng
from ado_tasks.backend import mlx_utils, mx
from ado_tasks.config import config
from ado_tasks.datasets.shards import Split
from ado_tasks.diffusion import losses
from ado_tasks.diffusion.denoiser import make_denoiser
from ado_tasks.diffusion.guidance import draw_weights, guided_in_one_batch
from ado_tasks.diffusion.parameterisation import expand
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.models.embeddings import WeightEmbedding
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.optimise.batches import images_of_step, labels_of, times_of_step
from ado_tasks.parallel import sharded_apply

Batch = Mapping[str, mx.array]
Tree = Any
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, le=100)]

UNET, GUIDANCE = "unet", "guidance"  # the two parts of a student's weights
_BIAS = "time_embedding.linear_2.bias"  # to which e(w) is added where w is fixed


@config
class GuidedConfig:
    """How guidance is folded into one network."""

    method: ClassVar[str] = "guided"
    steps: Count = 1000  # optimiser steps; each costs two evaluations of the teacher and three of the student
    batch_size: Count = 64  # images a step
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-3  # at first, falls to 0
    clip: Annotated[float, Field(gt=0)] = 1.0  # largest global norm of a gradient
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99  # of the weights that are kept
    lowest_weight: Weight = 1.0  # the network is taught weights from here (1: the conditional teacher)
    highest_weight: Weight = 4.0  # to here
    weights: tuple[Weight, ...] = (1.0, 2.0, 3.0, 4.0)  # one Diffusers folder each, at that weight
    loss: Literal["truncated_snr", "v"] = "truncated_snr"  # ω, the weight on ‖x̂ − x̂_w‖² (Meng et al. 2023: max(1, SNR))
    shards: Annotated[int, Field(ge=1, le=16)] = 2  # parts of a batch computed at the same time on a CPU
    checkpoint_every: Count = 250  # steps

    @model_validator(mode="after")
    def _weights_in_range(self) -> Self:
        low, high = self.lowest_weight, self.highest_weight
        if not low < high:
            raise ValueError(f"lowest_weight, highest_weight: {low}, {high}: the first must be less than the second")
        if not self.weights or len(set(self.weights)) < len(self.weights):
            raise ValueError(f"weights: {list(self.weights)}: at least one, each once")
        if not all(low <= weight <= high for weight in self.weights):
            raise ValueError(f"weights: {list(self.weights)}: the network is taught {low} to {high} only")
        return self


@dataclass(frozen=True)
class Folding:
    """One run of guided distillation: what its steps see, and the loss they take."""

    config: GuidedConfig
    schedule: NoiseSchedule
    kind: str
    null_label: int
    seed: int

    def learning_rate_at(self, step: int) -> float:
        """Linear to 0 at the last step."""
        return self.config.learning_rate * (1 - step / max(1, self.config.steps - 1))

    def embedding(self, network: UNet2DConfig) -> WeightEmbedding:
        """e(w) for such a network: zero everywhere, and ready to learn."""
        made = WeightEmbedding(network.embedding_width, self.config.lowest_weight, self.config.highest_weight)
        initialise(made, rng.key(self.seed, "guided", "initialise"))
        last = made.layers.linear_2
        last.update({"weight": mx.zeros_like(last.weight), "bias": mx.zeros_like(last.bias)})
        return made

    def targets(self, teacher: UNet2D) -> Callable[..., mx.array]:
        """(z, t, labels, w) → x̂_w of the teacher, two evaluations; its weights compiled in. No gradient."""

        def conditional(z: mx.array, t: mx.array, labels: mx.array) -> mx.array:
            return make_denoiser(lambda z, timestep: teacher(z, timestep, labels), self.schedule, self.kind)(z, t)

        def guide(z: mx.array, t: mx.array, labels: mx.array, weight: mx.array) -> mx.array:
            return guided_in_one_batch(conditional, labels, self.null_label, weight)(z, t)

        return sharded_apply(guide, self.config.shards)

    def batch(self, part: Split, targets: Callable[..., mx.array], step: int) -> dict[str, mx.array]:
        """Noisy images at times of one in each stratum, weights, and what the guided teacher says: of (seed, step)."""
        size = self.config.batch_size
        rows = images_of_step(len(part), size, rng.derive(self.seed, "guided"), step)
        images = mx.array(part.batch(rows))
        noise = mx.random.normal(images.shape, key=rng.key(self.seed, "guided", "noise", step))
        times = times_of_step(size, rng.generator(self.seed, "guided", "time", step))
        alpha, sigma = (mx.array(level.astype(np.float32)) for level in self.schedule.alpha_sigma(times))
        key = rng.key(self.seed, "guided", "weight", step)
        seen = {
            "z": expand(alpha, noise) * images + expand(sigma, noise) * noise,
            "t": mx.array(times.astype(np.float32)),
            **labels_of(part, rows),
            "w": draw_weights(size, self.config.lowest_weight, self.config.highest_weight, key),
        }
        omega = losses.weight(self.config.loss)(mx.array(self.schedule.log_snr(times).astype(np.float32)))
        return {**seen, "target": targets(*seen.values()), "omega": omega}

    def loss(self, unet: UNet2D, embedding: WeightEmbedding) -> Callable[[Tree, Batch], mx.array]:
        """(weights of both, batch) to the mean of ω(λ) ‖x̂ − x̂_w‖²."""

        def loss(parameters: Tree, batch: Batch) -> mx.array:
            unet.update(parameters[UNET])
            embedding.update(parameters[GUIDANCE])
            told = embedding(batch["w"])
            denoise = make_denoiser(
                lambda z, timestep: unet(z, timestep, batch["labels"], added=told), self.schedule, self.kind
            )
            x_hat = denoise(batch["z"], batch["t"])
            return mx.mean(losses.weighted_squared_error(x_hat, batch["target"], batch["omega"]))

        return loss


def with_weight(parameters: Tree, embedding: WeightEmbedding, weight: float, held: float | None = None) -> Tree:
    """The network's weights with w fixed: e(w), less the e of the weight that they hold already, in one bias.

    Raises:
        ConfigError: the weight is outside of what the network was taught.
    """
    change = embedding.at(weight) - (0.0 if held is None else embedding.at(held))
    flat = dict(mlx_utils.tree_flatten(parameters))
    return mlx_utils.tree_unflatten(list({**flat, _BIAS: flat[_BIAS] + change}.items()))
