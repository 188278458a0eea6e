"""The task `distill` by consistency tuning: from its section to students that are sampled as their record says."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.config import parse, read_params
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.distill import distill
from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.interop.diffusers_folder import read_model, write_model
from ado_tasks.metrics.kernel import kid
from ado_tasks.metrics.random_features import random_features, standardisation, standardise
from ado_tasks.optimise.consistency import ConsistencyConfig
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.registry.workspace import Workspace
from ado_tasks.sampling import Sampler, draw
from ado_tasks.storage import read_json, sha256_tree
from ado_tasks.train import TrainConfig, train
from ado_tasks.variants import all_variants, student_variants

MODEL = {
    "block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False, "dropout": 0.1,
}  # fmt: skip
SETTINGS = {
    "method": "consistency", "steps": 40, "batch_size": 16, "warmup_steps": 5, "learning_rate": 1e-3,
    "student_steps": [3, 2, 1], "search_samples": 64, "search_levels": 3, "ema_decay": 0.9,
}  # fmt: skip


def settings(**options: Any) -> ConsistencyConfig:
    found = parse(DistillConfig | ConsistencyConfig, {**SETTINGS, **options}, "distill.consistency")
    assert isinstance(found, ConsistencyConfig)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher; a family that was tuned without checkpoints, one with many, one that began as another's student."""
    folder = tmp_path_factory.mktemp("consistency")
    prepare(PrepareConfig(name="digits", source="digits"), out=folder / "data", seed=0)
    config = TrainConfig(model=MODEL, steps=100, batch_size=32, warmup_steps=10)
    train(config, dataset=folder / "data", out=folder / "models/teacher", scratch=folder / "scratch", seed=0)
    for name, every in (("consistency", 1000), ("often", 10)):
        run(folder, name, settings(checkpoint_every=every))
    run(folder, "further", settings(), start=folder / "models/consistency/1")
    return folder


def run(folder: Path, family: str, config: ConsistencyConfig, **options: Any) -> Any:
    return distill(
        config, teacher=folder / "models/teacher", dataset=folder / "data", out=folder / "models" / family,
        scratch=folder / "scratch", seed=0, **options,
    )  # fmt: skip


def weights(folder: Path) -> bytes:
    return (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()


def test_checkpoints_change_nothing(place: Path) -> None:
    assert weights(place / "models/often/2") == weights(place / "models/consistency/2")
    curves = [read_json(place / "models" / name / "curves.json")["consistency"] for name in ("consistency", "often")]
    assert curves[0][-1][0] == curves[1][-1][0] == 40
    assert list((place / "scratch").rglob("*.safetensors")) == []


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    class Stop:
        """A reporter that stops the run once, in its middle."""

        def progress(self, done: int, total: int, **_: float) -> None:
            if done == 25:
                raise KeyboardInterrupt

        def metric(self, *_: Any) -> None: ...
        def picture(self, *_: Any) -> None: ...

    options = {"teacher": place / "models/teacher", "dataset": place / "data", "out": tmp_path / "consistency",
               "scratch": tmp_path / "scratch", "seed": 0}  # fmt: skip
    config = settings(checkpoint_every=1000)
    with pytest.raises(KeyboardInterrupt):
        distill(config, **options, report=Stop())
    (kept,) = (tmp_path / "scratch").rglob("*.safetensors")
    assert kept.stem == "step-00000025"
    assert not (tmp_path / "consistency").exists()
    distill(config, **options)
    assert sha256_tree(tmp_path / "consistency") == sha256_tree(place / "models/consistency")


def test_another_start_gives_another_model_with_the_whole_history(place: Path) -> None:
    assert weights(place / "models/further/1") != weights(place / "models/consistency/1")
    assert weights(place / "models/consistency/1") != weights(place / "models/teacher")
    history = read_json(place / "models/further/1/ado.json")["history"]
    assert [(done["task"], done.get("method")) for done in history] == [
        ("train", None), ("distill", "consistency"), ("distill", "consistency"),
    ]  # fmt: skip


def test_students_share_their_weights_and_say_where_they_step(place: Path) -> None:
    one, two, three = (read_json(place / f"models/consistency/{n}/ado.json")["sampler"] for n in (1, 2, 3))
    assert weights(place / "models/consistency/1") == weights(place / "models/consistency/3")
    start = one["times"][0]
    alpha, sigma = Cosine().alpha_sigma(start)
    assert sigma / alpha == pytest.approx(80, rel=0.06)  # the nearest timestep
    assert one["times"] == [start, 0.0] and two["times"][::2] == [start, 0.0]
    assert set(two["times"]) < set(three["times"])
    for found in (one, two, three):
        assert found["solver"] == "consistency" and len(found["times"]) == found["steps"] + 1
        assert found["diffusers"]["timesteps"] == [round(1000 * t) - 1 for t in found["times"][:-1]]


def test_the_point_in_between_is_the_best_on_the_selection_part(place: Path) -> None:
    """KID of each candidate once more, by hand."""
    record = read_json(place / "models/consistency/2/ado.json")["sampler"]
    tried = {float(time): value for time, value in record["chosen_on"]["kid_by_time"].items()}
    assert len(tried) == 3 and record["times"][1] == min(tried, key=lambda time: tried[time])
    data = open_dataset(place / "data")
    train_part, selection = data.split("train"), data.split("selection")
    scale = standardisation(random_features(train_part.batch(np.arange(len(train_part)))))
    real = standardise(random_features(selection.batch(np.arange(len(selection)))), *scale)
    sampler = Sampler(read_model(place / "models/consistency/2"), 64)
    start = draw(0, "consistency/renoise", 64, selection)
    for time, value in tried.items():
        images = np.clip(sampler(start, "consistency", np.array([record["times"][0], time, 0.0])), -1, 1)
        assert kid(standardise(random_features(images), *scale), real) == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_variants_and_packages_step_as_the_record_says(place: Path) -> None:
    variants = {variant.name: variant for variant in student_variants(place / "models/consistency")}
    assert list(variants) == ["consistency-3", "consistency-2", "consistency-1"]
    for steps in (1, 2, 3):
        variant = variants[f"consistency-{steps}"]
        times = read_json(place / f"models/consistency/{steps}/ado.json")["sampler"]["times"]
        assert (variant.solver, variant.method, variant.nfe, variant.times.tolist()) == (
            "consistency", "consistency", steps, times,
        )  # fmt: skip
        package = Workspace(place).package(variant.name)
        assert (package.method, list(package.times)) == ("consistency", times)


def test_families_of_one_name_are_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match="two families of one name"):
        all_variants(read_model(place / "models/teacher"), (place / "models/often", place / "often"), place)


