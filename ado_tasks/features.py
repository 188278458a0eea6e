"""Task `features`: train the two networks that measure quality on the dataset's own train part."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ado_tasks.backend import mx
from ado_tasks.config import config
from ado_tasks.datasets.shards import Dataset, Split, open_dataset
from ado_tasks.errors import ConfigError, DivergenceError
from ado_tasks.metrics.whitening import whitening
from ado_tasks.models import classifier
from ado_tasks.models.classifier import Architecture, FeatureExtractor, Judge, Weights, load_features, load_judge
from ado_tasks.report import SILENT, Reporter
from ado_tasks.rng import generator
from ado_tasks.storage import atomic_folder, save_arrays, sha256_file, write_json

ADAM = (0.9, 0.99)  # decay of the two moments: Kingma & Ba 2015 with a shorter second memory, as runs are short
ADAM_EPSILON = 1e-8  # Kingma & Ba 2015, algorithm 1
ORIENTATIONS = 4  # what a network tells apart where there are no classes: see `orient` and `rotate`
FIGURES_FROM = 2_000  # images: their mean is known to 1 in 45 of a standard deviation of images, which is plenty
CURVE_EVERY = 20  # steps between points of the loss curve


@config
class FeaturesConfig:
    """How the feature network and the judge are built and trained."""

    dimensions: Annotated[int, Field(ge=8, le=512)] = 48  # of the features
    filters: Annotated[int, Field(ge=4, le=256)] = 16  # of the first convolution; doubled behind it
    steps: Annotated[int, Field(ge=1)] = 400  # optimiser steps for each of the two networks
    batch: Annotated[int, Field(ge=2)] = 64  # images a step
    learning_rate: Annotated[float, Field(gt=0)] = (
        3e-3  # highest; warms up over a tenth of the steps, falls to 0 as half a cosine
    )
    # Without classes. orientation: mirrored, upside down or both, for any aspect ratio; rotation: by quarter turns, for
    # square images, and the one to take where the train part holds mirrored copies.
    unlabelled: Literal["orientation", "rotation"] = "orientation"
    shift_pixels: Annotated[int, Field(ge=0, le=8)] = 1  # half of the images are shifted by up to this much


@dataclass(frozen=True)
class FeaturesResult:
    """How good the two networks are on the selection part."""

    task: str  # what the feature network learned: "classes", "orientation" or "rotation"
    feature_accuracy: float
    judge_accuracy: float | None  # None for a dataset without classes
    features_sha256: str


def features(
    config: FeaturesConfig, *, dataset: Path, out: Path, seed: int, report: Reporter = SILENT
) -> FeaturesResult:
    """Train the feature network and the judge, and write both with their record.

    The features are the penultimate layer of the first network (before its ReLU), each dimension standardised with its
    mean and standard deviation over the train part; what whitens them, for KID, is stored beside. The judge has another
    architecture and another initialisation. A dataset without classes (or with one) has no judge; its feature network
    learns to tell four orientations apart (after Gidaris et al. 2018) or, with `unlabelled: rotation`, the four quarter
    turns (as they do), and the record says `"task": "orientation"` or `"rotation"`.

    Args:
        config: see FeaturesConfig.
        dataset: a folder made by `prepare`.
        out: `feature_net.safetensors`, `judge_net.safetensors` and `config.json` appear here together.
        seed: of initialisation, batches and shifts.
        report: where progress, loss curves and accuracies go.

    Raises:
        ArtifactError: the dataset is damaged.
        ConfigError: rotation of images that are not square.
        DivergenceError: a loss is not finite.
    """
    data = open_dataset(dataset)
    classes = data.num_classes > 1
    task = "classes" if classes else config.unlabelled
    if task == "rotation" and data.shape[0] != data.shape[1]:
        size = f"{data.shape[0]}x{data.shape[1]}"
        raise ConfigError(f"features.unlabelled: 'rotation' is not allowed for images of {size}: only for square ones")
    feature_arch = _architecture(config, data, "pooled", data.num_classes if classes else ORIENTATIONS)
    weights = _train(config, data, feature_arch, seed, _Progress(report, 0, 2 if classes else 1))
    record: dict[str, Any] = {"dataset_sha256": data.sha256}
    with atomic_folder(out) as folder:
        raw = _over(data.split("train"), classifier.penultimate, feature_arch, weights)
        std = np.where(raw.std(axis=0) > 0, raw.std(axis=0), 1)  # a dimension that never moves stays at 0
        figures = {"mean": raw.mean(axis=0), "std": std, "whitening": whitening((raw - raw.mean(axis=0)) / std)}
        standardise = {f"standardise.{name}": mx.array(value) for name, value in figures.items()}
        save_arrays(folder / classifier.FEATURE_NET, {**weights, **standardise})
        record["feature_net"] = _record(folder / classifier.FEATURE_NET, data, feature_arch, weights, task)
        record["feature_net"]["features"] = (
            "penultimate layer before ReLU; (x - mean) / std of the train part; for KID whitened"
        )
        record["judge_net"] = None
        if classes:
            judge_arch = _architecture(config, data, "patched", data.num_classes)
            judge = _train(config, data, judge_arch, seed, _Progress(report, 1, 2))
            save_arrays(folder / classifier.JUDGE_NET, judge)
            record["judge_net"] = _record(folder / classifier.JUDGE_NET, data, judge_arch, judge, task)
        write_json(folder / classifier.CONFIG, record)
    return _result(record, report)


@dataclass(frozen=True)
class _Progress:
    """Which of how many networks is in training, for one common progress bar."""

    report: Reporter
    network: int
    networks: int

    def step(self, kind: str, done: int, total: int, loss: float) -> None:
        self.report.progress(self.network * total + done, self.networks * total, loss=loss)
        if done % CURVE_EVERY == 0:
            self.report.metric(f"loss_{kind}", loss, done)


def _architecture(config: FeaturesConfig, data: Dataset, kind: Any, classes: int) -> Architecture:
    return Architecture(kind, *data.shape, classes=classes, filters=config.filters, dimensions=config.dimensions)


def _train(config: FeaturesConfig, data: Dataset, arch: Architecture, seed: int, progress: _Progress) -> Weights:
    """Adam on the cross-entropy; the batch of a step depends on the seed and the step alone."""
    part = data.split("train")
    weights = {**classifier.initialise(arch, seed, "features", arch.kind), **_input_figures(part)}
    first = {name: mx.zeros_like(w) for name, w in weights.items()}
    second = dict(first)
    step = mx.compile(_adam_step(arch))
    for number in range(config.steps):
        rng = generator(seed, "features", arch.kind, number)
        images, targets = _batch(part, data.num_classes > 1, config, rng)
        rate = config.learning_rate * _schedule(number, config.steps)
        # 1 - decay^t: the bias correction (Kingma & Ba 2015, algorithm 1). Arrays, so that nothing is compiled again.
        corrections = mx.array([1 - decay ** (number + 1) for decay in ADAM])
        weights, first, second, loss = step(
            weights, first, second, mx.array(images), mx.array(targets), mx.array(rate, mx.float32), corrections
        )
        mx.eval(weights, first, second)
        if not np.isfinite(value := float(np.array(loss))):
            raise DivergenceError(f"features: the loss of the {arch.kind} network is {value} at step {number}")
        progress.step(arch.kind, number + 1, config.steps, value)
    return weights


def _input_figures(part: Split) -> Weights:
    """Mean and standard deviation of each channel, of images spread evenly over the train part (which may be sorted).

    Without them a small shape on a dark ground is a small part of what the first layer sees: on 18 classes of drawn
    shapes, 16x16, both networks were 12 percentage points worse after 400 steps.
    """
    images = part.batch(np.linspace(0, len(part) - 1, min(len(part), FIGURES_FROM)).astype(np.int64))
    std = images.std(axis=(0, 1, 2))
    figures = {"mean": images.mean(axis=(0, 1, 2)), "std": np.where(std > 0, std, 1)}
    return {f"input.{name}": mx.array(values, mx.float32) for name, values in figures.items()}


def _schedule(step: int, steps: int) -> float:
    """Linear over the first tenth (without it the first, large steps can silence every ReLU), half a cosine to 0."""
    return min(1, 10 * (step + 1) / steps) * 0.5 * (1 + np.cos(np.pi * step / steps))


def _adam_step(arch: Architecture) -> Callable[..., tuple[Weights, Weights, Weights, mx.array]]:
    """One step of bias-corrected Adam as a pure function of arrays."""

    def loss_of(weights: Weights, images: mx.array, targets: mx.array) -> mx.array:
        scores = classifier.logits(arch, weights, images)
        chosen = mx.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
        return mx.mean(mx.logsumexp(scores, axis=1) - chosen)

    def step(
        weights: Weights,
        first: Weights,
        second: Weights,
        images: mx.array,
        targets: mx.array,
        rate: mx.array,
        corrections: mx.array,
    ) -> tuple[Weights, Weights, Weights, mx.array]:
        loss, gradient = mx.value_and_grad(loss_of)(weights, images, targets)
        first = {n: ADAM[0] * first[n] + (1 - ADAM[0]) * g for n, g in gradient.items()}
        second = {n: ADAM[1] * second[n] + (1 - ADAM[1]) * mx.square(g) for n, g in gradient.items()}
        weights = {
            n: w - rate * (first[n] / corrections[0]) / (mx.sqrt(second[n] / corrections[1]) + ADAM_EPSILON)
            for n, w in weights.items()
        }
        return weights, first, second, loss

    return step


def _batch(
    part: Split, classes: bool, config: FeaturesConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Random images of the part with their targets; half of them shifted."""
    indices = rng.integers(len(part), size=config.batch)
    images = shift(part.batch(indices), config.shift_pixels, rng)
    if classes:
        return images, part.labels[indices]
    turns = rng.integers(ORIENTATIONS, size=config.batch)
    return TURNED[config.unlabelled](images, turns), turns


