"""bench/shapes_attributes.py: verdicts are of pairs of the same noise, and a tiny workspace goes through it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.datasets.shape_attributes import Reading, Tolerance
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.features import FeaturesConfig, features
from ado_tasks.interop.diffusers_folder import write_model
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.prepare import PrepareConfig, prepare

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import shapes_attributes

UNET = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 18,
}  # fmt: skip
N = 1000


def row(name: str, wrong: int, apart: int, student: bool = False, judged_wrong: int = 0) -> shapes_attributes.Row:
    """Pictures of class 0 asked for; the last `wrong` show another colour, the first `apart` lie 2 pixels off."""
    rows, zeros = np.arange(N), np.zeros(N)
    x = 10.0 + 2 * (rows < apart)
    reading = Reading(zeros.astype(int), (rows >= N - wrong).astype(int), zeros + 5, x, zeros + 10, zeros, zeros)
    return shapes_attributes.Row(name, 1, reading, (rows >= N - judged_wrong).astype(int), student)


def verdicts(student: shapes_attributes.Row, *, by_judge: bool = False) -> dict:
    teacher, fine, finer = row("teacher", 10, 0), row("fine", 10, 50), row("finer", 10, 10)
    rows = [teacher, fine, student]
    labels = np.zeros(N, int)
    shapes_attributes.judge_rows(rows, labels, Tolerance(), (teacher, fine), (teacher, finer), by_judge)
    return student.figures


def test_bars_are_two_points_under_the_teacher_and_under_its_own_agreement():
    found = verdicts(row("student", 30, 70, student=True))
    assert found["condition"] == pytest.approx(0.97)
    assert found["condition_minus_teacher"]["value"] == pytest.approx(-0.02)
    assert found["condition_minus_teacher"]["met"]
    assert not found["condition_minus_teacher"]["certain"]
    assert found["agreement"] == pytest.approx(0.93)
    assert found["agreement_minus_own"]["value"] == pytest.approx(-0.02)  # its own agree in 95 %
    assert found["agreement_minus_own"]["met"]
    assert found["agreement_minus_finest"]["value"] == pytest.approx(-0.06)
    assert not found["agreement_minus_finest"]["met"]
    found = verdicts(row("student", 31, 71, student=True))
    assert not found["condition_minus_teacher"]["met"]
    assert not found["agreement_minus_own"]["met"]
    found = verdicts(row("student", 10, 50, student=True))
    assert found["condition_minus_teacher"]["certain"]
    assert found["agreement_minus_own"]["certain"]


def test_intervals_are_of_differences_at_the_same_noise():
    """40 others wrong: the difference varies only where the two differ, not as two independent shares do."""
    found = verdicts(row("student", 20, 50, student=True))["condition_minus_teacher"]
    assert found["value"] == pytest.approx(-0.01)
    spread = np.sqrt(0.01 * 0.99 / (N - 1))
    assert found["ci"] == pytest.approx([-0.01 - 1.9623 * spread, -0.01 + 1.9623 * spread], abs=1e-5)
    same = verdicts(row("student", 10, 50, student=True))["condition_minus_teacher"]
    assert same["ci"] == [0.0, 0.0]


def test_the_judge_decides_where_it_reads_better():
    student = row("student", 0, 0, student=True, judged_wrong=100)
    assert verdicts(student)["condition_minus_teacher"]["value"] == pytest.approx(0.01)
    assert verdicts(student, by_judge=True)["condition_minus_teacher"]["value"] == pytest.approx(-0.1)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    (root / "params.yaml").write_text("dataset: shapes8\n")
    config = PrepareConfig(source="shapes", count=360, height=8, width=8, train=0.5, selection=0.25, report=0.25)
    prepare(config, out=root / "data" / "shapes8", seed=0)
    short = FeaturesConfig(dimensions=8, filters=4, steps=3, batch=8)
    features(short, dataset=root / "data" / "shapes8", out=root / "features" / "shapes8", seed=0)
    for number, name in enumerate(("teacher", "progressive/2", "progressive/1")):
        mx.random.seed(0)
        unet = UNet2D(UNet2DConfig.from_dict(UNET))
        initialise(unet, rng.key(number, "weights"))
        write_model(root / "models" / name, unet, Cosine().to_diffusers("v_prediction"), {})
    return root


def test_a_workspace_goes_through(workspace, tmp_path, capsys):
    out = tmp_path / "r" / "report.json"
    options = ["--n", "20", "--fine-steps", "4", "--shards", "1", "--threads", "1", "--out", str(out)]
    status = shapes_attributes.main([str(workspace), *options])
    report = json.loads(out.read_text())
    assert [one["name"] for one in report["rows"]] == [
        "teacher ddim@50", "teacher dpmpp_2m@50", "teacher ddim@4", "teacher dpmpp_2m@4", "progressive-2",
        "progressive-1",
    ]  # fmt: skip
    students = [one for one in report["rows"] if one["student"]]
    met = [one[name]["met"] for one in students for name in ("condition_minus_teacher", "agreement_minus_own")]
    assert status == (0 if all(met) else 1)
    assert report["rows"][0]["agreement"] == 1
    assert report["readers"]["real"]["both"] > 0.9  # 8x8 pixels
    assert report["condition_read_by"] == "fitted drawings"
    assert "progressive-1" in capsys.readouterr().out


def test_other_data_is_refused_by_name(workspace, tmp_path, capsys):
    (tmp_path / "params.yaml").write_text("dataset: digits\n")
    prepare(PrepareConfig(), out=tmp_path / "data" / "digits", seed=0)
    assert shapes_attributes.main([str(tmp_path)]) == 2
    assert "not drawn shapes: index.parquet lacks shape, colour, size, cx, cy" in capsys.readouterr().err
    assert shapes_attributes.main([str(workspace), "--place", "0"]) == 2
    assert "--place, --radius" in capsys.readouterr().err
