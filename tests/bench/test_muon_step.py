"""`bench/muon_step.py`: both optimisers' steps are measured, on the network of a params file."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from ado_tasks.backend import mlx_utils, mx
from ado_tasks.storage import read_json

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import muon_step

MODEL = {
    "block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False,
}  # fmt: skip


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"prepare": {"height": 8}, "train": {"model": MODEL}}), encoding="utf-8")
    return path


def test_the_report_has_both_and_their_ratio(params: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "report.json"
    assert muon_step.main([str(params), "--batch", "2", "--rounds", "3", "--steps", "1", "--out", str(out)]) == 0
    found = read_json(out)
    assert (found["batch"], found["rounds"], found["steps"]) == (2, 3, 1)
    for figures in (*found["ms"].values(), found["muon_over_adam"]):
        low, high = figures["quartiles"]
        assert 0 < low <= figures["median"] <= high
    assert "muon over adam" in capsys.readouterr().out


def test_each_is_the_optimiser_it_is_called(params: Path) -> None:
    """Both start alike; a matrix inside the network moves otherwise with Muon, and its steps are of Adam's size."""
    unet = muon_step.network(yaml.safe_load(params.read_text(encoding="utf-8")))
    before = dict(mlx_utils.tree_flatten(unet.parameters()))
    name = "mid_block.resnets.0.conv1.weight"
    moved = {}
    for optimiser in muon_step.OPTIMISERS:
        step = muon_step.stage_step(unet, 2, optimiser, 1)
        step()
        kept = next(cell.cell_contents for cell in step.__closure__ or () if hasattr(cell.cell_contents, "parameters"))
        moved[optimiser] = np.array(dict(mlx_utils.tree_flatten(kept.parameters()))[name] - before[name])
    assert np.abs(moved["adam"] - moved["muon"]).max() > 1e-6
    sizes = [float(mx.sqrt(mx.mean(mx.square(mx.array(each))))) for each in moved.values()]
    assert max(sizes) < 10 * min(sizes)


@pytest.mark.parametrize("change", [{"prepare": {}}, {"train": {}}, {"train": {"model": {"norm_num_groups": 3}}}])
def test_what_names_no_network_is_refused(params: Path, change: dict, capsys: pytest.CaptureFixture[str]) -> None:
    given = yaml.safe_load(params.read_text(encoding="utf-8")) | change
    params.write_text(yaml.safe_dump(given), encoding="utf-8")
    assert muon_step.main([str(params)]) == 2
    assert "muon-step: " in capsys.readouterr().err


def test_counts_below_one_are_refused(params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert muon_step.main([str(params), "--rounds", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
