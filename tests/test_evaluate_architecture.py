"""`evaluate` with and without what a search chose: what was there before keeps its figures, what is added is said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.config import parse
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.evaluate import EvaluateConfig, evaluate
from ado_tasks.features import FeaturesConfig, features
from ado_tasks.interop.diffusers_folder import write_model
from ado_tasks.models.classifier import load_features
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.storage import read_json, save_arrays, write_json

TINY = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 10,
    "add_attention": False,
}  # fmt: skip
SETTINGS = {"n_generated": 100, "n_paired": 30, "draws": 50, "batch_size": 50, "shards": 1, "judge_all": True}


def network(folder: Path, channels: int) -> None:
    unet = UNet2D(UNet2DConfig.from_dict({**TINY, "block_out_channels": [channels]}))
    initialise(unet, rng.key(0, str(channels)))
    write_model(folder, unet, Cosine().to_diffusers("v_prediction"), {"history": []})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks as they are initialised, and the least that they can be judged by."""
    root = tmp_path_factory.mktemp("evaluate")
    sizes = {"train": 200, "selection": 120, "report": 120}
    prepare(parse(PrepareConfig, sizes, "prepare"), out=root / "data", seed=0)
    small = {"dimensions": 8, "filters": 4, "steps": 20, "batch": 16}
    features(parse(FeaturesConfig, small, "features"), dataset=root / "data", out=root / "features", seed=0)
    for name, channels in {"teacher": 8, "progressive/1": 8, "architecture": 4, "same": 8}.items():
        network(root / name, channels)
    extractor, part = load_features(root / "features"), open_dataset(root / "data").split("selection")
    write_json(root / "anchor/anchor.json", {"features_sha256": extractor.sha256, "margin": 0.1})
    found = extractor.whitened(extractor.features(part.batch(np.arange(100))))  # in the place of the teacher's samples
    save_arrays(root / "anchor/teacher.safetensors", {"features": mx.array(found)})
    for name, cost in {"schedules": 7, "its_schedules": 5}.items():
        entry = {"solver": "angle_ab2", "nfe": 3, "times": [1.0, 0.7, 0.4, 0.0], "distance": 0.1}
        write_json(root / name / "angle_ab2-3.json", entry)
        write_json(root / name / "index.json", {"cost": {"reference": cost}})
    return root


def judged(place: Path, out: str, **given: Any) -> dict[str, Any]:
    evaluate(
        parse(EvaluateConfig, SETTINGS, "evaluate"), dataset=place / "data", features=place / "features",
        anchor=place / "anchor", teacher=place / "teacher", students=(place / "progressive",),
        schedules=place / "schedules", out=place / out, seed=0, **given,
    )  # fmt: skip
    return read_json(place / out / "evaluate.json")


def test_what_a_search_chose_is_added_and_nothing_else_moves(place: Path) -> None:
    before = judged(place, "before")
    assert "architecture" not in before and "architecture_calibration" not in before["compute"]
    found = judged(place, "found", architecture=place / "architecture", architecture_schedules=place / "its_schedules")
    added = ["architecture-50", "architecture_calibrated-3"]
    assert [row["name"] for row in found["variants"]][-2:] == added
    assert found["variants"][:-2] == before["variants"]
    kept = [row for row in found["choice"] if row["name"] not in added]
    assert kept == before["choice"] and len(found["choice"]) == len(kept) + 2  # it may be chosen
    assert found["compute"] == {**before["compute"], "architecture_calibration": {"reference": 5}}
    moved = {"variants", "choice", "chosen", "compute", "architecture"}
    assert {key: value for key, value in found.items() if key not in moved} == {
        key: value for key, value in before.items() if key not in moved
    }
    # Its knots are held against usual grids from the same noise, by distances to its own fine solution.
    (row,), (teachers,) = found["architecture"]["calibration"], found["calibration"]
    assert found["architecture"]["is_teacher"] is False
    assert (row["solver"], row["nfe"]) == (teachers["solver"], teachers["nfe"])
    paired = {each["name"]: each["paired_distance"] for each in found["variants"]}
    assert teachers["learned"] == pytest.approx(paired["calibrated-3"], rel=1e-6)
    assert row["learned"] != pytest.approx(paired["architecture_calibrated-3"], rel=1e-2)


def test_a_search_that_left_the_teacher_adds_no_variant_and_says_so(place: Path) -> None:
    found = judged(place, "left", architecture=place / "same", architecture_schedules=place / "its_schedules")
    assert found["architecture"] == {"is_teacher": True}
    assert {row["name"].rpartition("-")[0] for row in found["variants"]} == {"teacher", "progressive", "calibrated"}
    assert found["compute"]["architecture_calibration"] == {"reference": 5}  # it was spent all the same
