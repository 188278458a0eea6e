"""`ado compare`: its table at every width, and what is said below it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ado_tasks import compare
from ado_tasks.__main__ import main
from ado_tasks.storage import write_json

ROOT = Path(__file__).resolve().parent.parent
MARGIN = 0.02


def entry(name: str, nfe: int, ratio: float | None = None, low: float = 0.95) -> dict[str, Any]:
    return {
        "name": name, "solver": "ipndm+gits", "nfe": nfe, "fd": 26.55, "paired_distance": 0.0469,
        "class_accuracy": 1.0, "paired_ratio_to_ddim": ratio,
        "kid_minus_teacher": {"value": 5.9498, "ci": [5.7417, 6.1579], "non_inferior": False},
        "fd_over_train": {"value": 0.2366, "range": [-0.7159, 0.9737], "ratio_to_floor": 0.1274},
        "memorisation": {"value": 0.9987, "low": low, "high": 1.0389, "close": 0.02},
    }  # fmt: skip


def quality(low: float = 0.95) -> dict[str, Any]:
    return {
        "variants": [entry("teacher-50", 50, low=low), entry("progressive-2", 2, 0.1406), entry("calibrated-5", 5)],
        "reference": {"floor_fd": {"mean": 1.9, "range": [1.1, 2.9], "n": 199}, "anchor": {"margin": MARGIN}},
        "calibration": [{"better": True}, {"better": False}, {"better": True}],
        "chosen": "progressive-2",
    }


COST = {"latency_ms_per_image": {"median": 0.535}, "speedup_vs_teacher": {"median": 43.0, "min": 39.8, "max": 53.2}}
ROWS = [{**compare.row_of(e, COST), "family": "x"} for e in quality()["variants"]]


def printed(width: int) -> tuple[str, list[str], int]:
    table, left_out, needed = compare.fitted(ROWS, compare.COLUMNS, "family", width)
    console = Console(width=max(width, needed))
    with console.capture() as said:
        console.print(table)
    return said.get(), left_out, needed


@pytest.mark.parametrize("width", [150, 120, 110, 100, 90, 80, 40])
def test_numbers_are_never_cut(width: int) -> None:
    text, left_out, needed = printed(width)
    assert "…" not in text
    for row in ROWS:
        for name, title in compare.COLUMNS.items():
            assert title in left_out or row[name] in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= needed


@pytest.mark.parametrize("width", [150, 120, 100, 80])
def test_the_table_fits_and_gives_up_no_more_than_it_must(width: int) -> None:
    text, left_out, needed = printed(width)
    assert needed <= width
    assert max(len(line) for line in text.splitlines()) <= width
    dropped = [compare.COLUMNS[name] for name in compare.DISPENSABLE if name in compare.COLUMNS]
    assert set(left_out) == set(dropped[: len(left_out)])  # in their order
    assert "[least, most]" in text  # brackets are no markup
    assert ("speed-up [least" in text) == (width == 150)  # two lines else
    if width >= 120:
        assert left_out == []


def test_what_is_said_below_the_table() -> None:
    said = "\n".join(compare.closing_lines(quality(), {"progressive-2": COST}, Path("r")))
    assert "+0.237 [-0.716, +0.974] over that of training images, 13 % of the floor" in said
    assert "0.999 [0.950, 1.039] of held-out images'; no copying: the lower end is at least 0.9" in said
    assert "paired distance over that of the teacher's DDIM at the same steps: progressive-2 0.141." in said
    assert "than every usual grid in 2 of 3 cases" in said
    assert "in brackets the least and the most" in said
    assert "43.0× faster" in said
    said = "\n".join(compare.closing_lines(quality(low=0.85), {}, Path("r")))
    assert "copying is not ruled out: the lower end is under 0.9" in said
    assert "brackets" not in said


def test_what_was_spent_is_said_beside_what_was_asked() -> None:
    compute = {
        "training": 500_000, "distillation": {"progressive": 450_000, "guided": None},
        "calibration": {"reference": 11_000, "ddim-4": 20_000, "ipndm-8": 40_000},
    }  # fmt: skip
    said = "\n".join(compare.closing_lines({**quality(), "compute": compute}, {}, Path("r")))
    assert "calibration: at most 8.0 % of the teacher's training for a schedule (ipndm-8), and 2.2 % once" in said
    assert "(bar on digits: 10 %)" in said
    assert "distillation: progressive 0.90× the teacher's training, all stages together (bar on digits: 3×)" in said
    assert "500,000 network evaluations" in said
    for unknown in (None, compute | {"training": None}):  # a report of before, a teacher from elsewhere
        said = "\n".join(compare.closing_lines({**quality(), "compute": unknown}, {}, Path("r")))
        assert "calibration:" not in said
        assert "distillation:" not in said.replace("progressive distillation", "")


def test_what_was_searched_for_is_said_below_the_table() -> None:
    compute = {"training": 500_000, "distillation": {}, "calibration": {"reference": 5_000, "ddim-4": 20_000}}
    both = compute | {"architecture_calibration": {"reference": 11_000, "ddim-4": 30_000, "ipndm-8": 25_000}}
    found = {"is_teacher": False, "calibration": [{"better": True}, {"better": False}]}
    said = "\n".join(compare.closing_lines({**quality(), "compute": both, "architecture": found}, {}, Path("r")))
    assert "calibration: at most 4.0 % of the teacher's training for a schedule (ddim-4), and 1.0 % once" in said
    assert "one of the teacher's: at most 6.0 % of the teacher's training for a schedule (ddim-4), and 2.2 %" in said
    assert "searched network: nearer to its own fine solution than every usual grid in 1 of 2 cases" in said
    assert "left the teacher as it is" not in said
    said = "\n".join(compare.closing_lines({**quality(), "architecture": {"is_teacher": True}}, {}, Path("r")))
    assert "the search left the teacher as it is" in said and "shown once" in said
    said = "\n".join(compare.closing_lines({**quality(), "compute": compute}, {}, Path("r")))
    assert "searched" not in said and "architecture" not in said


def test_reports_that_are_missing_say_what_makes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--reports", str(tmp_path / "none")]) == 4
    assert "none/evaluate.json: not there; `dvc repro` makes it" in capsys.readouterr().err


def test_a_picture_of_stages_of_another_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = quality()
    report["variants"][1]["name"] = "mine-2"
    write_json(tmp_path / "evaluate.json", report)
    assert main(["compare", "--reports", str(tmp_path), "--stages", str(tmp_path / "stages.png")]) == 2
    said = capsys.readouterr()
    assert "draws the family progressive" in said.err and "there: calibrated, mine, teacher" in said.err
    assert said.out == ""


def test_where_nothing_fits_lines_are_longer_and_what_is_left_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "evaluate.json", quality())
    monkeypatch.setattr(compare, "WIDTH", 40)
    assert compare.main(["--reports", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "+5.950 [+5.742, +6.158]" in said
    assert "…" not in said
    assert "left out, for the terminal is narrow: solver, paired ×10³, classes, ms/image (--markdown shows all)" in said


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate.json", quality())
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "ado_tasks", "compare", "--reports", str(tmp_path)], cwd=ROOT, stdout=writing,
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode in {1, 128 + signal.SIGPIPE}  # 1 where it was the table that found no reader: rich says so


def test_a_chain_that_ended_itself_says_so_beside_what_the_report_part_says() -> None:
    said = compare.closing_lines(quality(), {}, Path("reports"))
    assert not any("while it was trained" in line for line in said)
    reason = "stops at 4 steps: at 2 steps KID − teacher upper end 0.03 ≥ margin 0.02"
    said = compare.closing_lines({**quality(), "stopped": {"progressive": {"reason": reason}}}, {}, Path("reports"))
    assert f"progressive, while it was trained (selection part): {reason}." in said
