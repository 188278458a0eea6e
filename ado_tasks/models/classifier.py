"""Two small convolutional classifiers, pure functions of named weights: one makes features, one judges classes.

They differ on purpose: a generator that happens to please one network should not please both for the same reason.
`pooled` is a plain stack (3x3 convolutions, mean pooling, a linear bottleneck); `patched` folds 2x2 pixels into
channels first and then adds a residual block. Both take any height and width from 4 pixels, grey or RGB.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ado_tasks.backend import mx
from ado_tasks.errors import ArtifactError, StatisticsError
from ado_tasks.models.ops import conv2d
from ado_tasks.rng import key
from ado_tasks.storage import load_arrays, read_json, sha256_file

Weights = dict[str, mx.array]
CONFIG, FEATURE_NET, JUDGE_NET = "config.json", "feature_net.safetensors", "judge_net.safetensors"
BATCH = 256  # images at a time where nothing is trained: bounds memory at any resolution
_FINAL_SIDE = 4  # pooling stops when neither side exceeds this: what is left still says where things are


@dataclass(frozen=True)
class Architecture:
    """What is needed to build a classifier; stored beside its weights."""

    kind: Literal["pooled", "patched"]
    height: int  # pixels
    width: int  # pixels
    channels: int  # 1 or 3
    classes: int  # outputs
    filters: int  # of the first convolution
    dimensions: int  # of the penultimate layer


def initialise(arch: Architecture, seed: int, *names: str) -> Weights:
    """He-normal weights (He et al. 2015, eq. 10: variance 2 / fan-in), zero biases; every tensor from its own key.

    `input.mean` and `input.std` (of each channel) start at 0 and 1, are set from data, and are never trained.
    """
    weights: Weights = {"input.mean": mx.zeros((arch.channels,)), "input.std": mx.ones((arch.channels,))}
    for name, shape in _weight_shapes(arch).items():
        draw = mx.random.normal(shape, key=key(seed, *names, name))
        weights[f"{name}.weight"] = draw * (2 / prod(shape[1:])) ** 0.5
        weights[f"{name}.bias"] = mx.zeros((shape[0],))
    return weights


def penultimate(arch: Architecture, weights: Weights, images: mx.array) -> mx.array:
    """The layer before the classes, *before* its ReLU: nearly Gaussian, which is what a Fréchet distance assumes.

    Args:
        arch: what `weights` were initialised with.
        weights: of the network.
        images: float32 (n, height, width, channels) in [-1, 1].

    Returns:
        (n, dimensions).
    """
    mean, std = (mx.stop_gradient(weights[f"input.{name}"]) for name in ("mean", "std"))
    maps = _BODIES[arch.kind](arch, weights, (images - mean) / std)
    return _linear(weights, "features", maps.reshape(maps.shape[0], -1))


def logits(arch: Architecture, weights: Weights, images: mx.array) -> mx.array:
    """(n, classes), unnormalised."""
    return _linear(weights, "classes", mx.maximum(penultimate(arch, weights, images), 0))


@dataclass(frozen=True)
class FeatureExtractor:
    """Frozen features: a classifier's penultimate layer, each dimension standardised with the train part's figures."""

    architecture: Architecture
    weights: Weights
    mean: np.ndarray  # float32 (d,), over the train part
    std: np.ndarray  # float32 (d,)
    whitening: np.ndarray  # float32 (d, d): see metrics/whitening.py; of the train part's standardised features
    sha256: str  # of the file that holds all of it; quoted in every report that uses the features

    def features(self, images: np.ndarray | mx.array) -> np.ndarray:
        """(penultimate - mean) / std.

        Args:
            images: float (n, height, width, channels) in [-1, 1]; what lies outside is clipped: no picture shows it.

        Returns:
            float32 (n, d).

        Raises:
            StatisticsError: an image is not finite.
        """
        raw = run_batched(penultimate, self.architecture, self.weights, images)
        return (raw - self.mean) / self.std

    def whitened(self, features: np.ndarray) -> np.ndarray:
        """Features as the kernel of KID takes them: (n, d) of `features` to (n, d) whitened ones."""
        return features @ self.whitening


@dataclass(frozen=True)
class Judge:
    """Says which class an image shows; another network than the one that makes the features."""

    architecture: Architecture
    weights: Weights
    sha256: str

    def predict(self, images: np.ndarray | mx.array) -> np.ndarray:
        """int64 (n,): the label of each of float (n, height, width, channels) images in [-1, 1]."""
        return run_batched(logits, self.architecture, self.weights, images).argmax(axis=1)


def load_features(folder: Path) -> FeatureExtractor:
    """The feature network in a folder that `features` made. Raises ArtifactError where it is damaged."""
    arch, weights, sha256 = _load(folder, "feature_net", FEATURE_NET, ("mean", "std", "whitening"))
    mean, std, whitening = (np.array(weights.pop(f"standardise.{name}")) for name in ("mean", "std", "whitening"))
    return FeatureExtractor(arch, weights, mean, std, whitening, sha256)


def load_judge(folder: Path) -> Judge:
    """The judge in a folder that `features` made. Raises ArtifactError where it is damaged, or there is none."""
    return Judge(*_load(folder, "judge_net", JUDGE_NET, ()))


def _load(folder: Path, section: str, file: str, figures: tuple[str, ...]) -> tuple[Architecture, Weights, str]:
    stored = read_json(folder / CONFIG)
    try:
        if stored[section] is None:
            raise ArtifactError(f"{folder}: there is no {section}: the dataset has no classes to judge")
        arch, expected = Architecture(**stored[section]["architecture"]), stored[section]["sha256"]
        wanted = expected_shapes(arch)
        for name in figures:
            wanted[f"standardise.{name}"] = (arch.dimensions,) * (2 if name == "whitening" else 1)
    except (KeyError, TypeError, ValueError) as problem:
        kind = type(problem).__name__
        raise ArtifactError(f"{folder / CONFIG}: not a record of networks ({kind}: {problem})") from None
    found = sha256_file(folder / file)
    if found != expected:
        raise ArtifactError(f"{folder / file}: checksum expected {expected}, found {found}")
    weights = load_arrays(folder / file)
    shapes = {name: tuple(array.shape) for name, array in weights.items()}
    if shapes != wanted:
        wrong = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
        raise ArtifactError(f"{folder / file}: tensors differ from the architecture in {CONFIG}: {', '.join(wrong)}")
    return arch, weights, found


def expected_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a network."""
    shapes: dict[str, tuple[int, ...]] = {"input.mean": (arch.channels,), "input.std": (arch.channels,)}
    for name, shape in _weight_shapes(arch).items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def run_batched(
    function: Callable[[Architecture, Weights, mx.array], mx.array],
    arch: Architecture,
    weights: Weights,
    images: np.ndarray | mx.array,
) -> np.ndarray:
    """Apply `penultimate` or `logits` to many images, `BATCH` at a time; float32."""
    shape = (arch.height, arch.width, arch.channels)
    if tuple(images.shape[1:]) != shape:
        raise StatisticsError(f"images of {tuple(images.shape[1:])} given to a network for {shape} (h, w, channels)")
    outputs = []
    for start in range(0, images.shape[0], BATCH):
        batch = np.array(images[start : start + BATCH], np.float32)
        if not np.isfinite(batch).all():
            last = start + len(batch) - 1
            raise StatisticsError(f"an image among {start}..{last} is not finite: no feature can be computed")
        outputs.append(np.array(function(arch, weights, mx.array(np.clip(batch, -1, 1)))))
    return np.concatenate(outputs) if outputs else np.zeros((0, function_width(function, arch)), np.float32)


