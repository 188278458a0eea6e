"""bench/student_selection.py: figures are those taken by hand on the selection part, and the report part is left."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.datasets.shape_attributes import Tolerance, agree, read_shapes
from ado_tasks.datasets.shards import Dataset, open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.features import FeaturesConfig, features
from ado_tasks.interop.diffusers_folder import read_model, write_model
from ado_tasks.metrics.frechet import excess
from ado_tasks.metrics.noninferiority import kid_difference
from ado_tasks.models.classifier import load_features, load_judge
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.sampling import Sampler, draw
from ado_tasks.storage import write_json

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import student_selection

N, AGREE_N = 60, 40
OPTIONS = ["--n", str(N), "--agree-n", str(AGREE_N), "--draws", "50", "--shards", "1", "--threads", "1"]
TRAINED = {"task": "train", "config": {"steps": 10, "batch_size": 5}}  # 150 evaluations
STAGES = {"teacher_steps": 8, "student_steps": [50, 2], "stage_steps": 3, "batch_size": 2}


def model(root: Path, name: str, weights: int, channels: int, history: list[dict[str, Any]]) -> None:
    unet = UNet2D(
        UNet2DConfig.from_dict(
            {
                "sample_size": 8, "in_channels": channels, "out_channels": channels, "block_out_channels": [8],
                "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
                "layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 18,
            }
        )
    )  # fmt: skip
    initialise(unet, rng.key(weights, "weights"))
    write_model(root / "models" / name, unet, Cosine().to_diffusers("v_prediction"), {"history": history})


def taught(steps: int, seed: int) -> list[dict[str, Any]]:
    return [TRAINED, {"task": "distill", "method": "progressive", "steps": steps, "config": STAGES, "seed": seed}]


def measured_by(root: Path, name: str) -> None:
    """Networks that measure quality, and a margin."""
    (root / "params.yaml").write_text(f"dataset: {name}\n")
    short = FeaturesConfig(dimensions=8, filters=4, steps=3, batch=8)
    features(short, dataset=root / "data" / name, out=root / "features" / name, seed=0)
    sha256 = load_features(root / "features" / name).sha256
    write_json(root / "anchor" / "anchor.json", {"margin": 0.5, "features_sha256": sha256})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Family `copy` is the teacher itself at 50 steps and at 2, family `other` another network at 2."""
    root = tmp_path_factory.mktemp("shapes")
    config = PrepareConfig(source="shapes", count=360, height=8, width=8, train=0.5, selection=0.25, report=0.25)
    prepare(config, out=root / "data" / "shapes8", seed=0)
    measured_by(root, "shapes8")
    model(root, "teacher", 0, 3, [TRAINED])
    model(root, "copy/50", 0, 3, taught(50, 7))
    model(root, "copy/2", 0, 3, taught(2, 8))
    model(root, "other/2", 1, 3, [])
    return root


@pytest.fixture(scope="module")
def report(workspace: Path) -> dict[str, Any]:
    """Of a run that may not open the report part."""
    out, split = workspace / "made" / "report.json", Dataset.split

    def without_report(self: Dataset, name: str) -> Any:
        assert name != "report"
        return split(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "split", without_report)
        families = ["--family", "copy", "other", "--out", str(out)]
        assert student_selection.main([str(workspace), *families, *OPTIONS]) == 0
    return json.loads(out.read_text())


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["rows"]}


def test_the_teacher_under_a_students_name_has_the_teachers_figures(report: dict[str, Any]) -> None:
    rows = rows_of(report)
    assert list(rows) == ["teacher-50", "teacher-dpmpp_2m-50", "copy-50", "copy-2", "other-2"]
    for name in ("teacher-50", "copy-50"):
        assert rows[name]["kid_minus_teacher"] == {"value": 0.0, "ci": [0.0, 0.0], "non_inferior": True}
        assert rows[name]["agreement"] == 1
    for name in ("fd", "fd_over_train", "paired_distance", "class_accuracy"):
        assert rows["copy-50"][name] == rows["teacher-50"][name]
    assert rows["teacher-dpmpp_2m-50"]["paired_distance"] < 0.1 * rows["teacher-50"]["paired_distance"]
    assert (report["part"], report["margin"], report["n"], report["agree_n"]) == ("selection", 0.5, N, AGREE_N)


def test_figures_are_those_taken_by_hand(workspace: Path, report: dict[str, Any]) -> None:
    row, other = rows_of(report)["copy-2"], rows_of(report)["other-2"]
    data, place = open_dataset(workspace / "data" / "shapes8"), workspace / "features" / "shapes8"
    part, extractor = data.split("selection"), load_features(place)
    start = draw(0, "student-selection", N, part)
    teacher, network = (
        Sampler(read_model(workspace / "models" / name), N, shards=1) for name in ("teacher", "other/2")
    )
    fifty, two = (teacher(start, "ddim", grids.uniform_time(steps)) for steps in (50, 2))
    fine = teacher(start, "dpmpp_2m", grids.uniform_log_snr(64, teacher.schedule))
    others = network(start, "ddim", grids.uniform_time(2))

    assert row["paired_distance"] == pytest.approx(np.mean((two - fine) ** 2), rel=1e-5)
    readings = [read_shapes(images[:AGREE_N]) for images in (two, others, fifty)]
    shares = [np.mean(agree(each, readings[2], Tolerance())) for each in readings[:2]]
    assert [row["agreement"], other["agreement"]] == pytest.approx(shares)
    assert 0 < shares[1] < 1
    right = load_judge(place).predict(others) == start.labels
    assert other["class_accuracy"] == pytest.approx(np.mean(right))

    real, train = (extractor.features(each.batch(np.arange(len(each)))) for each in (part, data.split("train")))
    found, base = extractor.features(two), extractor.features(fifty)
    difference = kid_difference(*map(extractor.whitened, (found, base, real)), groups=part.groups)
    assert row["kid_minus_teacher"]["ci"] == pytest.approx([difference.low, difference.high])
    halves = np.random.default_rng(rng.derive(0, "student-selection", "halves"))
    beyond = excess(found, train, real, draws=50, rng=halves, groups=part.groups)
    assert row["fd"] == pytest.approx(beyond.model)
    assert row["fd_over_train"]["ratio_to_floor"] == pytest.approx(beyond.ratio)


