"""Task `train`: a diffusion model from scratch, the teacher of everything that follows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.config import as_plain, as_recorded, config
from ado_tasks.datasets.shards import Dataset, Split, open_dataset
from ado_tasks.diffusion import grids, losses
from ado_tasks.diffusion.denoiser import make_denoiser
from ado_tasks.diffusion.guidance import drop_labels
from ado_tasks.diffusion.parameterisation import expand
from ado_tasks.diffusion.schedules import NoiseSchedule, schedule_from_diffusers
from ado_tasks.diffusion.solvers import ddim
from ado_tasks.errors import ConfigError
from ado_tasks.interop.diffusers_folder import NULL_LABEL, write_model
from ado_tasks.models.initialise import initialise
from ado_tasks.models.precision import in_precision, lowered
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import parameter_count
from ado_tasks.optimise.batches import images_of_step, labels_of, times_of_step
from ado_tasks.optimise.checkpoints import Checkpoints, run_key
from ado_tasks.optimise.loop import Loop
from ado_tasks.optimise.steps import TrainStep
from ado_tasks.pictures import save_curves, save_grid
from ado_tasks.report import SILENT, Reporter
from ado_tasks.storage import atomic_folder, sha256_file, write_json

TRAIN_TIMESTEPS = 1000  # Ho et al. 2020, §4: what Diffusers' schedulers assume
VALIDATION_IMAGES = 256  # of the selection part, always the same ones at the same noise
VALIDATION_STEP = -1  # a step that training never takes: its noises and times belong to validation
SAMPLES = 20  # in the picture
# Keys that came later, with what a record that lacks them means.
LATER_KEYS = {"label_dropout": 0.0, "precision": "float32", "checkpointing": False, "accumulate": 1}
SAMPLE_STEPS = 50  # DDIM: the teacher's reference number of steps


@config
class TrainConfig:
    """How the teacher is trained."""

    model: dict[str, Any]  # fields of Diffusers' UNet2DModel; sizes and classes follow from the dataset
    steps: Annotated[int, Field(ge=1)] = 4000  # optimiser steps
    batch_size: Annotated[int, Field(ge=1)] = 64  # images a step
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-3  # peak
    warmup_steps: Annotated[int, Field(ge=0)] = 200  # linear from 0 to the peak
    final_learning_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0  # what the cosine falls to at the last step
    clip: Annotated[float, Field(gt=0)] = 1.0  # largest global norm of a gradient
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999  # of the averaged weights, which are the result
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = "squaredcos_cap_v2"  # Diffusers' name
    prediction_type: Literal["v_prediction", "epsilon", "sample"] = "v_prediction"  # what the network predicts
    loss: Literal["v", "snr", "truncated_snr", "min_snr"] = "v"  # weight on ‖x̂ − x‖² (see diffusion/losses.py)
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # labels replaced by a null class: for guidance, 0.1
    shards: Annotated[int, Field(ge=1, le=16)] = 2  # parts of a batch computed at the same time on a CPU
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # of a pass; weights and state stay float32
    checkpointing: bool = False  # inner arrays of a block computed anew in the gradient: less memory, more time
    accumulate: Annotated[int, Field(ge=1)] = 1  # pieces of a batch that go one after another: less memory
    validate_every: Annotated[int, Field(ge=1)] = 500  # steps
    checkpoint_every: Annotated[int, Field(ge=1)] = 500  # steps


@dataclass(frozen=True)
class TrainResult:
    """What came out."""

    parameters: int  # of the network
    validation_loss: float  # of the averaged weights, selection part
    weights_sha256: str  # identifies the model


def train(
    config: TrainConfig, *, dataset: Path, out: Path, scratch: Path, seed: int, report: Reporter = SILENT
) -> TrainResult:
    """Train a U-Net on the train part and write it as a Diffusers folder, with its curves and a grid of samples.

    Args:
        config: see TrainConfig.
        dataset: folder made by `prepare`.
        out: the model's folder; it appears whole or not at all.
        scratch: checkpoints. An interrupted run that is started again ends with the bytes of one that was not.
        seed: of the initialisation, the order of images, times and noises: each drawn from (seed, step).
        report: where progress, losses and pictures go.

    Raises:
        ConfigError: a key of the model, or of this section, cannot be used.
        ArtifactError: the dataset is damaged.
        DivergenceError: a loss is not finite. Names the step and the last good checkpoint.
    """
    data = open_dataset(dataset)
    part, held_out = data.split("train"), data.split("selection")
    null_label = _null_label(config, data)
    network = UNet2DConfig.from_dict(complete_model(config.model, data, null_label), where="params.yaml train.model")
    network.check_data(data.shape, data.num_classes + (null_label is not None), "params.yaml train.model")
    unet = UNet2D(network)
    initialise(unet, rng.key(seed, "train", "initialise"))
    unet.checkpointing = config.checkpointing
    schedule = schedule_from_diffusers({"beta_schedule": config.beta_schedule})
    loss = _loss(unet, schedule, config)
    step = TrainStep(
        loss, unet.parameters(), clip=config.clip, ema_decay=config.ema_decay, shards=config.shards,
        accumulate=config.accumulate,
    )  # fmt: skip

    key = run_key(__name__, as_plain(config), {"dataset": data.sha256}, seed)
    checkpoints = Checkpoints.under(scratch, key)
    loop = Loop(
        name="train",
        steps=config.steps,
        batch_of=lambda index: _without_some_labels(
            _training_batch(part, config.batch_size, seed, index, unet.config.dropout), config, null_label, seed, index
        ),
        learning_rate_of=lambda index: learning_rate_at(config, index),
        checkpoints=checkpoints,
        checkpoint_every=config.checkpoint_every,
        report=report,
        validate=_validation(held_out, seed, loss),
        validate_every=config.validate_every,
    )
    curves = loop.run(step)

    unet.update(step.averaged_parameters())
    with atomic_folder(out) as folder:
        record = {
            "history": [
                {"task": "train", "config": as_recorded(config, **LATER_KEYS), "seed": seed,
                 "dataset_sha256": data.sha256}
            ],
            **({} if null_label is None else {NULL_LABEL: null_label}),
        }  # fmt: skip
        write_model(folder, unet, schedule.to_diffusers(config.prediction_type), record)
        write_json(folder / "curves.json", curves)
        save_curves(folder / "training.png", curves, "weighted squared error")
        save_grid(folder / "samples.png", {"DDIM, 50 steps": _samples(unet, schedule, config, data, seed)})
        weights_sha256 = sha256_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name in ("training", "samples"):
        report.picture(name, out / f"{name}.png")
    checkpoints.clear()
    return TrainResult(
        parameter_count(unet),
        curves["validation"][-1][1],
        weights_sha256,
    )


def complete_model(model: dict[str, Any], data: Dataset, null_label: int | None = None) -> dict[str, Any]:
    """The U-Net's config with what the dataset decides: size, channels, classes and, behind them, the null class."""
    height, width, channels = data.shape
    sizes: dict[str, Any] = {"sample_size": height if height == width else [height, width]}
    sizes |= {"in_channels": channels, "out_channels": channels}
    if data.num_classes:
        sizes["num_class_embeds"] = data.num_classes if null_label is None else null_label + 1
    return {**sizes, **model}


