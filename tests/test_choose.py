"""`ado choose`: from reports made by hand to a choice in words."""

import json
from pathlib import Path
from typing import Any

import pytest

from ado_tasks.__main__ import main
from ado_tasks.choose import ways
from ado_tasks.errors import ArtifactError, BudgetError, ConfigError
from ado_tasks.hardware.steps import line
from ado_tasks.storage import read_json, write_json

VARIANTS = [
    {"name": "teacher-50", "solver": "ddim", "nfe": 50}, {"name": "progressive-1", "solver": "ddim", "nfe": 1},
    {"name": "progressive-2", "solver": "ddim", "nfe": 2}, {"name": "calibrated-8", "solver": "ipndm+gits", "nfe": 8},
]  # fmt: skip
JUDGED = {"progressive-1": 0.03, "progressive-2": 0.015, "calibrated-8": 0.012}
SCHEDULES = [
    {"solver": "ddim", "nfe": 4, "distance": 0.01}, {"solver": "ipndm", "nfe": 4, "distance": 0.005},
    {"solver": "ipndm", "nfe": 8, "distance": 0.0006},
]  # fmt: skip


def cost(solver: str, batch: int, fixed: float, step: float, *families: str) -> dict[str, Any]:
    spread = {name: dict.fromkeys(("median", "min", "max"), value) for name, value in (("f", fixed), ("s", step))}
    return {
        "families": families, "solver": solver, "batch": batch, "fixed_ms": spread["f"], "step_ms": spread["s"]
    }  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    every = ("calibrated", "progressive", "teacher")
    steps = [
        cost("ddim", 1, 0.0, 3.0, *every), cost("ddim", 64, 0.0, 25.6, *every),
        cost("ipndm", 1, 0.0, 3.2, *every), cost("ipndm", 64, 0.0, 27.0, *every),
    ]  # fmt: skip
    choice = [{"name": name, "upper_end": upper} for name, upper in JUDGED.items()]
    hardware = {"id": "another", "chip": "Abacus", "cores": 2, "device": "cpu"}
    reference = {"anchor": {"margin": 0.02}}
    write_json(tmp_path / "reports/evaluate.json", {"variants": VARIANTS, "reference": reference, "choice": choice})
    write_json(tmp_path / "reports/measure.json", {"hardware": hardware, "variants": [], "steps": steps})
    write_json(tmp_path / "schedules/teacher/index.json", {"schedules": SCHEDULES})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["progressive-2: ddim, 2 evaluations an image, batches of 64", "0.8 ms an image, 51.2 ms a batch"]),
        (["--ms-per-image", "0.5"], ["progressive-1: ddim, 1 evaluation an image, batches of 64"]),
        (["--ms-per-batch", "7"], ["progressive-2: ddim, 2 evaluations an image, batches of 1."]),
        (["--kid", "0.013"], ["calibrated-8: ipndm, 8 evaluations"]),
        (["--kid", "0.013", "--distance", "0.0007"], ["calibrated-8: ipndm", "at most +0.0120", "solution 0.0006"]),
        (["--distance", "0.006"], ["ipndm-4: ipndm, 4 evaluations", "distance to the fine solution 0.005"]),
        (["--quality", "distance", "--ms-per-image", "1.65"], ["ddim-4: ddim, 4 evaluations an image, batches of 64"]),
        (["--ms-per-image", "100"], ["teacher-50: ddim, 50 evaluations"]),
    ],
)
def test_the_choice_is_printed_with_its_cost_and_reason(
    place: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    assert main(["choose", *options]) == 0
    said = capsys.readouterr().out
    for word in [*words, "why: the ", "costs are of another machine than this one: run `measure` here", "Abacus"]:
        assert word in said


def test_the_section_is_the_budget_and_options_come_before_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "params.yaml").write_text("seed: 0\nchoose: {ms_per_image: 0.5}\n")
    assert main(["choose", "--out", "reports/choice.json"]) == 0
    assert "progressive-1" in capsys.readouterr().out
    kept = read_json(place / "reports/choice.json")
    assert kept["chosen"]["name"] == "progressive-1"
    assert kept["budget"]["ms_per_image"] == 0.5
    assert main(["choose", "--ms-per-image", "0.9"]) == 0
    assert "progressive-2" in capsys.readouterr().out
    (place / "params.yaml").write_text("seed: 0\nchoose: {ms: 0.5}\n")
    assert main(["choose"]) == ConfigError.exit_code
    assert "choose.ms: unknown key; allowed here: ms_per_image, ms_per_batch" in capsys.readouterr().err


def test_an_impossible_budget_names_the_least_that_would_do(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["choose", "--ms-per-image", "0.1"]) == BudgetError.exit_code
    said = capsys.readouterr().err
    assert "BudgetError: no way to sample keeps ms an image ≤ 0.1; the least that would do: ms an image ≤ 0.4 (" in said
    assert main(["choose", "--ms-per-image", "0.4"]) == 0
    assert main(["choose", "--kid", "-1"]) == ConfigError.exit_code


