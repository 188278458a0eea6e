"""`bench/walk_evaluations.py`: walks asked less often beside the whole walk."""

import sys
from pathlib import Path

import numpy as np
import pytest

from ado_tasks.datasets.shape_attributes import Tolerance, agree, read_shapes
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion.grids import uniform_time
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.sampling import Sampler, draw
from ado_tasks.storage import read_json
from ado_tasks.train import TrainConfig, train

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import walk_evaluations

MODEL = {
    "block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
    "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walk evaluations")
    data = folder / "data" / "shapes"
    settings = {"count": 600, "height": 16, "width": 16, "train": 300, "selection": 150, "report": 150}
    prepare(PrepareConfig(name="shapes", source="shapes", **settings), out=data, seed=0)
    config = TrainConfig(model=MODEL, steps=2, batch_size=4, warmup_steps=1)
    train(config, dataset=data, out=folder / "models" / "teacher", scratch=folder / "scratch", seed=0)
    (folder / "params.yaml").write_text("dataset: shapes\nprepare: {name: shapes}\n")
    return folder


def test_a_row_for_fewer_questions_and_one_for_fewer_steps(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--steps", "8", "--evaluations", "6", "3", "--n", "5", "--batch", "2"]
    assert walk_evaluations.main([str(place), *few]) == 0
    found = read_json(place / "reports" / "walk-evaluations.json")
    assert [(row["steps"], row["evaluations"]) for row in found["rows"]] == [(8, 6), (6, 6), (8, 3), (3, 3)]
    for row in found["rows"]:
        assert 0 < row["distance_ci"][0] <= row["distance"] <= row["distance_ci"][1]
        assert 0 <= row["agreement_at_half_tolerance"] <= row["agreement"] <= 1
    assert "3" in capsys.readouterr().out


def test_asked_at_each_step_it_is_the_teachers_own_sample(place: Path) -> None:
    start = draw(0, "here", 3, open_dataset(place / "data" / "shapes").split("selection"))
    sampler = Sampler(read_model(place / "models" / "teacher"), 3, 1)
    own = np.clip(sampler(start, "ddim", uniform_time(8)), -1, 1)
    for evaluations in (None, 8):
        found = walk_evaluations.ends(sampler, start, 8, evaluations, 2)
        np.testing.assert_allclose(found, own, atol=2e-5)
    assert np.abs(walk_evaluations.ends(sampler, start, 8, 3, 2) - own).max() > 1e-4


def test_figures_are_of_a_draw_of_their_own_with_labels_of_the_selection_part(place: Path, tmp_path: Path) -> None:
    data, report = open_dataset(place / "data" / "shapes"), tmp_path / "report.json"
    start = draw(3, "walk-evaluations", 20, data.split("selection"))
    other = draw(3, "walk-evaluations", 20, data.split("report"))
    assert not np.array_equal(np.array(start.labels), np.array(other.labels))
    sampler = Sampler(read_model(place / "models" / "teacher"), 20, 1)
    few, whole = (np.clip(sampler(start, "ddim", uniform_time(steps)), -1, 1) for steps in (2, 12))
    options = ["--steps", "12", "--evaluations", "2", "--n", "20", "--seed", "3", "--shards", "1", "--out", str(report)]
    assert walk_evaluations.main([str(place), *options]) == 0
    row = read_json(report)["rows"][1]
    assert row["distance"] == pytest.approx(np.mean((few - whole) ** 2), rel=1e-3)
    one, other = read_shapes(few, 1), read_shapes(whole, 1)
    for name, times in (("agreement", 1.0), ("agreement_at_half_tolerance", 0.5)):
        tolerance = Tolerance(times * Tolerance.place, times * Tolerance.radius)
        assert row[name] == pytest.approx(np.mean(agree(one, other, tolerance)), abs=0.06)  # one of 20 by rounding
    assert row["agreement_at_half_tolerance"] < 1


@pytest.mark.parametrize("options", [["--evaluations", "50"], ["--evaluations", "1"], ["--n", "1"], ["--batch", "0"]])
def test_what_it_cannot_do_is_said(place: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert walk_evaluations.main([str(place), *options]) == 2
    assert "allowed" in capsys.readouterr().err


def test_a_workspace_without_a_teacher_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert walk_evaluations.main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_an_out_that_cannot_be_written_is_named_before_the_work(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk_evaluations, "compared", None)
    (tmp_path / "file").write_text("")
    assert walk_evaluations.main([str(place), "--out", str(tmp_path / "file" / "report.json")]) == 2
    assert f"StorageError: {tmp_path / 'file'}" in capsys.readouterr().err


def test_figures_that_are_no_numbers_and_a_folder_in_the_reports_place_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    monkeypatch.setattr(walk_evaluations.Terminal, "close", lambda _: closed.append(True))
    for figure, named in ((float("nan"), "not finite"), (1.0, "Is a directory")):
        row = {"steps": 5, "evaluations": 3, "distance": figure, "distance_ci": [1, 1]}
        monkeypatch.setattr(walk_evaluations, "compared", lambda *_, row=row: iter([row]))
        assert walk_evaluations.main([str(place), "--out", str(tmp_path)]) == 2
        assert named in capsys.readouterr().err
    assert closed == [True, True]  # no bar is left on a terminal


def test_a_teacher_of_other_images_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels that its table has no row for would be read beside it."""
    (tmp_path / "params.yaml").write_text("dataset: digits\n")
    prepare(PrepareConfig(name="digits", source="digits"), out=tmp_path / "data" / "digits", seed=0)
    (tmp_path / "models").symlink_to(place / "models")
    assert walk_evaluations.main([str(tmp_path), "--n", "2"]) == 2
    assert "models/teacher/unet/config.json" in capsys.readouterr().err
