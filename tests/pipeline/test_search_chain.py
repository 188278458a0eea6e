"""params.search.yaml as a whole, made small: DVC runs every stage of its graph, and none of them a second time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.storage import read_json

ROOT = Path(__file__).resolve().parents[2]
STUDENTS = {"teacher_steps": 4, "student_steps": [2, 1], "stage_steps": 4, "learning_rate": 1e-3, "batch_size": 8}
SCHEDULES = {"nfe": [2], "solvers": ["angle_ab2"], "samples": 8, "validation_samples": 8, "points": 12, "max_solves": 3}
SMALL: dict[str, Any] = {  # over the preset's own keys; the space and the model stay as they are
    "features": {"dimensions": 8, "filters": 4, "steps": 20, "batch": 16},
    "train": {"steps": 40, "batch_size": 16, "warmup_steps": 5, "ema_decay": 0.9},
    "anchor": {"n_generated": 200, "steps": 6, "coarse_steps": 1},
    "distill": {"progressive": STUDENTS},
    "calibrate": {"teacher": SCHEDULES},
    "measure": {"step_batches": [1], "batch_size": 2, "rounds": 3},
    "evaluate": {"n_generated": 200, "n_paired": 30, "draws": 50, "batch_size": 50},
    "probe": {"race": {"sizes": [4, 2, 1], "unguided": 3, "steps": [2, 2, 2]}, "importance_batches": 2,
              "tune": {"batch_size": 8, "validation_images": 32}},
    "weigh": {"rounds": 3, "batch_size": 8, "evaluations": 1},
    "search": {"policy": {"max_quality_loss": 100.0}},
    "sensitivity": {"images": 16, "batch_size": 8, "rounds": 3},
    "distill_searched": STUDENTS,
    "calibrate_searched": SCHEDULES,
}  # fmt: skip


def over(params: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The changes in the place of what the preset says; a key that it lacks is added."""
    nested = {
        key: over(params[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(params.get(key), dict)
    }
    return {**params, **changes, **nested}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's code and graph with the preset as its params, as `make preset NAME=search` lays them out."""
    folder = tmp_path_factory.mktemp("search") / "preset"
    shutil.copytree(ROOT / "ado_tasks", folder / "ado_tasks", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".dvc").mkdir()
    for name in ("dvc.yaml", "numeric-versions.json", ".dvc/config", ".dvc/.gitignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    params = over(yaml.safe_load((ROOT / "params.search.yaml").read_text()), SMALL)
    for family in (params["distill"]["progressive"], params["distill_searched"]):
        family["matching"] = {**family["matching"], "steps": [0, 2], "learning_rate": 1e-4}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    run(folder, "ado_tasks.graph", "--methods-of", "params.yaml")
    return folder


def run(folder: Path, *words: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ADO_", "PYTHONPATH"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, check=False,
        env={**kept, "PATH": path, "ADO_SYNC": "manual"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.bars
def test_the_preset_runs_whole_and_is_kept(workspace: Path) -> None:
    first = run(workspace, "dvc", "repro")
    assert [first.count(f"Running stage 'probe{rung}@") for rung in ("", "_guided", "_1", "_2")] == [3, 1, 2, 1]
    said = read_json(workspace / "models/architecture/search.json", "chosen", "probes", "cost")
    assert said["chosen"] in {"6", "teacher"} and len(said["probes"]) == 8
    assert said["cost"]["share_of_training"] > 0
    chosen, student = (read_model(workspace / "models" / name).unet.config for name in ("architecture", "searched/1"))
    assert student == chosen
    found = read_json(workspace / "reports/evaluate.json", "variants", "architecture")
    whole = {"teacher-50", "progressive-1", "calibrated-2", "searched-2", "searched-1"}
    assert found["architecture"]["is_teacher"] == (said["chosen"] == "teacher")
    if said["chosen"] != "teacher":
        whole |= {"architecture-50", "architecture_calibrated-2"}
    for report in ("evaluate", "measure"):
        variants = read_json(workspace / f"reports/{report}.json", "variants")["variants"]
        assert whole <= {each["name"] for each in variants}
    shown = run(workspace, "ado_tasks", "compare")
    assert all(name in shown for name in whole)
    # A second time only what always runs, which finds the same machine.
    second = run(workspace, "dvc", "repro")
    assert [line for line in second.splitlines() if line.startswith("Running stage")] == ["Running stage 'profile':"]