def function_width(function: Callable[..., mx.array], arch: Architecture) -> int:
    """Numbers an image that `penultimate` or `logits` gives."""
    return arch.classes if function is logits else arch.dimensions


def describe(arch: Architecture) -> dict[str, Any]:
    """An architecture as plain values for `config.json`."""
    return asdict(arch)


def _pooled(arch: Architecture, weights: Weights, x: mx.array) -> mx.array:
    for stage in range(_stages(arch)):
        x = mx.maximum(_conv3(weights, f"stage{stage}", x), 0)
        x = _halve(x)
    return mx.maximum(_conv3(weights, "last", x), 0)


def _patched(arch: Architecture, weights: Weights, x: mx.array) -> mx.array:
    x = mx.maximum(_conv3(weights, "stem", _fold(x)), 0)
    inner = mx.maximum(_conv3(weights, "block.a", x), 0)
    x = mx.maximum(x + _conv3(weights, "block.b", inner), 0)
    while max(x.shape[1:3]) > _FINAL_SIDE:
        x = _halve(x)
    return x


_BODIES: dict[str, Callable[[Architecture, Weights, mx.array], mx.array]] = {"pooled": _pooled, "patched": _patched}


def _weight_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape with outputs first, the rest being the fan-in."""
    filters = arch.filters
    shapes: dict[str, tuple[int, ...]] = {}
    if arch.kind == "pooled":
        before = arch.channels
        for stage in range(_stages(arch)):
            shapes[f"stage{stage}"] = (filters * min(2**stage, 2), 3, 3, before)
            before = filters * min(2**stage, 2)
        shapes["last"] = (2 * filters, 3, 3, before)
        height, width = _after_halving(arch.height, arch.width, _stages(arch))
        flat = height * width * 2 * filters
    else:
        shapes["stem"] = (2 * filters, 3, 3, 4 * arch.channels)
        for name in ("block.a", "block.b"):
            shapes[name] = (2 * filters, 3, 3, 2 * filters)
        height, width = _after_halving(arch.height, arch.width, 1)
        while max(height, width) > _FINAL_SIDE:
            height, width = _after_halving(height, width, 1)
        flat = height * width * 2 * filters
    return {**shapes, "features": (arch.dimensions, flat), "classes": (arch.classes, arch.dimensions)}


def _stages(arch: Architecture) -> int:
    height, width, stages = arch.height, arch.width, 0
    while max(height, width) > _FINAL_SIDE:
        height, width = _after_halving(height, width, 1)
        stages += 1
    return max(stages, 1)


def _after_halving(height: int, width: int, times: int) -> tuple[int, int]:
    for _ in range(times):
        height, width = max(1, -(-height // 2)), max(1, -(-width // 2))
    return height, width


def _even(x: mx.array) -> mx.array:
    """Repeat the last row or column of an odd side."""
    if x.shape[1] % 2:
        x = mx.concatenate([x, x[:, -1:]], axis=1)
    if x.shape[2] % 2:
        x = mx.concatenate([x, x[:, :, -1:]], axis=2)
    return x


def _halve(x: mx.array) -> mx.array:
    """2x2 mean pooling of (n, h, w, c)."""
    n, h, w, c = _even(x).shape
    return _even(x).reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def _fold(x: mx.array) -> mx.array:
    """2x2 pixels into channels: (n, h, w, c) -> (n, h/2, w/2, 4c)."""
    x = _even(x)
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, h // 2, w // 2, 4 * c)


def _conv3(weights: Weights, name: str, x: mx.array) -> mx.array:
    return conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)


def _linear(weights: Weights, name: str, x: mx.array) -> mx.array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
