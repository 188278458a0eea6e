"""The task `features`: what the networks compute, that they learn, purity, and that damage is refused."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from ado_tasks.backend import mx
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.errors import ArtifactError, DivergenceError, StatisticsError
from ado_tasks.features import FeaturesConfig, features, load_features, load_judge, orient, shift
from ado_tasks.models import classifier
from ado_tasks.models.classifier import Architecture
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.report import Recorder
from ado_tasks.storage import load_arrays, save_arrays, sha256_file

SHORT = FeaturesConfig(dimensions=8, filters=4, steps=3, batch=8)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare(PrepareConfig(), out=out, seed=0)
    return out


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> Path:
    """The defaults, on digits: what every report uses."""
    out = tmp_path_factory.mktemp("features") / "digits"
    features(FeaturesConfig(), dataset=digits, out=out, seed=0)
    return out


@pytest.fixture
def shapes(tmp_path) -> Path:
    config = PrepareConfig(source="shapes", count=900, height=9, width=14, train=0.8, selection=0.1, report=0.1)
    prepare(config, out=tmp_path / "shapes", seed=0)
    return tmp_path / "shapes"


# --- the networks, against NumPy in float64 ---


def conv3_oracle(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    n, h, w, _ = x.shape
    out = np.zeros((n, h, w, len(weight)))
    for i in range(3):
        for j in range(3):
            out += padded[:, i : i + h, j : j + w] @ weight[:, i, j].T
    return out + bias


def halve_oracle(x: np.ndarray) -> np.ndarray:
    x = np.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)), mode="edge")
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def fold_oracle(x: np.ndarray) -> np.ndarray:
    x = np.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)), mode="edge")
    return np.concatenate([x[:, ::2, ::2], x[:, ::2, 1::2], x[:, 1::2, ::2], x[:, 1::2, 1::2]], axis=-1)


def logits_oracle(arch: Architecture, weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    def conv(name: str, x: np.ndarray) -> np.ndarray:
        return conv3_oracle(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = (x - weights["input.mean"]) / weights["input.std"]
    if arch.kind == "pooled":
        stage = 0
        while f"stage{stage}.weight" in weights:
            x = halve_oracle(np.maximum(conv(f"stage{stage}", x), 0))
            stage += 1
        x = np.maximum(conv("last", x), 0)
    else:
        x = np.maximum(conv("stem", fold_oracle(x)), 0)
        x = np.maximum(x + conv("block.b", np.maximum(conv("block.a", x), 0)), 0)
        while max(x.shape[1:3]) > 4:
            x = halve_oracle(x)
    x = x.reshape(len(x), -1) @ weights["features.weight"].T + weights["features.bias"]
    return np.maximum(x, 0) @ weights["classes.weight"].T + weights["classes.bias"]


@pytest.mark.parametrize("kind", ["pooled", "patched"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (16, 16, 3), (9, 14, 3), (5, 31, 1), (4, 4, 1), (64, 64, 3)])
def test_networks_equal_numpy_at_every_shape(kind, shape):
    arch = Architecture(kind, *shape, classes=7, filters=4, dimensions=8)
    weights = classifier.initialise(arch, 0, "test")
    rng = np.random.default_rng(0)
    weights = {  # biases start at 0, input figures at 0 and 1: move them, so that a forgotten one shows
        name: w if name.endswith("weight") else mx.array(rng.uniform(0.5, 1.5, w.shape), mx.float32)
        for name, w in weights.items()
    }
    images = rng.uniform(-1, 1, (3, *shape))
    expected = logits_oracle(arch, {name: np.array(w, np.float64) for name, w in weights.items()}, images)
    found = np.array(classifier.logits(arch, weights, mx.array(images, mx.float32)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_initial_weights_have_he_variance_and_keys_of_their_own():
    arch = Architecture("patched", 16, 16, 3, classes=10, filters=32, dimensions=64)
    weights = classifier.initialise(arch, 0, "test")
    for name in ("block.a", "block.b"):
        assert np.array(weights[f"{name}.weight"]).std() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert np.abs(np.array(weights["block.a.weight"]) - np.array(weights["block.b.weight"])).max() > 0.01
    again = classifier.initialise(arch, 0, "test")
    assert all(mx.array_equal(again[name], w) for name, w in weights.items())


def test_the_two_networks_share_no_layer_of_the_same_shape_but_the_last():
    shapes = [
        {n: s for n, s in classifier.expected_shapes(Architecture(kind, 8, 8, 1, 10, 16, 48)).items() if "weight" in n}
        for kind in ("pooled", "patched")
    ]
    assert set(shapes[0]) & set(shapes[1]) == {"features.weight", "classes.weight"}


# --- augmentation ---


def test_shift_moves_half_of_the_images_and_repeats_the_border():
    images = np.arange(400 * 36, dtype=np.float32).reshape(400, 6, 6, 1)
    moved = shift(images, 1, np.random.default_rng(0))
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    offsets = []
    for before, after in zip(padded, moved, strict=True):
        found = [(i, j) for i in range(3) for j in range(3) if np.array_equal(before[i : i + 6, j : j + 6], after)]
        assert len(found) == 1
        offsets += found
    still = offsets.count((1, 1)) / 400
    assert 0.45 < still < 0.66  # 1/2 + 1/2 · 1/9
    assert len(set(offsets)) == 9
    np.testing.assert_array_equal(shift(images, 0, np.random.default_rng(0)), images)


def test_orientations_are_the_four_flips():
    image = np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1)
    four = orient(np.repeat(image, 4, axis=0), np.arange(4))[..., 0]
    np.testing.assert_array_equal(four[0], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(four[1], [[2, 1, 0], [5, 4, 3]])
    np.testing.assert_array_equal(four[2], [[3, 4, 5], [0, 1, 2]])
    np.testing.assert_array_equal(four[3], [[5, 4, 3], [2, 1, 0]])


# --- what is learned ---


def test_digits_are_told_apart_by_both_networks(digits, trained):
    """On the report part, which no network has seen and no choice was made on."""
    record = json.loads((trained / "config.json").read_text())
    assert record["judge_net"]["accuracy"]["selection"] >= 0.97
    assert record["feature_net"]["accuracy"]["selection"] >= 0.96
    part = open_dataset(digits).split("report")
    assert (load_judge(trained).predict(part.batch(slice(None))) == part.labels).mean() >= 0.96


def test_features_are_standardised_on_the_train_part_and_hold_the_classes(digits, trained):
    data, extractor = open_dataset(digits), load_features(trained)
    train, report = data.split("train"), data.split("report")
    x = extractor.features(train.batch(slice(None)))
    assert x.dtype == np.float32
    assert x.shape == (999, 48)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(x.std(axis=0), 1, atol=1e-3)
    centres = np.array([x[train.labels == label].mean(0) for label in range(10)])
    y = extractor.features(report.batch(slice(None)))
    nearest = np.linalg.norm(y[:, None] - centres, axis=-1).argmin(1)
    assert (nearest == report.labels).mean() > 0.94


def test_features_feel_blur_and_noise(digits, trained):
    """A network that only knew classes would not: the mean shift under damage must exceed that between real halves."""
    extractor = load_features(trained)
    real = open_dataset(digits).split("report").batch(slice(None))
    x = extractor.features(real)
    halves = np.linalg.norm(x[:200].mean(0) - x[200:].mean(0))
    blurred = (real + np.roll(real, 1, axis=2)) / 2
    noisy = np.clip(real + np.random.default_rng(0).normal(0, 0.3, real.shape), -1, 1)
    for damaged in (blurred, noisy):
        assert np.linalg.norm(extractor.features(damaged).mean(0) - x.mean(0)) > 1.5 * halves


def test_batches_do_not_change_a_feature(digits, trained):
    extractor = load_features(trained)
    images = open_dataset(digits).split("train").batch(slice(0, 600))
    whole = extractor.features(images)
    np.testing.assert_allclose(extractor.features(images[300:310]), whole[300:310], atol=1e-4)
    np.testing.assert_array_equal(extractor.features(mx.array(images)), whole)
    assert extractor.features(images[:0]).shape == (0, 48)
    assert load_judge(trained).predict(images[:0]).shape == (0,)


def test_what_no_picture_shows_is_clipped_and_nan_is_refused(digits, trained):
    extractor, judge = load_features(trained), load_judge(trained)
    images = open_dataset(digits).split("train").batch(slice(0, 5))
    np.testing.assert_array_equal(extractor.features(images * 3), extractor.features(np.clip(images * 3, -1, 1)))
    images[3, 2, 2, 0] = np.nan
    for function in (extractor.features, judge.predict):
        with pytest.raises(StatisticsError, match=r"0\.\.4 is not finite"):
            function(images)
        with pytest.raises(StatisticsError, match=r"images of \(8, 7, 1\) given to a network for \(8, 8, 1\)"):
            function(images[:, :, :7])


def test_colours_odd_sides_and_attributes(shapes, tmp_path):
    """Two hundred small steps must learn the colours of 9 x 14 images, and the shapes better than by chance."""
    config = FeaturesConfig(dimensions=16, filters=8, steps=200, batch=32, learning_rate=1e-2, shift_pixels=0)
    features(config, dataset=shapes, out=tmp_path / "f", seed=0)
    part = open_dataset(shapes).split("report")
    found = load_judge(tmp_path / "f").predict(part.batch(slice(None)))
    assert (found % 6 == part.labels % 6).mean() > 0.7  # chance: 1 / 6
    record = json.loads((tmp_path / "f" / "config.json").read_text())
    assert record["feature_net"]["accuracy"]["train"] > 0.3  # chance: 1 / 18
    figures = load_arrays(tmp_path / "f" / "judge_net.safetensors")
    seen = open_dataset(shapes).split("train").batch(slice(None))
    np.testing.assert_allclose(figures["input.mean"], seen.mean(axis=(0, 1, 2)), atol=1e-5)  # not trained
    np.testing.assert_allclose(figures["input.std"], seen.std(axis=(0, 1, 2)), atol=1e-5)


# --- a dataset without classes ---


def test_without_classes_orientation_is_learned_and_there_is_no_judge(tmp_path):
    prepare(PrepareConfig(labelled=False), out=tmp_path / "d", seed=0)
    long = FeaturesConfig(dimensions=16, filters=8, steps=300, batch=32, learning_rate=5e-3)
    result = features(long, dataset=tmp_path / "d", out=tmp_path / "f", seed=0)
    assert result.task == "orientation"
    assert result.judge_accuracy is None
    assert result.feature_accuracy > 0.4  # chance: 1 / 4; zeros and eights look alike in all four
    assert load_features(tmp_path / "f").features(np.zeros((2, 8, 8, 1), np.float32)).shape == (2, 16)
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"config.json", "feature_net.safetensors"}
    with pytest.raises(ArtifactError, match="no judge_net: the dataset has no classes"):
        load_judge(tmp_path / "f")


# --- purity and damage ---


def test_twice_gives_the_same_bytes_and_nothing_global_moves(digits, tmp_path):
    def state() -> tuple:
        return (
            repr(np.random.get_state()),  # noqa: NPY002
            random.getstate(),
            [np.array(part).tolist() for part in mx.random.state],
            dict(os.environ),
            Path.cwd(),
        )

    before = state()
    features(SHORT, dataset=digits, out=tmp_path / "a", seed=3)
    assert state() == before
    features(SHORT, dataset=digits, out=tmp_path / "deeper" / "b", seed=3)
    features(SHORT, dataset=digits, out=tmp_path / "c", seed=4)
    names = ["config.json", "feature_net.safetensors", "judge_net.safetensors"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "deeper" / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "deeper"]


def test_the_train_part_alone_decides_the_weights(tmp_path):
    """Other selection and report images, the same train images: the same feature network, byte for byte."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 8, 8)).astype(np.uint8)
    labels = np.arange(200) % 4
    config = PrepareConfig(source="npz", train=0.5, selection=0.25, report=0.25)
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    prepare(config, out=tmp_path / "d1", seed=0, source_path=tmp_path / "x.npz")
    outside = (open_dataset(tmp_path / "d1").index["split"] != "train").to_numpy()
    images[outside] = rng.integers(0, 256, images[outside].shape)
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    prepare(config, out=tmp_path / "d2", seed=0, source_path=tmp_path / "x.npz")
    sums = [
        features(SHORT, dataset=tmp_path / name, out=tmp_path / f"f-{name}", seed=0).features_sha256
        for name in ("d1", "d2")
    ]
    assert sums[0] == sums[1]


