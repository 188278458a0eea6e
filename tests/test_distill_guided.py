"""Guided distillation as a task: at a weight one network samples as the guided teacher does, at half the cost."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ado_tasks.backend import mx
from ado_tasks.config import parse
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.distill import distill
from ado_tasks.distillation.guided import at_weight
from ado_tasks.errors import ConfigError
from ado_tasks.interop.diffusers_folder import StoredModel, read_model
from ado_tasks.models.embeddings import WeightEmbedding
from ado_tasks.optimise.consistency import ConsistencyConfig
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.optimise.guided import GuidedConfig, with_weight
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.report import SILENT, Recorder
from ado_tasks.sampling import Sampler, draw
from ado_tasks.storage import read_json, sha256_tree, write_json
from ado_tasks.train import TrainConfig, _without_some_labels, train

MODEL = {
    "block_out_channels": [16], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False,
}  # fmt: skip
CONFIG = GuidedConfig(
    steps=300, batch_size=32, learning_rate=5e-3, weights=(1.0, 2.5, 4.0), checkpoint_every=1000
)  # fmt: skip
STEPS = 8  # of DDIM


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 4×4 images, each around two patterns of which they share one; a teacher, and its family."""
    folder = tmp_path_factory.mktemp("guided")
    random = np.random.default_rng(0)
    labels = np.arange(800) % 2
    patterns = random.uniform(60, 195, (3, 4, 4))
    shared = random.random(800) < 0.5
    means = np.where(shared[:, None, None], patterns[2], patterns[labels])
    images = np.clip(means + random.normal(0, 20, means.shape), 0, 255).astype(np.uint8)
    np.savez(folder / "images.npz", images=images, labels=labels)
    config = PrepareConfig(name="two", source="npz", train=0.6, selection=0.2, report=0.2)
    prepare(config, out=folder / "data", seed=0, source_path=folder / "images.npz")
    taught = TrainConfig(
        model=MODEL, steps=300, batch_size=32, learning_rate=1e-2, warmup_steps=10, ema_decay=0.99, label_dropout=0.2
    )
    train(taught, dataset=folder / "data", out=folder / "teacher", scratch=folder / "scratch", seed=0)
    run(folder, folder / "guided", CONFIG)
    return folder


def run(place: Path, out: Path, config: Any, **options: Any) -> Any:
    given = {"teacher": place / "teacher", "seed": 0, "report": SILENT, **options}
    return distill(config, dataset=place / "data", out=out, scratch=out.parent / "scratch", **given)


def samples(place: Path, model: StoredModel, guidance: float | None = None) -> np.ndarray:
    start = draw(0, "selection", 100, open_dataset(place / "data").split("selection"))
    return Sampler(model, 100, guidance=guidance)(start, "ddim", grids.uniform_time(STEPS))


@pytest.mark.parametrize("weight", [1.0, 1.6, 2.5, 3.3, 4.0])  # of which 1.6 and 3.3 have no folder
def test_samples_at_a_weight_are_the_guided_teachers(place: Path, weight: float) -> None:
    teacher = read_model(place / "teacher")
    wanted, without, most = (samples(place, teacher, guidance) for guidance in (weight, None, 4.0))
    found = samples(place, at_weight(place / "guided", weight))
    apart = np.square(found - wanted).mean(axis=(1, 2, 3))
    change = np.square(without - most).mean(axis=(1, 2, 3))
    # Here and there a sample ends at another pattern than its teacher's: those carry the mean, and are few.
    assert np.median(apart) < 0.1 * np.median(change)
    assert apart.mean() < 0.15 * change.mean()
    if weight > 2:
        assert apart.mean() < 0.15 * np.square(without - wanted).mean()


def test_a_folder_is_the_network_at_its_weight_in_the_teachers_own_form(place: Path) -> None:
    for weight in CONFIG.weights:
        folder = place / "guided" / f"w{weight:g}"
        assert (folder / "unet/config.json").read_bytes() == (place / "teacher/unet/config.json").read_bytes()
        stored, again = read_model(folder), at_weight(place / "guided", weight)
        x, t, labels = (
            mx.random.normal((3, 4, 4, 1), key=mx.random.key(0)),
            mx.array([1.0, 500, 999]),
            mx.array([0, 1, 0]),
        )
        np.testing.assert_array_equal(stored.unet(x, t, labels), again.unet(x, t, labels))
        assert stored.record["guidance"] == {"weight": weight} and "null_label" not in stored.record
        assert [event["task"] for event in stored.record["history"]] == ["train", "distill"]