def shift(images: np.ndarray, pixels: int, rng: np.random.Generator) -> np.ndarray:
    """Move half of the images by up to `pixels` in each direction; the border is repeated."""
    n, height, width, _ = images.shape
    offsets = np.where(rng.random(n) < 0.5, rng.integers(-pixels, pixels + 1, (2, n)), 0)
    rows = np.clip(np.arange(height) + offsets[0][:, None], 0, height - 1)
    cols = np.clip(np.arange(width) + offsets[1][:, None], 0, width - 1)
    return images[np.arange(n)[:, None, None], rows[:, :, None], cols[:, None, :]]


def orient(images: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """0: as is, 1: mirrored left to right, 2: upside down, 3: both."""
    mirrored = np.where((turns % 2 == 1)[:, None, None, None], images[:, :, ::-1], images)
    return np.where((turns >= 2)[:, None, None, None], mirrored[:, ::-1], mirrored)


def rotate(images: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Square images (n, side, side, channels), each by as many quarter turns against the clock."""
    out = images.copy()
    for quarter in range(1, 4):
        mine = turns % 4 == quarter
        out[mine] = np.rot90(images[mine], quarter, axes=(1, 2))
    return out


TURNED = {"orientation": orient, "rotation": rotate}


def _over(part: Split, function: Callable[..., mx.array], arch: Architecture, weights: Weights) -> np.ndarray:
    """`function` of every image of a part, read a batch at a time."""
    pieces = [slice(start, start + classifier.BATCH) for start in range(0, len(part), classifier.BATCH)]
    return np.concatenate([classifier.run_batched(function, arch, weights, part.batch(piece)) for piece in pieces])


def _accuracy(part: Split, arch: Architecture, weights: Weights, task: str) -> float:
    if task == "classes":
        return float(np.mean(_over(part, classifier.logits, arch, weights).argmax(axis=1) == part.labels))
    right = []
    for start in range(0, len(part), classifier.BATCH):
        images = part.batch(slice(start, start + classifier.BATCH))
        turns = np.arange(start, start + len(images)) % ORIENTATIONS
        scores = classifier.run_batched(classifier.logits, arch, weights, TURNED[task](images, turns))
        right.append(scores.argmax(axis=1) == turns)
    return float(np.mean(np.concatenate(right)))


def _record(path: Path, data: Dataset, arch: Architecture, weights: Weights, task: str) -> dict[str, Any]:
    accuracy = {name: _accuracy(data.split(name), arch, weights, task) for name in ("train", "selection")}
    return {
        "task": task,
        "architecture": classifier.describe(arch),
        "accuracy": accuracy,
        "file": path.name,
        "sha256": sha256_file(path),
    }


def _result(record: dict[str, Any], report: Reporter) -> FeaturesResult:
    net, judge = record["feature_net"], record["judge_net"]
    report.metric("feature_accuracy_selection", net["accuracy"]["selection"])
    if judge is not None:
        report.metric("judge_accuracy_selection", judge["accuracy"]["selection"])
    return FeaturesResult(
        task=net["task"],
        feature_accuracy=net["accuracy"]["selection"],
        judge_accuracy=None if judge is None else judge["accuracy"]["selection"],
        features_sha256=net["sha256"],
    )


__all__ = ["FeatureExtractor", "FeaturesConfig", "FeaturesResult", "Judge", "features", "load_features", "load_judge"]
