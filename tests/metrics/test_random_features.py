"""The random network: fixed for ever, independent of batches, sensitive to what FD must see; standardisation."""

import hashlib

import numpy as np
import pytest
from scipy import signal
from sklearn.datasets import load_digits

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics import random_features as module
from ado_tasks.metrics.frechet import excess
from ado_tasks.metrics.random_features import random_features, standardisation, standardise


def digits() -> np.ndarray:
    images = load_digits().images[np.random.default_rng(0).permutation(1797)]
    return (images / 8 - 1).astype(np.float32)[..., None]


def test_weights_are_the_same_for_ever() -> None:
    weights = module._gaussian("weight 0", (9, 32))
    assert hashlib.sha256(np.round(weights * 1e4).astype("<i8").tobytes()).hexdigest()[:16] == "82020e897d939657"
    assert abs(weights.mean()) < 0.2
    assert weights.std() == pytest.approx(1, abs=0.1)
    assert not np.array_equal(weights[:, 0], module._gaussian("weight 1", (9, 32))[:, 0])
    np.testing.assert_allclose(random_features(digits()[:1])[0, :3], [0.3182874, 1.315131, 0.3744851], rtol=1e-4)


def test_convolution_is_scipys() -> None:
    rng = np.random.default_rng(1)
    maps = rng.normal(size=(1, 6, 5, 2)).astype(np.float32)
    weight = rng.normal(size=(18, 1)).astype(np.float32)
    ours = (module._patches(maps) @ weight)[0, :, :, 0]
    kernel = weight.reshape(3, 3, 2)
    truth = sum(signal.correlate2d(maps[0, :, :, c], kernel[:, :, c], mode="same") for c in range(2))
    np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=1e-5)


def test_pooling_by_hand() -> None:
    maps = np.arange(20, dtype=np.float32).reshape(1, 4, 5, 1)
    np.testing.assert_allclose(module._halve(maps)[0, :, :, 0], [[3, 5], [13, 15]])
    np.testing.assert_allclose(module._quarters(maps[:, :2, :2])[0], [0, 1, 5, 6])


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    images = digits()[:20]
    whole = random_features(images)
    monkeypatch.setattr(module, "BATCH", 7)
    np.testing.assert_allclose(random_features(images), whole, rtol=1e-4, atol=1e-6)
    assert whole.shape == (20, 64)
    assert whole.dtype == np.float64


@pytest.mark.parametrize("shape", [(2, 4, 4, 1), (2, 17, 9, 3), (1, 32, 32, 3)])
def test_any_size_and_number_of_channels(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(2).uniform(-1, 1, shape).astype(np.float32)
    features = random_features(images)
    assert features.shape == (shape[0], 64)
    assert np.all(features.std(axis=1) > 0)


def test_fd_sees_noise_blur_and_a_moved_picture_and_not_other_digits() -> None:
    images = digits()
    raw = random_features(images)
    scale = standardisation(raw[:1000])
    train, real = standardise(raw[:700], *scale), standardise(raw[1000:1400], *scale)

    def ratio(changed: np.ndarray) -> float:
        found = standardise(random_features(changed.astype(np.float32)), *scale)
        return excess(found, train, real, draws=50, rng=np.random.default_rng(3)).ratio

    others = images[1400:]
    noise = np.random.default_rng(4).normal(size=others.shape)
    soft = (others + np.roll(others, 1, axis=1) + np.roll(others, 1, axis=2)) / 3
    assert abs(ratio(others)) < 0.15
    assert ratio(others + 0.3 * noise) > 0.5
    assert ratio(soft) > 2
    assert ratio(np.roll(others, 1, axis=2)) > 2


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8), np.float32), "shape"),
        (np.zeros((0, 8, 8, 1), np.float32), "shape"),
        (np.zeros((2, 3, 8, 1), np.float32), "h, w >= 4"),
        (np.zeros((2, 8, 8, 1), np.uint8), "floats"),
        (np.full((2, 8, 8, 1), 255.0), "largest magnitude is 255"),
        (np.full((2, 8, 8, 1), np.nan), "finite"),
    ],
)
def test_bad_images_are_named(images: np.ndarray, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        random_features(images)


def test_standardised_train_features_have_mean_0_and_deviation_1() -> None:
    train = np.random.default_rng(5).normal(3, [1.0, 2.0, 5.0], size=(500, 3))
    done = standardise(train, *standardisation(train))
    np.testing.assert_allclose(done.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(done.std(axis=0), 1)


def test_a_dead_unit_neither_divides_by_zero_nor_rules() -> None:
    train = np.random.default_rng(6).normal(size=(500, 5))
    train[:, 2] = 0.0
    mean, std = standardisation(train)
    assert std[2] == pytest.approx(0.05 * np.median(train.std(axis=0)))
    assert np.all(np.isfinite(standardise(train + 1, mean, std)))
    with pytest.raises(StatisticsError, match="5 of 5 features never vary"):
        standardisation(np.ones((10, 5)))


def test_bad_statistics_are_named() -> None:
    values = np.ones((4, 3))
    with pytest.raises(StatisticsError, match="mean: must have shape"):
        standardise(values, np.zeros(2), np.ones(3))
    with pytest.raises(StatisticsError, match="std: must be positive"):
        standardise(values, np.zeros(3), np.array([1.0, 0.0, 1.0]))
    with pytest.raises(StatisticsError, match="std: holds values"):
        standardise(values, np.zeros(3), np.array([1.0, np.nan, 1.0]))