def test_progress_curves_and_accuracies_are_reported(digits, tmp_path):
    recorder = Recorder()
    config = FeaturesConfig(dimensions=8, filters=4, steps=40, batch=8)
    result = features(config, dataset=digits, out=tmp_path / "f", seed=0, report=recorder)
    assert [step[:2] for step in recorder.steps] == [(done, 80) for done in range(1, 81)]
    said = {(name, step): value for name, value, step in recorder.metrics}
    assert {("loss_pooled", 20), ("loss_pooled", 40), ("loss_patched", 40)} <= set(said)
    assert said["judge_accuracy_selection", None] == result.judge_accuracy
    assert said["loss_pooled", 20] == recorder.steps[19][2]["loss"]


def test_input_figures_are_of_the_whole_train_part_even_when_it_is_sorted(tmp_path, monkeypatch):
    """Sorted by class, as folders are: dark images first, bright ones last."""
    from ado_tasks import features as module

    monkeypatch.setattr(module, "FIGURES_FROM", 50)
    rng = np.random.default_rng(0)
    images = np.concatenate([rng.integers(0, 50, (200, 8, 8)), rng.integers(200, 250, (200, 8, 8))]).astype(np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.repeat([0, 1], 200))
    prepare(PrepareConfig(source="npz"), out=tmp_path / "d", seed=0, source_path=tmp_path / "x.npz")
    features(SHORT, dataset=tmp_path / "d", out=tmp_path / "f", seed=0)
    mean = float(load_arrays(tmp_path / "f" / "judge_net.safetensors")["input.mean"].item())
    assert mean == pytest.approx(images.mean() / 127.5 - 1, abs=0.1)


