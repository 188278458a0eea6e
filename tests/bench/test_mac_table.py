"""bench/mac_table.py: every contributed report is read, and the table in the documents is that of the reports."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ado_tasks.errors import ArtifactError

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import mac_table


def gain(median: float) -> dict[str, Any]:
    return {"median": median, "quartiles": [median - 0.1, median + 0.1]}


def report_of(chip: str = "Apple M2 Pro", device: str = "Apple M2 Pro") -> dict[str, Any]:
    forms = {
        "mlx compiled": {"ms": {}, "images_per_s": gain(1234.5), "mlx_compiled_is_quicker": gain(1.0)},
        "pytorch eager": {"ms": {}, "images_per_s": gain(600.0), "mlx_compiled_is_quicker": gain(2.0)},
        "pytorch compiled": {"ms": {}, "images_per_s": gain(1500.0), "mlx_compiled_is_quicker": gain(0.8)},
    }
    chain = [
        {"name": name, "quicker_than_teacher_in": {"mlx compiled": gain(times)}}
        for name, times in (("teacher-50", 1.0), ("progressive-1", 44.0), ("progressive-2", 23.0))
    ]
    part = {"batch": 64, "forms": forms}
    return {
        "kind": "bench-mac", "format": 1, "precision": "float32", "versions": {}, "settings": {"steps": 50},
        "machine": {"chip": chip, "device": device, "memory_gib": 16, "cores": 10, "os": "Darwin"},
        "networks": {"shapes32": {"training": part, "sampling": {**part, "batch": 4}, "chain": chain}},
    }  # fmt: skip


def write(path: Path, report: dict[str, Any]) -> Path:
    path.write_text(json.dumps(report))
    return path


def test_every_report_that_is_kept_is_read_and_the_page_shows_them() -> None:
    reports = mac_table.all_reports()
    page = mac_table.PAGE.read_text()
    assert mac_table.with_table(page, reports) == page, "run: python bench/mac_table.py --write"


def test_a_row_sets_mlx_beside_the_quickest_form_of_pytorch_and_names_the_quickest_variant() -> None:
    row = mac_table.table([report_of()]).splitlines()[-1]
    assert row == (
        "| Apple M2 Pro, 16 GiB, Darwin | shapes32 | 64 / 4 | 1234 | 0.8× [0.7, 0.9] (compiled) "
        "| 1234 | 0.8× [0.7, 0.9] (compiled) | progressive-1: 44× [43.9, 44.1] |"
    )


def test_what_was_skipped_or_differs_leaves_a_dash() -> None:
    report = report_of()
    network = report["networks"]["shapes32"]
    network["training"] = {"batch": 8, "forms": {form: {"skipped": "why"} for form in network["training"]["forms"]}}
    network["chain"] = []
    row = mac_table.table([report]).splitlines()[-1]
    assert row.startswith("| Apple M2 Pro, 16 GiB, Darwin | shapes32 | 8 / 4 | – | – | 1234 |") and row.endswith(
        "| – |"
    )
    assert "recorded" in mac_table.table([])


def test_a_report_is_named_after_what_computed() -> None:
    assert mac_table.file_name(report_of()) == "mac_apple-m2-pro.json"
    assert mac_table.file_name(report_of("Intel(R) Xeon(R)", "NVIDIA H200")) == "mac_nvidia-h200.json"
    assert mac_table.file_name(report_of("Intel(R) Xeon(R)", "cpu")) == "mac_intel-r-xeon-r.json"


def test_a_report_is_added_once_under_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    folder.mkdir()
    kept = mac_table.add(write(tmp_path / "bench-mac.json", report_of()), folder)
    assert kept == folder / "mac_apple-m2-pro.json"
    assert mac_table.add(tmp_path / "bench-mac.json", folder) == kept
    with pytest.raises(ArtifactError, match="there already"):
        mac_table.add(
            write(tmp_path / "other.json", report_of("Apple M2 Pro") | {"settings": {"steps": 50, "rounds": 9}}), folder
        )
    write(folder / "mac_apple-m2-pro-on-battery.json", report_of())
    assert len(mac_table.all_reports(folder)) == 2
    write(folder / "mac_apple-m3.json", report_of())
    with pytest.raises(ArtifactError, match=r"mac_apple-m3.json: is of Apple M2 Pro; allowed: mac_apple-m2-pro.json"):
        mac_table.all_reports(folder)


def damaged(**changes: Any) -> dict[str, Any]:
    return {**report_of(), **changes}


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (damaged(kind="bench-gpu"), "'bench-gpu', format 1; allowed: 'bench-mac', format 1"),
        (damaged(format=2), "format 2; allowed"),
        (damaged(machine={"chip": "Apple M1"}), "machine has no device, memory_gib, cores, os"),
        (damaged(networks={"digits": {"training": {}}}), "networks.digits has no sampling, chain"),
        (damaged(settings={"steps": 50, "out": "/Users/ada/report.json"}), "holds a path"),
        (damaged(settings={"steps": 20}), "settings.steps is 20; allowed: 50"),
        (damaged(settings=[]), "not what bench/mac.py writes"),
        (damaged(networks=[]), "not what bench/mac.py writes"),
        (damaged(networks={"digits": {"training": None, "sampling": {}, "chain": []}}), "not what bench/mac.py writes"),
        (report_of(device="A|B"), "chip 'A|B'; allowed: one line"),
        (report_of(device="\N{CJK UNIFIED IDEOGRAPH-82AF}"), "allowed: one line with a letter a-z or a digit"),
    ],
)
def test_what_is_no_whole_report_is_refused_with_the_reason(tmp_path: Path, report: Any, said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        mac_table.read_report(write(tmp_path / "mac_x.json", report))


@pytest.mark.parametrize("chain", [["x"], [{"name": "student-1"}]])
def test_a_report_that_cannot_be_tabled_is_not_kept(tmp_path: Path, chain: Any) -> None:
    report = report_of()
    report["networks"]["shapes32"]["chain"] = chain
    with pytest.raises(ArtifactError, match=r"not what bench/mac\.py writes"):
        mac_table.add(write(tmp_path / "bench-mac.json", report), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bench-mac.json"]


def test_a_report_that_is_kept_already_may_be_added_where_it_lies(tmp_path: Path) -> None:
    kept = write(tmp_path / "mac_apple-m2-pro.json", report_of())
    assert mac_table.add(kept, tmp_path) == kept


def test_a_part_without_its_forms_is_refused(tmp_path: Path) -> None:
    report = copy.deepcopy(report_of())
    del report["networks"]["shapes32"]["sampling"]["forms"]
    with pytest.raises(ArtifactError, match=r"networks.shapes32.sampling has no forms"):
        mac_table.read_report(write(tmp_path / "mac_x.json", report))


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(ArtifactError, match="stands between them"):
        mac_table.with_table("nothing", [])