def test_seeds_and_costs_are_told_as_far_as_they_are_known(report: dict[str, Any]) -> None:
    rows = rows_of(report)
    first = 3 * 2 * (0 + 3)  # 8 // 50: no step of the teacher
    second = 3 * 2 * (25 + 3)
    assert [rows[name]["seed"] for name in ("copy-50", "copy-2", "other-2", "teacher-50")] == [7, 8, None, None]
    assert rows["copy-50"]["cost"] == pytest.approx(first / 150)
    assert rows["copy-2"]["cost"] == pytest.approx((first + second) / 150)
    assert rows["other-2"]["cost"] is None


def row(family: str, nfe: int, upper: float, agreement: float | None = None) -> dict[str, Any]:
    shown = {} if agreement is None else {"agreement": agreement}
    return {"family": family, "nfe": nfe, "kid_minus_teacher": {"ci": [0.0, upper]}, **shown}


def test_families_are_compared_at_the_evaluations_that_all_have() -> None:
    rows = [row("teacher", 50, 0, 1.0), row("a", 4, 1, 0.9), row("a", 2, 2, 0.5), row("b", 2, 3, 0.6)]
    found = student_selection.choice(rows)
    assert (found["family"], found["nfe"], found["sums"]) == ("b", [2], {"a": 0.5, "b": 0.6})
    assert "largest sum of agreement in place and size at NFE 2" in student_selection.verdict(found)
    found = student_selection.choice([*rows, row("b", 4, 1, 0.7)])
    assert (found["family"], found["nfe"]) == ("a", [4, 2])
    found = student_selection.choice([*rows, row("b", 4, 1, 0.7)], [2])
    assert (found["family"], found["nfe"]) == ("b", [2])
    found = student_selection.choice([row("a", 2, 0.3), row("b", 2, 0.2)])
    assert (found["family"], found["by"]) == ("b", "upper ends of KID − teacher")
    assert "least sum of upper ends" in student_selection.verdict(found)
    found = student_selection.choice([row("a", 2, 0.3), row("b", 1, 0.2)])
    assert found["family"] is None
    assert student_selection.verdict(found).startswith("no family is named")


def test_other_images_than_drawn_shapes_are_compared_by_kid(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = PrepareConfig(name="digits", source="digits", train=200, selection=100, report=100)
    prepare(config, out=tmp_path / "data" / "digits", seed=0)
    measured_by(tmp_path, "digits")
    model(tmp_path, "teacher", 0, 1, [TRAINED])
    for number, family in enumerate(("a", "b")):
        for steps in (2, 1):
            model(tmp_path, f"{family}/{steps}", number, 1, [])
    out = tmp_path / "report.json"
    families = ["--family", "a", "b", "--by", "1", "--out", str(out)]
    assert student_selection.main([str(tmp_path), *families, *OPTIONS]) == 0
    report = json.loads(out.read_text())
    assert report["agree_n"] is None
    assert not any("agreement" in row for row in report["rows"])
    sums = {row["family"]: row["kid_minus_teacher"]["ci"][1] for row in report["rows"][2:] if row["nfe"] == 1}
    assert (report["choice"]["sums"], report["choice"]["nfe"]) == (sums, [1])
    assert f"{min(sums, key=lambda name: sums[name])}: least sum of upper ends" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--family", "none"], "models/none: no student in it"),
        (["--family", "copy", "copy"], "--family: copy copy: one is given twice"),
        (["--family", "copy", "--n", "44"], "--n: 44 is not allowed; allowed: 45 and more, half of the selection part"),
        (["--family", "copy", "--draws", "49"], "--draws: 49 is not allowed; allowed: 50 and more"),
        (["--family", "copy", "--radius", "0"], "--place, --radius"),
        (["--family", "copy", "other", "--by", "50"], "--by: 50: family other has none; allowed: 2"),
    ],
)
def test_what_cannot_run_is_named(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], said: str
) -> None:
    out = tmp_path / "report.json"
    assert student_selection.main([str(workspace), *OPTIONS, "--out", str(out), *options]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_in_which_stages_are_missing_is_named(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(tmp_path), "--family", "copy", "--out", str(tmp_path / "report.json")]
    assert student_selection.main(arguments) == 2
    assert f"{tmp_path / 'params.yaml'}: cannot be read" in capsys.readouterr().err
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    write_json(tmp_path / "anchor" / "anchor.json", {"margin": 0.5, "features_sha256": "others"})
    assert student_selection.main(arguments) == 2
    assert "the margin was frozen with other features" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "anchor")
    assert student_selection.main(arguments) == 2
    assert "anchor.json: cannot be read" in capsys.readouterr().err