@pytest.mark.parametrize(
    "sampler", [{"solver": "euler"}, {"solver": "ddim", "times": [1, 0]}, {"times": ["a", 1, 0]}, [], {"solver": {}}]
)
def test_a_record_of_a_sampler_that_cannot_be_is_refused(place: Path, tmp_path: Path, sampler: Any) -> None:
    shutil.copytree(place / "models/consistency/2", tmp_path / "family/2")
    path = tmp_path / "family/2/ado.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sampler": sampler}))
    with pytest.raises(ArtifactError, match=r"ado\.json: the sampler is"):
        student_variants(tmp_path / "family")


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_a_model_without_the_boundary_condition_is_refused(place: Path, tmp_path: Path, kind: str) -> None:
    stored = read_model(place / "models/teacher")
    write_model(tmp_path / "teacher", stored.unet, {**stored.scheduler_config, "prediction_type": kind}, {})
    with pytest.raises(ConfigError, match=f"predicts {kind}.*allowed: v_prediction"):
        distill(
            settings(), teacher=tmp_path / "teacher", dataset=place / "data", out=tmp_path / "x",
            scratch=tmp_path / "s", seed=0,
        )  # fmt: skip


def test_the_method_chooses_the_keys() -> None:
    both = DistillConfig | ConsistencyConfig
    assert isinstance(parse(both, {"teacher_steps": 16}, "distill.progressive"), DistillConfig)
    assert isinstance(parse(both, {"method": "progressive"}, "distill.progressive"), DistillConfig)
    with pytest.raises(ConfigError, match=r"distill\.x\.method: 'other' is not allowed; allowed: progressive, consis"):
        parse(both, {"method": "other"}, "distill.x")
    with pytest.raises(ConfigError, match=r"distill\.consistency\.teacher_steps: unknown key; allowed here: .*level_"):
        parse(both, {"method": "consistency", "teacher_steps": 16}, "distill.consistency")
    with pytest.raises(ConfigError, match=r"distill\.x\.method: \[\] is not allowed"):
        parse(both, {"method": []}, "distill.x")


def test_the_preset_is_the_default_one_and_a_section_more() -> None:
    root = Path(__file__).resolve().parent.parent
    default, preset = (read_params(root / name) for name in ("params.yaml", "params.consistency.yaml"))
    added = preset["distill"].pop("consistency")
    assert preset == default
    assert isinstance(parse(DistillConfig | ConsistencyConfig, added, "distill.consistency"), ConsistencyConfig)


def test_noise_on_the_way_is_of_the_draw() -> None:
    part: Any = type("Part", (), {"shape": (2, 2, 1), "num_classes": 0})()
    report, selection = (draw(0, purpose, 4, part) for purpose in ("report", "selection"))
    assert report.seed != selection.seed != draw(1, "selection", 4, part).seed
    assert report.first(2).begins(report) and not selection.first(2).begins(report)
    assert not mx.array_equal(rng.key(report.seed, "solver", 0), rng.key(selection.seed, "solver", 0))
