"""Samples from a stored model: the same noise and labels for every variant, in batches, on every core."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.diffusion import denoiser
from ado_tasks.diffusion.adaptive import AdaptiveSamples, StepControl, adaptive
from ado_tasks.diffusion.denoiser import Denoiser, make_denoiser
from ado_tasks.diffusion.guidance import guided_in_one_batch
from ado_tasks.diffusion.schedules import NoiseSchedule, schedule_from_diffusers
from ado_tasks.diffusion.solvers import SOLVERS
from ado_tasks.errors import ConfigError, DivergenceError
from ado_tasks.interop.diffusers_folder import NULL_LABEL, RECORD, StoredModel
from ado_tasks.parallel import sharded_apply
from ado_tasks.report import SILENT, Reporter

if TYPE_CHECKING:  # the reader of tables, which who only samples need not have
    from ado_tasks.datasets.shards import Split

Images = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Draw:
    """What samples start from: noise (n, H, W, C), and labels (n,) where the model is conditional."""

    noise: Images
    labels: npt.NDArray[np.int32] | None
    seed: int = 0  # of the noise that a stochastic solver draws on its way

    def __len__(self) -> int:
        """How many samples."""
        return len(self.noise)

    def first(self, count: int) -> "Draw":
        """The first `count` of them."""
        return Draw(self.noise[:count], None if self.labels is None else self.labels[:count], self.seed)

    def begins(self, other: "Draw") -> bool:
        """Whether this is `other`, or its beginning."""
        same = self.seed == other.seed and np.array_equal(self.noise, other.noise[: len(self)])
        if self.labels is None or other.labels is None:
            return same and self.labels is other.labels
        return same and np.array_equal(self.labels, other.labels[: len(self)])


def draw(seed: int, purpose: str, count: int, part: "Split") -> Draw:
    """Noise and labels by name of purpose: "selection" and "report" never share a draw, nor noise drawn on the way.

    Labels follow the frequencies of `part` exactly, as far as `count` allows.
    """
    noise = mx.random.normal((count, *part.shape), key=rng.key(seed, "draw", purpose))
    labels = None
    if part.num_classes:
        order = rng.generator(seed, "draw", purpose, "labels").permutation(len(part))
        labels = part.labels[np.resize(order, count)].astype(np.int32)
    return Draw(np.array(noise), labels, rng.derive(seed, "draw", purpose, "solver"))


def null_label_of(model: StoredModel) -> int:
    """The label that stands for no class. Raises ConfigError where the model was trained without one."""
    found = model.record.get(NULL_LABEL)
    rows = model.unet.config.num_class_embeds or 0
    if not isinstance(found, int) or not 0 <= found < rows:
        raise ConfigError(
            f"the model cannot be guided: its {RECORD} names {NULL_LABEL} {found!r} for {rows} classes; train it with "
            "train.label_dropout above 0"
        )
    return found


class Sampler:
    """A model made ready to sample from: compiled once for its batch shape, batches split over CPU streams."""

    def __init__(
        self, model: StoredModel, batch_size: int = 256, shards: int = 2, guidance: float | None = None
    ) -> None:
        """`batch_size` images go through the network at a time; `shards` parts of it at the same time on a CPU.

        With a weight of `guidance` every step asks the network twice, with the class and without (see
        diffusion/guidance.py). Raises ConfigError where the model does not know what no class is.
        """
        self.schedule: NoiseSchedule = schedule_from_diffusers(model.scheduler_config)
        self.kind = str(model.scheduler_config.get("prediction_type", "epsilon"))
        self.batch_size = batch_size
        self._unet = model.unet
        self._guidance, self._null_label = guidance, None if guidance is None else null_label_of(model)
        self._apply: Callable[..., mx.array] = sharded_apply(model.unet, shards)

    def denoiser(self, labels: mx.array | None) -> Denoiser:
        """The model as a denoiser, with these labels bound."""
        if self._guidance is not None and self._null_label is not None and labels is not None:
            return guided_in_one_batch(self._conditional, labels, self._null_label, self._guidance)
        bound = () if labels is None else (labels,)
        return make_denoiser(lambda z, timestep: self._apply(z, timestep, *bound), self.schedule, self.kind)

    def _conditional(self, z: mx.array, t: mx.array, labels: mx.array) -> mx.array:
        return make_denoiser(lambda z, timestep: self._apply(z, timestep, labels), self.schedule, self.kind)(z, t)

    def differentiable(self, labels: mx.array | None) -> Denoiser:
        """The same, neither compiled nor split: what gradients are taken of (and compiled there)."""
        return make_denoiser(lambda z, timestep: self._unet(z, timestep, labels), self.schedule, self.kind)

    def __call__(
        self, start: Draw, solver: str, times: np.ndarray, *, told: np.ndarray | None = None, report: Reporter = SILENT
    ) -> Images:
        """Samples (n, H, W, C) float32, not clipped. `told`: the times that the network is told, if not the solver's.

        The last batch is padded to full size, so that one compiled shape serves all and a sample does not depend on n.

        Raises:
            DivergenceError: a sample is not finite.
        """
        sample = SOLVERS[solver].sample
        batches = []
        for first in range(0, len(start), self.batch_size):
            rows = np.arange(first, first + self.batch_size) % len(start)
            labels = None if start.labels is None else mx.array(start.labels[rows])
            noise = mx.array(start.noise[rows])
            key = rng.key(start.seed, "solver", first)
            denoise = self.denoiser(labels)
            if told is not None:
                denoise = denoiser.told(denoise, told)
            batches.append(np.array(sample(denoise, noise, times, self.schedule, key=key)))
            report.progress(min(first + self.batch_size, len(start)), len(start))
        images = np.concatenate(batches)[: len(start)]
        if not np.isfinite(images).all():
            bad = int((~np.isfinite(images)).any(axis=(1, 2, 3)).sum())
            raise DivergenceError(f"{bad} of {len(start)} samples are not finite ({solver}, {len(times) - 1} steps)")
        return images

    def adaptive(self, start: Draw, control: StepControl) -> AdaptiveSamples:
        """Samples whose steps follow their own estimated error, in lanes of a batch of `batch_size`.

        Raises:
            DivergenceError: an estimate is not finite.
        """

        def denoise(z: mx.array, t: mx.array, rows: npt.NDArray[np.intp]) -> mx.array:
            return self.denoiser(None if start.labels is None else mx.array(start.labels[rows]))(z, t)

        return adaptive(denoise, start.noise, self.schedule, control, lanes=self.batch_size)