def test_params_that_are_named_have_to_be_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["choose", "--params", "nix.yaml"]) == ConfigError.exit_code
    assert "nix.yaml: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("quality", ["kid", "distance"])
def test_what_is_to_be_made_least_needs_a_limit_on_cost(
    place: Path, capsys: pytest.CaptureFixture[str], quality: str
) -> None:
    """Alone it would be answered by the slowest way there is; what is not said stands in no one's way."""
    assert main(["choose", "--quality", quality, "--out", "reports/choice.json"]) == ConfigError.exit_code
    said = capsys.readouterr().err
    assert f"choose.quality: '{quality}' is what is made least" in said and "allowed with --ms-per-image" in said
    assert not (place / "reports/choice.json").exists()
    (place / "params.yaml").write_text("choose: {tolerance: 0.01}\n", encoding="utf-8")
    assert main(["choose"]) == 0


@pytest.mark.parametrize("damage", ["no steps", "no time", "no name"])
def test_reports_that_cannot_be_chosen_by_are_named(
    place: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    path = place / "reports/measure.json"
    measured = json.loads(path.read_text())
    if damage == "no steps":
        measured.pop("steps")
    elif damage == "no time":
        measured["steps"][0]["step_ms"]["median"] = 0.0
    else:
        measured["steps"][0].pop("families")
    path.write_text(json.dumps(measured))
    assert main(["choose"]) == ArtifactError.exit_code
    said = {"no steps": "set measure.step_batches", "no time": "cannot be: run `measure` again", "no name": "families"}
    assert said[damage] in capsys.readouterr().err


def test_nothing_is_chosen_by_a_figure_of_the_report_part(place: Path) -> None:
    quality, measured = (read_json(place / "reports" / name) for name in ("evaluate.json", "measure.json"))
    index = read_json(place / "schedules/teacher/index.json")
    plain = ways(quality, index, measured)
    for entry in quality["variants"]:
        entry |= {"kid": 9.0, "paired_distance": 9.0, "kid_minus_teacher": {"value": 9.0, "ci": [9.0, 9.0]}}
    assert ways(quality, index, measured) == plain
    assert {way.name for way in plain if way.kid is not None} == {"teacher-50", *JUDGED}


def test_a_line_through_two_numbers_of_evaluations() -> None:
    fixed, step = line([0.013, 0.023, 0.033], [0.043, 0.053, 0.075], few=2, many=8)
    assert (step.median, step.min, step.max) == pytest.approx((5.0, 5.0, 7.0))
    assert (fixed.median, fixed.min, fixed.max) == pytest.approx((13.0, 3.0, 19.0))


def test_a_line_below_zero_is_noise_and_goes_through_zero() -> None:
    fixed, step = line([0.010], [0.070], few=2, many=8)  # the line itself: −10 + 10 n
    assert fixed.median == 0.0
    assert step.median == pytest.approx((2 * 10 + 8 * 70) / (2**2 + 8**2))
    errors = [(2 * k - 10) ** 2 + (8 * k - 70) ** 2 for k in (0.99 * step.median, step.median, 1.01 * step.median)]
    assert errors[1] == min(errors)


def test_what_was_searched_for_is_chosen_by_the_same_rule(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By KID. Its schedules' distances are to its own fine solution, so a limit on distance leaves it out."""
    quality, measured = (read_json(place / "reports" / name) for name in ("evaluate.json", "measure.json"))
    added = {"architecture-50": ("ddim", 50), "architecture_calibrated-8": ("ipndm+gits", 8), "searched-8": ("ddim", 8)}
    quality["variants"] += [{"name": name, "solver": by, "nfe": nfe} for name, (by, nfe) in added.items()]
    quality["choice"] += [
        {"name": name, "upper_end": upper} for name, upper in zip(added, (0.012, 0.011, 0.03), strict=True)
    ]
    its = ("architecture", "architecture_calibrated", "searched")
    measured["steps"] += [cost("ddim", 64, 0.0, 3.0, *its), cost("ipndm", 64, 0.0, 6.0, *its)]
    write_json(place / "reports/evaluate.json", quality)
    write_json(place / "reports/measure.json", measured)
    assert main(["choose", "--kid", "0.013"]) == 0  # 8 steps of 6 ms, not of the teacher's 27
    assert "chosen: architecture_calibrated-8: ipndm, 8 evaluations" in capsys.readouterr().out
    assert main(["choose", "--kid", "0.0125", "--ms-per-image", "100"]) == 0
    assert "0.75 ms an image, 48 ms a batch" in capsys.readouterr().out
    assert main(["choose", "--distance", "0.006"]) == 0
    assert "chosen: ipndm-4: ipndm" in capsys.readouterr().out
    found = ways(quality, read_json(place / "schedules/teacher/index.json"), measured)
    assert {way.name: way.distance for way in found if way.name in added} == dict.fromkeys(added)
    measured["steps"] = measured["steps"][:4]  # of a report that was made before: no cost, so no way
    found = ways(quality, read_json(place / "schedules/teacher/index.json"), measured)
    assert not {way.name for way in found} & set(added)
