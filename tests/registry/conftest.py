"""A tiny workspace: real data and feature network, untrained models, reports with figures that pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ado_tasks.backend import mx
from ado_tasks.config import parse
from ado_tasks.features import FeaturesConfig, features
from ado_tasks.interop.diffusers_folder import write_model
from ado_tasks.models.classifier import load_features
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.prepare import PrepareConfig, prepare

MODEL = "ado"
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction",
    "clip_sample": False, "timestep_spacing": "trailing",
}  # fmt: skip
UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 10,
}  # fmt: skip
HISTORY = [
    {"task": "train", "seed": 0},
    {"task": "distill", "method": "progressive", "steps": 2, "config": {"lr": 0.1}},
]


def write_student(folder: Path, seed: int) -> None:
    """A model of its own for each seed."""
    unet = UNet2D(UNet2DConfig.from_dict(UNET))
    initialise(unet, mx.random.key(seed))
    write_model(folder, unet, SCHEDULER, {"history": HISTORY})


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    settings = {"name": "digits", "source": "digits", "train": 0.5, "selection": 0.25, "report": 0.25}
    prepare(parse(PrepareConfig, settings, "prepare"), out=root / "data/digits", seed=0)
    small = {"dimensions": 8, "filters": 4, "steps": 30, "batch": 16}
    features(
        parse(FeaturesConfig, small, "features"), dataset=root / "data/digits", out=root / "features/digits", seed=0
    )
    write_student(root / "models/teacher", 0)
    (root / "params.yaml").write_text("seed: 0\ndataset: digits\n")
    (root / "dvc.lock").write_text("stages:\n  train:\n    outs:\n    - {path: models/teacher, md5: abc.dir}\n")
    _write_reports(root)
    return root


@pytest.fixture
def new_workspace(made: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Makes workspaces whose student is the one of a seed."""

    def make(seed: int) -> Path:
        root = tmp_path / f"workspace-{seed}"
        shutil.copytree(made, root)
        write_student(root / "models/progressive/2", seed)
        return root

    return make


def _write_reports(root: Path) -> None:
    names = ["teacher-50", "progressive-2"]
    difference = {
        "value": 0.0,
        "ci": [-0.001, 0.001],
        "margin": 1e6,
        "non_inferior": True,
    }  # untrained models differ much
    quality = {
        "nfe": 2, "kid": 0.1, "kid_minus_teacher": difference, "recall": 0.8, "class_accuracy": 0.9,
        "memorisation": {"low": 1.0}, "fd_over_train": {"ratio_to_floor": 0.2},
    }  # fmt: skip
    cost = {
        "peak_memory_mb": 20.0, "latency_ms_per_image": {"median": 1.0},
        "speedup_vs_teacher": {"median": 10.0, "min": 9.0, "max": 11.0},
    }  # fmt: skip
    sha256 = load_features(root / "features/digits").sha256
    evaluate: dict[str, Any] = {
        "variants": [{"name": name, **quality} for name in names], "chosen": "progressive-2",
        "reference": {"features_sha256": sha256, "n_generated": 100, "seeds": {"report": 0, "draw": "report"}},
        "config": {"batch_size": 50, "shards": 1},
    }  # fmt: skip
    measure = {"variants": [{"name": name, **cost} for name in names], "hardware": {"id": "here"}}
    (root / "reports").mkdir()
    (root / "reports/evaluate.json").write_text(json.dumps(evaluate))
    (root / "reports/measure.json").write_text(json.dumps(measure))
    (root / "reports/samples.png").write_bytes(b"picture")