def test_a_fixed_weight_is_exactly_what_is_added(place: Path) -> None:
    unet = read_model(place / "teacher").unet
    embedding = WeightEmbedding(unet.config.embedding_width, 1.0, 4.0)
    layer = embedding.layers.linear_2
    layer.update({"bias": mx.random.normal(layer.bias.shape, key=mx.random.key(1))})
    x, t, labels = mx.random.normal((2, 4, 4, 1), key=mx.random.key(0)), mx.array([20.0, 700]), mx.array([0, 1])
    wanted = unet(x, t, labels, added=embedding(mx.array([3.0, 3.0])))
    assert np.abs(np.array(wanted - unet(x, t, labels))).max() > 0.01
    unet.update(with_weight(unet.parameters(), embedding, 3.0))
    np.testing.assert_allclose(unet(x, t, labels), wanted, atol=1e-5)


def test_a_stopped_run_goes_on_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    class Stop(Recorder):
        def progress(self, done: int, total: int, **figures: float) -> None:
            if done == 50:
                raise KeyboardInterrupt

    short = replace(CONFIG, steps=75)
    run(place, tmp_path / "unbroken", short)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "broken", short, report=Stop())
    assert list((tmp_path / "scratch").rglob("*.safetensors"))
    run(place, tmp_path / "broken", short)
    assert sha256_tree(tmp_path / "broken") == sha256_tree(tmp_path / "unbroken")
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))


def test_it_teaches_few_steps_as_any_teacher(place: Path, tmp_path: Path) -> None:
    config = DistillConfig(teacher_steps=STEPS, student_steps=(4,), stage_steps=150, batch_size=32, learning_rate=2e-3)
    run(place, tmp_path / "progressive", config, teacher=place / "guided/w4")
    student, teacher = read_model(tmp_path / "progressive/4"), read_model(place / "guided/w4")
    start = draw(0, "selection", 100, open_dataset(place / "data").split("selection"))
    found, coarse = (Sampler(model, 100)(start, "ddim", grids.uniform_time(4)) for model in (student, teacher))
    wanted = samples(place, teacher)
    assert np.square(found - wanted).mean() < 0.5 * np.square(coarse - wanted).mean()
    assert [event.get("method") for event in student.record["history"]] == [None, "guided", "progressive"]


def test_what_cannot_be_guided_is_named(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "teacher", tmp_path / "plain")
    write_json(tmp_path / "plain/ado.json", {**read_json(place / "teacher/ado.json"), "null_label": None})
    with pytest.raises(ConfigError, match=r"names null_label None for 3 classes; train it with train\.label_dropout"):
        run(place, tmp_path / "out", CONFIG, teacher=tmp_path / "plain")
    with pytest.raises(ConfigError, match="--start"):
        run(place, tmp_path / "out", CONFIG, start=place / "teacher")
    with pytest.raises(ConfigError, match=r"guidance weight: 5.0 is not allowed: 1 to 4"):
        at_weight(place / "guided", 5.0)
    for values, said in (
        ({"weights": [1, 5]}, "the network is taught 1.0 to 4.0 only"),
        ({"weights": []}, "at least one"),
        ({"lowest_weight": 4.0}, "must be less than"),
        ({"student_steps": [1]}, "unknown key"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse(DistillConfig | ConsistencyConfig | GuidedConfig, {"method": "guided", **values}, "distill.guided")


def test_labels_are_dropped_anew_at_each_step() -> None:
    config = TrainConfig(model=MODEL, label_dropout=0.2)
    batch = {"labels": mx.arange(4000, dtype=mx.int32) % 2, "t": mx.zeros(4000)}
    seen = [np.array(_without_some_labels(batch, config, 2, 0, step)["labels"]) for step in (0, 0, 1)]
    np.testing.assert_array_equal(seen[0], seen[1])
    dropped = [labels == 2 for labels in seen]
    assert abs(dropped[0].mean() - 0.2) < 0.03 and (dropped[0] & dropped[2]).mean() < 0.1
    np.testing.assert_array_equal(seen[0][~dropped[0]], np.array(batch["labels"])[~dropped[0]])
    assert _without_some_labels(batch, config, None, 0, 0) is batch


def test_only_dropped_labels_need_a_null_class(place: Path, tmp_path: Path) -> None:
    said = read_json(place / "teacher/ado.json")
    assert said["null_label"] == 2 and read_json(place / "teacher/unet/config.json")["num_class_embeds"] == 3
    config = TrainConfig(model=MODEL, steps=3, batch_size=8, warmup_steps=1)
    train(config, dataset=place / "data", out=tmp_path / "plain", scratch=tmp_path, seed=0)
    said = read_json(tmp_path / "plain/ado.json")
    assert "null_label" not in said and "label_dropout" not in said["history"][0]["config"]
    assert read_json(tmp_path / "plain/unet/config.json")["num_class_embeds"] == 2
    unlabelled = PrepareConfig(name="none", source="npz", labelled=False, train=0.6, selection=0.2, report=0.2)
    prepare(unlabelled, out=tmp_path / "none", seed=0, source_path=place / "images.npz")
    with pytest.raises(ConfigError, match=r"label_dropout: 0.1: the dataset has no labels"):
        config = replace(config, label_dropout=0.1)
        train(config, dataset=tmp_path / "none", out=tmp_path / "out", scratch=tmp_path, seed=0)
