"""Energy counters: sums over packages, one that wraps around, none."""

from pathlib import Path

import pytest

from ado_tasks.orchestration.energy import Meter


def write(folder: Path, name: str, microjoules: int) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    (folder / name / "max_energy_range_uj").write_text("9999999\n")


def test_packages_are_summed_and_their_parts_are_not_counted_twice(tmp_path: Path) -> None:
    for name, start in (("intel-rapl:0", 1_000_000), ("intel-rapl:1", 9_500_000), ("intel-rapl:0:0", 0)):
        write(tmp_path, name, start)
    meter = Meter(tmp_path)
    for name, end in (("intel-rapl:0", 3_000_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 7_000_000)):
        write(tmp_path, name, end)
    assert meter.joules() == pytest.approx(2.0 + 1.0)  # the second one wrapped around


def test_where_nothing_is_told_nothing_is_said(tmp_path: Path) -> None:
    assert Meter(tmp_path).joules() is None
    write(tmp_path, "intel-rapl:0", 5)
    meter = Meter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()  # as where only root may read it
    assert meter.joules() is None
