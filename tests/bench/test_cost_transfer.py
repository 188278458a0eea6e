"""bench/cost_transfer.py: a machine of the formula is ordered without a fault, and the report is what is printed."""

import json
import sys
from pathlib import Path

import pytest

from ado_tasks.fit.calibration import drawn_configs, works
from ado_tasks.fit.cost import CostModel
from ado_tasks.fit.work import KINDS
from ado_tasks.hardware.capability import Capability

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import cost_transfer
from cost_transfer import Machine

ROOT = Path(__file__).parents[2]
HERE = Capability("here", "cpu", 16, True, {"float32": 80.0}, 10.0, id="a" * 16)
THERE = Capability("there", "metal", 16, True, {"float32": 4000.0, "bfloat16": 8000.0}, 100.0, id="b" * 16)


def test_a_machine_of_the_formula_is_ordered_without_a_fault() -> None:
    """In its own precision; and half of every time is half of every ratio, with the same order."""
    model = CostModel("float32", dict.fromkeys(KINDS, 2.0), 5.0, 9, 0, 0, HERE.id)
    known = works(drawn_configs(0, "transfer", 12, 8), 2)
    fit = Machine(HERE, model, known, [1.0] * 12, "float32", [])
    truth = CostModel("bfloat16", model.factors, model.layer_us, 9, 0, 0, THERE.id)
    measured = [2 * 1e3 * truth.seconds(work, THERE) for work in known]
    row = cost_transfer.judged(fit, THERE, "bfloat16", known, measured, measured[::-1])
    assert row["spearman"]["value"] == 1.0 and row["predicted_over_measured"] == pytest.approx([0.5] * 3)
    assert row["spearman_without_a_model"].keys() == {"operations", "layers", "measured_on_the_first"}
    assert row["spearman_without_a_model"]["measured_on_the_first"] < 0.9 and 0 < row["share_of_layers"] < 1


def test_the_kept_report_is_of_the_kept_measurements(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["x", "--out", str(tmp_path / "r.json"), "--params", str(ROOT / "params.search32.yaml")]
    )
    assert cost_transfer.main() == 0
    kept = json.loads((ROOT / "bench/reports/cost_transfer.json").read_text())
    for name, row in json.loads((tmp_path / "r.json").read_text()).items():
        assert row["spearman"]["value"] == pytest.approx(kept[name]["spearman"]["value"], abs=1e-9)
    assert "NVIDIA H200, float32, n = 11" in capsys.readouterr().out