def _null_label(config: TrainConfig, data: Dataset) -> int | None:
    """The label in the place of dropped ones: the row behind the classes of the table; None where none is dropped."""
    if not config.label_dropout:
        return None
    if not data.num_classes:
        raise ConfigError(f"label_dropout: {config.label_dropout}: the dataset has no labels to drop; allowed: 0")
    return data.num_classes


def _without_some_labels(
    batch: dict[str, mx.array], config: TrainConfig, null_label: int | None, seed: int, step: int
) -> dict[str, mx.array]:
    if null_label is None:
        return batch
    key = rng.key(seed, "label dropout", step)
    return {**batch, "labels": drop_labels(batch["labels"], null_label, key, config.label_dropout)}


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to the final rate (Loshchilov & Hutter 2017, eq. 5)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    fall = 0.5 * (1 + float(np.cos(np.pi * min(1.0, done))))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * fall


def _batch(part: Split, batch_size: int, seed: int, step: int) -> dict[str, mx.array]:
    rows = images_of_step(len(part), batch_size, seed, step)
    images = mx.array(part.batch(rows))
    batch = {
        "images": images,
        "noise": mx.random.normal(images.shape, key=rng.key(seed, "noise", step)),
        "t": mx.array(times_of_step(batch_size, rng.generator(seed, "time", step)).astype(np.float32)),
    }
    return batch | labels_of(part, rows)


def _training_batch(part: Split, batch_size: int, seed: int, step: int, dropout: float) -> dict[str, mx.array]:
    batch = _batch(part, batch_size, seed, step)
    # A key a row, so that each part of the batch that is computed apart has one of its own.
    return batch | ({"dropout": mx.random.split(rng.key(seed, "dropout", step), batch_size)} if dropout else {})


def _loss(unet: UNet2D, schedule: NoiseSchedule, config: TrainConfig) -> Any:
    weight = losses.weight(config.loss)
    apply = in_precision(unet, config.precision)

    def loss(parameters: Any, batch: dict[str, mx.array]) -> mx.array:
        """Mean over the batch of w(λ) ‖x̂ − x‖² (per pixel)."""
        unet.update(lowered(parameters, config.precision))
        alpha, sigma = schedule.alpha_sigma(batch["t"])
        z = expand(alpha, batch["noise"]) * batch["images"] + expand(sigma, batch["noise"]) * batch["noise"]
        key = batch["dropout"][0] if "dropout" in batch else None
        denoise = make_denoiser(
            lambda z, time: apply(z, time, batch.get("labels"), dropout_key=key), schedule, config.prediction_type
        )
        weights = weight(2 * (mx.log(alpha) - mx.log(sigma)))
        return mx.mean(losses.weighted_squared_error(denoise(z, batch["t"]), batch["images"], weights))

    return loss


def _validation(held_out: Split, seed: int, loss: Any) -> Any:
    """The loss of the averaged weights on fixed images, times and noises of the selection part."""
    batch = _batch(held_out, min(VALIDATION_IMAGES, len(held_out)), seed, VALIDATION_STEP)

    def validate(step: TrainStep) -> float:
        return float(loss(step.averaged_parameters(), batch).item())

    return validate


def _samples(unet: UNet2D, schedule: NoiseSchedule, config: TrainConfig, data: Dataset, seed: int) -> np.ndarray:
    """A row of samples, classes in turn."""
    noise = mx.random.normal((SAMPLES, *data.shape), key=rng.key(seed, "train", "samples"))
    labels = mx.arange(SAMPLES) % data.num_classes if data.num_classes else None
    denoise = make_denoiser(lambda z, timestep: unet(z, timestep, labels), schedule, config.prediction_type)
    return np.array(ddim(denoise, noise, grids.uniform_time(SAMPLE_STEPS), schedule))