def test_divergence_is_named_and_leaves_nothing(digits, tmp_path):
    config = FeaturesConfig(dimensions=8, filters=4, steps=50, batch=8, learning_rate=1e30)
    with pytest.raises(DivergenceError, match=r"features: the loss of the pooled network is (nan|inf) at step \d+"):
        features(config, dataset=digits, out=tmp_path / "f", seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("file", "load"), [("feature_net.safetensors", load_features), ("judge_net.safetensors", load_judge)]
)
def test_damaged_networks_are_refused(copy, file, load):
    path = copy / file
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=rf"{file}: checksum expected [0-9a-f]{{64}}, found [0-9a-f]{{64}}"):
        load(copy)
    path.unlink()
    with pytest.raises(ArtifactError, match=file):
        load(copy)
    (copy / "config.json").write_text('{"feature_net": {}, "judge_net": {"architecture": 3}}')
    with pytest.raises(ArtifactError, match=r"config\.json"):
        load(copy)


def test_tensors_of_another_architecture_are_refused(copy):
    path = copy / "judge_net.safetensors"
    weights = load_arrays(path)
    weights["stem.weight"] = mx.zeros((32, 3, 3, 5))
    save_arrays(path, weights)
    record = json.loads((copy / "config.json").read_text())
    record["judge_net"]["sha256"] = sha256_file(path)
    (copy / "config.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=r"tensors differ from the architecture in config\.json: stem\.weight$"):
        load_judge(copy)


def test_a_damaged_dataset_is_refused(digits, tmp_path):
    copy = Path(shutil.copytree(digits, tmp_path / "copy"))
    data = bytearray((copy / "shard-00000.npy").read_bytes())
    data[500] ^= 1
    (copy / "shard-00000.npy").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"shard-00000\.npy: checksum"):
        features(SHORT, dataset=copy, out=tmp_path / "f", seed=0)
    assert not (tmp_path / "f").exists()
