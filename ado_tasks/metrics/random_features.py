"""Features of a fixed random convolutional network, the cross-check that nothing has tuned; standardisation.

Random convolutions keep texture and layout (Saxe et al. 2011, "On random weights and unsupervised feature learning").
They know no class, so they see what the trained features were taught to ignore.
"""

import hashlib

import numpy as np
import numpy.typing as npt
from scipy import special

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.checks import AnyArray, FloatArray, features

NAME = "random-convolution-v1"  # goes into reports; any change to what follows needs a new one
DIMENSION = 64  # as the trained features: enough for 10 to 20 classes, few enough for a covariance of 200 samples
FIRST, WIDTH = 32, 64  # filters of the first and of each further layer
SMALLEST = 4  # pixels a side: below this nothing can be halved and keep 2 x 2 places
BATCH = 256  # images at a time: the unfolded patches of 32 x 32 images then take 150 MB
STD_FLOOR = 0.05  # share of the median standard deviation: a rarely used unit must not rule the cubic kernel

Float32 = npt.NDArray[np.float32]


def random_features(images: AnyArray) -> FloatArray:
    """Features (n, 64) of images (n, h, w, c) in [-1, 1], h and w at least 4; everywhere the same but for rounding.

    Layers of 3 x 3 convolution (normal weights of variance 2 / fan-in, He et al. 2015; normal biases), ReLU and 2 x 2
    mean until a side is under 4; the mean over each quarter of what is left; a random projection to 64 numbers.
    `StatisticsError` for other shapes, values that are not finite, or values outside of [-1, 1] by more than a solver's
    overshoot (|x| > 10 is a wrong scale).
    """
    pictures = np.asarray(images)
    _check(pictures)
    parts = [_forward(pictures[start : start + BATCH].astype(np.float32)) for start in range(0, len(pictures), BATCH)]
    return np.concatenate(parts).astype(np.float64)


def standardisation(train: AnyArray) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation (d,) of the train part's features, to be frozen and given to `standardise`.

    A deviation under 5 % of the median one is raised to that (a dead unit has 0, and one picture that wakes it would
    outweigh all others).
    """
    values = features(train, "train")
    std = values.std(axis=0)
    typical = float(np.median(std))
    if typical == 0.0:
        dead = np.count_nonzero(std == 0)
        raise StatisticsError(f"train: {dead} of {len(std)} features never vary: the network is dead")
    return values.mean(axis=0), np.maximum(std, STD_FLOOR * typical)


def standardise(values: AnyArray, mean: AnyArray, std: AnyArray) -> FloatArray:
    """(values - mean) / std for values (n, d) and the train part's frozen mean and std (d,), every std > 0."""
    flat = features(values, "features", minimum=1)
    for name, figure in (("mean", mean), ("std", std)):
        if np.shape(figure) != flat.shape[1:]:
            raise StatisticsError(f"{name}: must have shape {flat.shape[1:]}, got {np.shape(figure)}")
        if not np.all(np.isfinite(figure)):
            raise StatisticsError(f"{name}: holds values that are not finite")
    if not np.all(np.asarray(std) > 0):
        raise StatisticsError("std: must be positive everywhere; `standardisation` makes it so")
    return (flat - np.asarray(mean, np.float64)) / np.asarray(std, np.float64)


def _check(images: AnyArray) -> None:
    shape = images.shape
    if images.ndim != 4 or len(images) == 0 or min(shape[1:3]) < SMALLEST or shape[3] == 0:
        raise StatisticsError(f"images: must have shape (n, h, w, c) with h, w >= {SMALLEST}, got {shape}")
    if images.dtype.kind != "f":
        raise StatisticsError(f"images: must be floats in [-1, 1], got dtype {images.dtype}")
    largest = float(np.max(np.abs(images)))
    if not largest <= 10:  # also refuses NaN
        raise StatisticsError(f"images: must be finite and in [-1, 1], the largest magnitude is {largest}")


def _forward(images: Float32) -> Float32:
    maps, layer = images, 0
    while min(maps.shape[1:3]) >= SMALLEST:
        filters = FIRST if layer == 0 else WIDTH
        weight = _gaussian(f"weight {layer}", (9 * maps.shape[3], filters)) * np.sqrt(2 / (9 * maps.shape[3]))
        bias = 0.5 * _gaussian(f"bias {layer}", (filters,))
        maps = _halve(np.maximum(_patches(maps) @ weight.astype(np.float32) + bias, 0))
        layer += 1
    quarters = _quarters(maps)
    projection = _gaussian("projection", (quarters.shape[1], DIMENSION)) / np.sqrt(np.float32(quarters.shape[1]))
    return quarters @ projection


def _patches(maps: Float32) -> Float32:
    """3 x 3 neighbourhoods with zeros outside, (n, h, w, c) to (n, h, w, 9 c)."""
    n, h, w, c = maps.shape
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return np.stack(shifted, axis=3).reshape(n, h, w, 9 * c)


def _halve(maps: Float32) -> Float32:
    """Mean of 2 x 2 neighbours; of an odd side the last line is left out."""
    n, h, w, c = maps.shape
    even = maps[:, : h // 2 * 2, : w // 2 * 2]
    return even.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def _quarters(maps: Float32) -> Float32:
    """Mean of each quarter of the map, (n, h, w, c) to (n, 4 c)."""
    halves = np.array_split(maps, 2, axis=1)
    quarters = [quarter.mean(axis=(1, 2)) for half in halves for quarter in np.array_split(half, 2, axis=2)]
    return np.concatenate(quarters, axis=1)


def _gaussian(name: str, shape: tuple[int, ...]) -> Float32:
    """Standard normal numbers that depend on nothing but their name and shape.

    Made from SHAKE-256, not from a NumPy generator, whose stream may change between versions (NEP 19).
    """
    digest = hashlib.shake_256(f"{NAME} {name} {shape}".encode()).digest(8 * int(np.prod(shape)))
    uniform = ((np.frombuffer(digest, "<u8") >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    return special.ndtri(uniform).reshape(shape).astype(np.float32)
